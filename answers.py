"""Files of answers, line by line: those that inference.py writes, and those that others made."""

from dataclasses import dataclass, field
from typing import NamedTuple

from common import UserError, read_jsonl
from reading import read_gold


@dataclass(frozen=True)
class Format:
    """How the lines of files are read. The default is what inference.py writes.

    `golds` and `clusters` map the text of a question, as `same_text` gives it, to a reference answer that takes
    the place of the line's own, and to the value of the key `cluster` for lines that lack it.
    """

    question: str = "question"
    answer: str = "ground_truth_answer"
    output: str = "model_output"
    golds: dict | None = None
    cluster: str | None = None
    clusters: dict = field(default_factory=dict)
    thinking: str | None = None  # "yes" or "no" where completions do not say whether they open in a thought
    skip_bad: bool = False


FORMAT = Format()


class Row(NamedTuple):
    """One completion, checked. What the line does not say is None."""

    id: int | str
    question: str
    text: str
    answer: str
    gold: object  # exact: int or Fraction; None where Format.golds does not hold the question
    sample: int
    mode: str | None
    thinking_open: bool | None
    finish_reason: str | None
    output_tokens: int | None
    forced: bool | None
    cluster: str | None


OPTIONAL_KEYS = {
    "sample": int, "mode": str, "thinking_open": bool, "finish_reason": str, "output_tokens": int, "forced": bool,
}  # fmt: skip


def read_rows(path, format=FORMAT, bad=None):
    """Yield a Row for every completion. A bad line is a UserError; with a list `bad` its number goes there.

    The lines of `samples_*.jsonl`, which EleutherAI's harness writes by --log_samples (0.4.13), are read as they
    are. They repeat a document with the same responses for each filter of its task: the first filter's are read.
    """
    seen, harness_filter = {}, None
    for number, line in read_jsonl(path, (), bad):
        try:
            if "resps" in line and "doc" in line:
                harness_filter = harness_filter or line.get("filter")
                found = harness_lines(line, format) if line.get("filter") == harness_filter else ()
            else:
                found = (line,)
            for completion in found:
                yield check_row(completion, format, seen)
        except UserError as error:
            if bad is None:
                raise UserError(f"{path}:{number}: {error}; mend the line or pass --skip-bad") from None
            bad.append(number)


def harness_lines(line, format):
    """One line a response, with the keys that `format` names, for a document of EleutherAI's harness."""
    doc, resps = line["doc"], line["resps"]
    if not isinstance(doc, dict):
        raise UserError(f"'doc' must be an object, this is {type(doc).__name__}")
    if not (isinstance(resps, list) and len(resps) == 1 and isinstance(resps[0], list)):
        raise UserError("'resps' holds no generated text; log the samples of a generate_until task")
    if format.question not in doc:
        raise UserError(lacking("'doc' lacks", doc, format.question, "--question-column"))
    kept = {key: doc[key] for key in (format.question, format.answer, format.cluster) if key in doc}
    kept["id"] = line.get("doc_id")
    kept.setdefault(format.answer, line.get("target"))
    return [kept | {format.output: text, "sample": sample} for sample, text in enumerate(resps[0])]


def read_harness(path):
    """What the first line of a harness file says of how it was made, as the two halves of a run record."""
    try:
        arguments = next(read_jsonl(path))[1]["arguments"]["gen_args_0"]
        prompt, settings = arguments["arg_0"], arguments["arg_1"]
        return {
            "prompt": prompt,
            "max_new_tokens": settings.get("max_gen_toks"),
            **{key: settings.get(key) for key in ("do_sample", "temperature", "top_p", "top_k")},
        }, {}
    except (UserError, StopIteration, LookupError, TypeError, AttributeError):
        return {}, {}


def check_row(line, format=FORMAT, seen=None):
    """The Row of a line. One without an id gets its question's place among `seen`, and is a sample of it."""
    question = column(line, format.question, "--question-column")
    text = column(line, format.output, "--output-column")
    if format.golds is None:
        answer = column(line, format.answer, "--answer-column")
    else:
        answer = format.golds.get(same_text(question))
    for key, kind in OPTIONAL_KEYS.items():
        value = line.get(key)
        if value is not None and (type(value) is not kind or (kind is int and not 0 <= value < 2**31)):
            raise UserError(f"{key!r} must be {'a count' if kind is int else kind.__name__}, this is {value!r:.40}")
    id, sample = line.get("id"), line.get("sample") or 0
    if id is None and seen is not None:
        id, sample = seen.get(question, (len(seen), 0))
        seen[question] = id, sample + 1
    if type(id) not in (int, str):
        raise UserError(f"'id' must be a whole number or text, this is {type(id).__name__}")
    return Row(
        id,
        question,
        text,
        answer,
        None if answer is None else read_gold(answer),
        sample,
        line.get("mode"),
        line.get("thinking_open"),
        line.get("finish_reason"),
        line.get("output_tokens"),
        line.get("forced"),
        format.cluster and cluster_of(line, question, format),
    )


def column(line, key, flag):
    """The text under a key. A number is taken as its digits, for data sets hold bare ones."""
    if key not in line:
        raise UserError(lacking("lacks", line, key, flag))
    value = line[key]
    if type(value) in (int, float):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key!r} must be text, this is {type(value).__name__}")
    return value


def lacking(lacks, line, key, flag):
    held = ", ".join(map(repr, line)) or "none"
    return f"{lacks} the key {key!r}; it has {held}: name the right one with {flag}"


def cluster_of(line, question, format):
    value = line.get(format.cluster)
    if value is None:
        value = format.clusters.get(same_text(question))
    if type(value) not in (int, str):
        told = "lacks" if value is None else "holds no text and no number under"
        raise UserError(f"{told} the key {format.cluster!r} of --cluster; --cluster-from DATASET finds it by question")
    return str(value)


def same_text(question):
    """A question's text as it is matched among files and data sets: runs of white space count as one space."""
    return " ".join(question.split())
