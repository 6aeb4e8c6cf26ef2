"""Score GSM8K completions: two readings of every answer, with intervals.

    python benchmark.py outputs/cot_model_outputs.jsonl outputs/thinking_model_outputs.jsonl
    python benchmark.py FILES --compare --published     # runs as pairs; beside the published figures
    python benchmark.py FILES --plot runs.png --html runs.html --wrong 5
    python benchmark.py FILES --json                    # one object a file, for programs
    python benchmark.py TRAIN_RUNS --keep-correct right.jsonl      # the model's own right answers, to train on

Reads any JSONL whose lines hold `id`, `question`, `model_output` and `ground_truth_answer`; the
further keys that `inference.py` writes are used where they stand. Nothing is loaded but text:
torch is not imported, and a file in the order that `inference.py` writes is read as a stream.

The two readings are `score_published` and `score_final` in `common.py`. The first is the rule
behind the published figures; the second takes the answer as a careful reader would, and tells an
answer that never came (unfinished, no answer) from one that is wrong.

Accuracies carry 95 % intervals: Wilson's for one sample a question, and from question-clustered
standard errors for several, where samples of one question are not independent.
"""

import json
import re
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations, islice
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple
from zlib import crc32

from common import (
    PUBLISHED_KEYS,
    STATUSES,
    ArgumentParser,
    UserError,
    command_line,
    grade,
    is_run_record,
    last_number,
    load_questions,
    printable,
    read_final,
    read_gold,
    read_json,
    read_jsonl,
    score_published,
    write_atomically,
)

Z95 = NormalDist().inv_cdf(0.975)


@command_line
def main(argv=None):
    options = parse(argv)
    files = name_runs([score_run(path, options) for path in options.files])
    runs = pool_seeds(files) if options.pool_seeds else files
    published = load_published(runs) if options.published else {}
    comparisons = compare_runs(runs) if options.compare else []
    if options.json:
        print(json.dumps([summary(run, published, comparisons) for run in runs], indent=2))
    else:
        report(runs, published, comparisons, options)
    for run in files if options.wrong else ():
        print_wrong(run, options)
    if options.plot:
        plot(runs, published, options.plot)
    if options.html:
        write_page(files, published, comparisons, options)
    if options.keep_correct:
        keep_correct(files, options)


def parse(argv):
    parser = ArgumentParser(description="Score GSM8K completions: two readings of every answer, with intervals.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL files of completions")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON array, an object a file, and no table")
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--compare", action="store_true", help="test every two files as pairs over their questions")
    parser.add_argument("--published", action="store_true", help="set known rows beside their published figures")
    parser.add_argument(
        "--pool-seeds",
        action="store_true",
        help="take files whose names differ in a last -seedN alone for one run, each seed a sample of every question",
    )
    parser.add_argument("--commands", action="store_true", help="add the wall time and the command of each run's record")
    parser.add_argument(
        "--wrong", type=int, default=0, metavar="N", help="print N answers of each file that are not right"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracies and what became of the answers")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write one page for reading the answers")
    parser.add_argument(
        "--keep-correct",
        type=Path,
        metavar="OUT.jsonl",
        help="write the distinct right completions of runs over a train split, to train on",
    )
    parser.add_argument(
        "--keep-most", type=int, default=4, metavar="M", help="with --keep-correct: the M shortest a question (4)"
    )
    parser.add_argument(
        "--thinking",
        choices=("yes", "no"),
        help="whether completions may hold a thought, open from the start; default: as lines and texts say",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count lines that cannot be read, and score the rest")
    options = parser.parse_args(argv)
    if options.wrong < 0:
        raise UserError(f"--wrong {options.wrong}: pass how many answers to print, 1 or more")
    if options.wrong and options.json:
        raise UserError("--wrong prints text, --json nothing but JSON: pass one of them")
    if options.compare and len(options.files) < 2:
        raise UserError("--compare: pass two files or more")
    if options.keep_most < 1:
        raise UserError(f"--keep-most {options.keep_most}: pass how many completions of a question to keep, 1 or more")
    outputs = ("--plot", options.plot, ".png"), ("--html", options.html, ".html")
    for flag, path, ending in (*outputs, ("--keep-correct", options.keep_correct, ".jsonl")):
        if path and (path.suffix.lower() != ending or not path.parent.is_dir() or path.is_dir()):
            raise UserError(f"{flag} {path}: pass a file that ends in {ending}, in a folder that exists")
        if path and path.resolve() in [file.resolve() for file in options.files]:
            raise UserError(f"{flag} {path}: would overwrite a file to score; pass another name")
    return options


# ------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One completion, checked. What the line does not say is None."""

    id: int | str
    question: str
    text: str
    answer: str
    gold: object  # exact: int or Fraction
    sample: int
    mode: str | None
    thinking_open: bool | None
    finish_reason: str | None
    output_tokens: int | None
    forced: bool | None


OPTIONAL_KEYS = {
    "sample": int, "mode": str, "thinking_open": bool, "finish_reason": str, "output_tokens": int, "forced": bool,
}  # fmt: skip


def read_rows(path, bad=None):
    """Yield a Row for every line. A bad line is a UserError; with a list `bad` its number goes there."""
    for number, row in read_jsonl(path, PUBLISHED_KEYS, bad):
        try:
            yield check_row(row)
        except UserError as error:
            if bad is None:
                raise UserError(f"{path}:{number}: {error}; mend the line or pass --skip-bad") from None
            bad.append(number)


def check_row(row):
    for key in PUBLISHED_KEYS[1:]:
        if not isinstance(row[key], str):
            raise UserError(f"{key!r} must be text, this is {type(row[key]).__name__}")
    if type(row["id"]) not in (int, str):
        raise UserError(f"'id' must be a number or text, this is {type(row['id']).__name__}")
    for key, kind in OPTIONAL_KEYS.items():
        value = row.get(key)
        if value is not None and (type(value) is not kind or (kind is int and not 0 <= value < 2**31)):
            raise UserError(f"{key!r} must be {'a count' if kind is int else kind.__name__}, this is {value!r:.40}")
    answer = row["ground_truth_answer"]
    return Row(
        row["id"],
        row["question"],
        row["model_output"],
        answer,
        read_gold(answer),
        row.get("sample") or 0,
        row.get("mode"),
        row.get("thinking_open"),
        row.get("finish_reason"),
        row.get("output_tokens"),
        row.get("forced"),
    )


def was_prefilled(path, skip_bad):
    """Whether the prompts of a file that does not say so ended inside a thought.

    So it is where no line holds `thinking_open` and no text `<think>`, yet at least half of the
    texts hold `</think>`. Reads on only until a line speaks.
    """
    closed = count = 0
    for row in read_rows(path, [] if skip_bad else None):
        if row.thinking_open is not None or "<think>" in row.text:
            return False
        count += 1
        closed += "</think>" in row.text
    return count > 0 and 2 * closed >= count


def thought(row, prefilled, override=None):
    """Whether a thought was opened before or in the completion; `override` is --thinking."""
    if override:
        return override == "yes"
    return prefilled or bool(row.thinking_open) or "<think>" in row.text


# ------------------------------------------------------------------------------------------
# Scoring
# ------------------------------------------------------------------------------------------


ASKED_FORMAT = re.compile(r"#### ?-?[0-9][0-9,]*(\.[0-9]+)?\s*\Z")


@dataclass
class Rows:
    """What votes and comparisons need of every line: under 30 bytes a line, in the file's order."""

    questions: array = field(default_factory=lambda: array("q"))  # hashes of id, question and answer
    samples: array = field(default_factory=lambda: array("i"))
    right: bytearray = field(default_factory=bytearray)
    published: bytearray = field(default_factory=bytearray)
    answers: array = field(default_factory=lambda: array("q"))  # hashes of the numbers; -1, no hash, where none is read


@dataclass
class Run:
    """One scored file, or several by --pool-seeds. `rows` is None where a file was read as a stream."""

    paths: tuple
    name: str
    questions: int
    counts: Counter  # lines by status and by the other facts that `score_rows` counts
    skipped: int
    prefilled: bool
    rows: Rows | None

    @property
    def path(self):
        return self.paths[0]

    @property
    def n(self):
        return self.counts["lines"]

    @property
    def several(self):
        return self.questions < self.n


def name_runs(runs):
    """Runs of the same file name in several folders go by their paths."""
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            run.name = str(bare(run.path))
    return runs


SEED = re.compile(r"-seed[0-9]+$")


def pool_seeds(runs):
    """One Run in place of those whose names differ in a last -seedN alone: what was a seed is a sample."""
    pooled = {}
    for run in runs:
        name = SEED.sub("", run.name)
        pooled[name] = pool(pooled[name], run) if name in pooled else replace(run, name=name)
    return list(pooled.values())


def pool(first, second):
    if set(first.rows.questions) != set(second.rows.questions):
        raise UserError(f"--pool-seeds: {first.path} and {second.path} hold other questions; pool files of the same")
    rows, offset = Rows(), 1 + max(first.rows.samples)
    for name in vars(rows):
        setattr(rows, name, getattr(first.rows, name) + getattr(second.rows, name))
    for line in range(len(first.rows.samples), len(rows.samples)):
        rows.samples[line] += offset
    return Run(
        first.paths + second.paths,
        first.name,
        first.questions,
        first.counts + second.counts,
        first.skipped + second.skipped,
        first.prefilled,
        rows,
    )


def score_run(path, options):
    """Score a file: as a stream where it is in order with one sample a question, else with its rows kept."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a plain file, and files are read more than once; write it to one first")
    prefilled = not options.thinking and was_prefilled(path, options.skip_bad)
    run = None if options.compare or options.pool_seeds else score_rows(path, options, prefilled, keep=False)
    run = run or score_rows(path, options, prefilled, keep=True)
    if not run.n:
        raise UserError(f"{path}: holds no line to score")
    return run


def score_rows(path, options, prefilled, keep):
    """The Run of a file; None where it needs `keep`, because an id does not exceed the one before."""
    counts, bad, rows, previous = Counter(), [], Rows(), None
    for row in read_rows(path, bad if options.skip_bad else None):
        if not keep:
            if type(row.id) is not int or (previous is not None and row.id <= previous):
                return None
            previous = row.id
        reading = read_final(row.text, thought(row, prefilled, options.thinking))
        status = grade(reading, row.gold)
        counts["lines"] += 1
        counts["bytes"] += len(row.text) if row.text.isascii() else len(row.text.encode("utf-8", "replace"))
        counts[status] += 1
        published = score_published(row.text, row.answer)
        counts["published"] += published
        if row.finish_reason is not None:
            counts["finish_reason"] += 1
            counts["truncated"] += row.finish_reason == "length"
        if row.output_tokens is not None:
            counts["output_tokens_lines"] += 1
            counts["output_tokens"] += row.output_tokens
        if row.forced is not None:
            counts["forced_lines"] += 1
            counts["forced"] += row.forced
        if status == "right":
            counts["worked"] += "=" in row.text[reading.start : reading.end]
            counts["off_format"] += not ASKED_FORMAT.search(row.text, max(0, len(row.text) - 80))
        elif status == "unfinished":
            counts["unfinished_published"] += published
        elif status == "no_answer":
            counts["no_answer_right"] += last_number(row.text.rpartition("</think>")[2]) == row.gold
        if keep:
            rows.questions.append(hash((row.id, row.question, row.answer)))
            rows.samples.append(row.sample)
            rows.right.append(status == "right")
            rows.published.append(published)
            rows.answers.append(-1 if reading.number is None else hash((reading.number,)))
    questions = count_questions(path, rows) if keep else counts["lines"]
    return Run((path,), bare(path).name, questions, counts, len(bad), prefilled, rows if keep else None)


def bare(path):
    """The path without .jsonl or .jsonl.gz, which is the run's name."""
    return Path(str(path).removesuffix(".gz").removesuffix(".jsonl"))


def count_questions(path, rows):
    import numpy

    pairs = numpy.stack([rows.questions, rows.samples])
    pairs = pairs[:, numpy.lexsort(pairs[::-1])]
    new_question = numpy.diff(pairs[0]) != 0
    repeated = int((~new_question & (numpy.diff(pairs[1]) == 0)).sum())
    if repeated:
        raise UserError(f"{path}: {repeated} lines repeat the id and sample of another line; remove them")
    return len(rows.samples) and 1 + int(new_question.sum())


# ------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------


def percent(part, whole):
    return 100 * part / whole


def accuracy_interval(run, reading):
    """The 95 % interval in percent of a run's accuracy by a reading, "right" or "published"."""
    share = percent(run.counts[reading], run.n)
    low, high = clustered(run.rows.questions, getattr(run.rows, reading)) if run.several else wilson(run.counts[reading], run.n)
    return min(low, share), max(high, share)  # where all are right rounding would leave the share outside


def wilson(right, n):
    """Wilson's 95 % interval of a share, in percent."""
    share, z2 = right / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def clustered(questions, right):
    """The 95 % interval in percent of a mean over lines whose errors are clustered by question.

    The cluster-robust variance of a mean with its G / (G - 1) correction (Miller, "Adding Error
    Bars to Evals", 2024, section 2.2). One question alone says nothing: 0 to 100.
    """
    import numpy

    _, cluster = numpy.unique(numpy.asarray(questions), return_inverse=True)
    right = numpy.frombuffer(right, dtype=numpy.uint8)
    share, clusters = right.mean(), cluster.max() + 1
    if clusters < 2:
        return 0.0, 100.0
    residuals = numpy.bincount(cluster, right - share)
    half = Z95 * sqrt(clusters / (clusters - 1) * (residuals**2).sum()) / len(right)
    return 100 * max(0.0, share - half), 100 * min(1.0, share + half)


@dataclass(frozen=True)
class Votes:
    """What several samples a question give, for k = 1 … K, in percent. K: the fewest samples of a question."""

    pass_at: list  # the unbiased estimate, from all samples
    majority_at: list  # the vote of the first k samples
    majority_interval: tuple  # of the last vote: 95 %, bootstrap over questions
    ties: int  # questions whose last vote was tied


def count_votes(run):
    """The Votes of a run with several samples a question.

    pass@k is 1 - C(n - c, k) / C(n, k) for c right of n samples, averaged over questions (Chen et
    al., "Evaluating Large Language Models Trained on Code", 2021). In the vote only answers that
    could be read have a voice; of tied answers the one given first wins.
    """
    from scipy.stats import binom

    by_question = {}
    for index, question in enumerate(run.rows.questions):
        by_question.setdefault(question, []).append(index)
    most = min(map(len, by_question.values()))
    drawn, majority_right, ties = Counter(), [0] * most, 0
    for lines in by_question.values():
        lines.sort(key=run.rows.samples.__getitem__)
        right = [run.rows.answers[line] for line in lines if run.rows.right[line]]
        drawn[len(lines), len(right)] += 1
        winners, tied = vote([run.rows.answers[line] for line in lines[:most]])
        for k, winner in enumerate(winners):
            majority_right[k] += winner in right[:1]
        ties += tied
    questions = len(by_question)
    pass_at = [
        percent(sum(many * (1 - comb(n - c, k) / comb(n, k)) for (n, c), many in drawn.items()), questions)
        for k in range(1, most + 1)
    ]
    # Resampling right and wrong votes over questions is a binomial draw, so no dice are needed.
    low, high = binom.ppf([0.025, 0.975], questions, majority_right[-1] / questions)
    interval = percent(float(low), questions), percent(float(high), questions)
    return Votes(pass_at, [percent(right, questions) for right in majority_right], interval, ties)


def vote(answers):
    """The winner after each answer (-1: nothing read yet), and whether the last vote is tied."""
    counts, winners = Counter(), []
    for answer in answers:
        if answer != -1:
            counts[answer] += 1
        winners.append(max(counts, key=counts.get, default=-1))  # of the tied: the first given
    return winners, list(counts.values()).count(max(counts.values(), default=0)) > 1


# ------------------------------------------------------------------------------------------
# Comparison
# ------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Two runs over the same questions: accuracies, difference and interval in percentage points."""

    first: str
    second: str
    accuracies: tuple
    difference: float  # first - second
    interval: tuple  # 95 %, of the paired difference
    first_only: int  # questions where the first run is right and the second is not, or right more often
    second_only: int
    test: str
    p: float
    p_holm: float = 1.0


def compare_runs(runs):
    """A Comparison for every two runs; UserError where two do not hold the same questions."""
    means = [question_means(run) for run in runs]
    comparisons = []
    for (a, (questions_a, means_a)), (b, (questions_b, means_b)) in combinations(zip(runs, means, strict=True), 2):
        if len(questions_a) != len(questions_b) or (questions_a != questions_b).any():
            shared = len(set(questions_a.tolist()) & set(questions_b.tolist()))
            raise UserError(
                f"--compare: {a.path} holds {a.questions:,} questions and {b.path} {b.questions:,}, {shared:,} the "
                "same; compare files of the same questions"
            )
        comparisons.append(compare(a, b, means_a, means_b))
    # Holm (1979): the i-th smallest of m p-values times m - i, never below the one before it.
    least = 0.0
    for i, comparison in enumerate(sorted(comparisons, key=lambda comparison: comparison.p)):
        least = comparison.p_holm = max(least, min(1.0, (len(comparisons) - i) * comparison.p))
    return comparisons


def question_means(run):
    """The questions of a run in the order of their hashes, and the share of right samples of each."""
    import numpy

    questions, line = numpy.unique(numpy.asarray(run.rows.questions), return_inverse=True)
    right = numpy.bincount(line, numpy.frombuffer(run.rows.right, dtype=numpy.uint8))
    return questions, right / numpy.bincount(line)


def compare(a, b, means_a, means_b):
    """One value a question, so samples of a question are never taken for independent.

    The interval is Student's for the mean paired difference. With one sample a question p is
    McNemar's exact test on the discordant pairs; with several it is that of the paired t-test.
    """
    from scipy.stats import binomtest, ttest_rel

    differences = means_a - means_b
    first_only, second_only = int((differences > 0).sum()), int((differences < 0).sum())
    low, high, p_paired = 0.0, 0.0, 1.0  # where no question differs, t is 0/0
    if len(differences) < 2:
        low, high = -1.0, 1.0
    elif (differences != differences[0]).any():
        paired = ttest_rel(means_a, means_b)
        (low, high), p_paired = paired.confidence_interval(), float(paired.pvalue)
    elif differences[0]:
        low = high = differences[0]
        p_paired = 0.0
    if a.several or b.several:
        test, p = "paired t-test", p_paired
    else:
        discordant = first_only + second_only
        test, p = "exact McNemar", binomtest(first_only, discordant).pvalue if discordant else 1.0
    return Comparison(
        a.name,
        b.name,
        (percent(means_a.mean(), 1), percent(means_b.mean(), 1)),
        percent(differences.mean(), 1),
        (percent(low, 1), percent(high, 1)),
        first_only,
        second_only,
        test,
        float(p),
    )


# ------------------------------------------------------------------------------------------
# Published figures
# ------------------------------------------------------------------------------------------

PUBLISHED_FILE = Path(__file__).parent / "results" / "published.json"


@dataclass(frozen=True)
class Published:
    """A published row beside a run: its figure in percent, and how the run's protocol compares."""

    accuracy: float
    source: str  # "readme", or "file" where the figure is recomputed from the published output
    inside: bool | None  # the figure lies in the run's interval by the published rule; None: not comparable
    protocol: str


def load_published(runs):
    """The Published of each run whose name is that of a published row, by run name."""
    known = json.loads(PUBLISHED_FILE.read_text())
    found = {}
    for run in runs:
        row = known["rows"].get(bare(run.path).name)
        if row:
            source = "file" if row["published"] is None else "readme"
            accuracy = row["file"] if row["published"] is None else row["published"]
            low, high = accuracy_interval(run, "published")
            wanted = row["protocol"] | {"dataset_sha256": known["dataset_sha256"]}
            protocol = compare_protocol(run, wanted)
            inside = None if protocol.startswith("other") else low <= accuracy <= high
            found[run.name] = Published(accuracy, source, inside, protocol)
    return found


def compare_protocol(run, wanted):
    record = read_record(run.path)
    if record is None:
        return "no run record"
    made = record["decides"] | {"model": Path(str(record["segments"][-1].get("model"))).name}
    differing = [key for key in wanted if made.get(key) != wanted[key]]
    if "dataset_sha256" in differing:
        return "other questions"
    if differing:
        return "other protocol: " + ", ".join(f"{key} {made.get(key)}, not {wanted[key]}" for key in differing)
    return "same protocol, our wording"


def read_record(path):
    """The run record beside a file, or None where there is none that can be read."""
    try:
        record = read_json(f"{bare(path)}.run.json")
    except UserError:
        return None
    return record if is_run_record(record) else None


# ------------------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------------------


def truncated(run):
    """Lines that ran into the token limit; None where not every line says how it ended."""
    return run.counts["truncated"] if run.counts["finish_reason"] == run.n else None


def summary(run, published, comparisons):
    """What --json prints of a file: counts of lines, accuracies and intervals in percent."""
    facts = {
        "path": str(run.path),
        "n": run.n,
        "questions": run.questions,
        "skipped": run.skipped,
        "correct_published": run.counts["published"],
        "accuracy_published": percent(run.counts["published"], run.n),
        "interval_published": accuracy_interval(run, "published"),
        "correct": run.counts["right"],
        "accuracy": percent(run.counts["right"], run.n),
        "interval": accuracy_interval(run, "right"),
        **{status: run.counts[status] for status in STATUSES[1:]},
        "truncated": truncated(run),
        "forced": run.counts["forced"] if run.counts["forced_lines"] else None,
        "no_answer_right": run.counts["no_answer_right"],
        "output_tokens_mean": mean_tokens(run),
    }
    if len(run.paths) > 1:
        facts["paths"] = list(map(str, run.paths))
    elif run.several:
        facts |= vars(count_votes(run))
    if run.name in published:
        facts["published"] = vars(published[run.name])
    pairs = [vars(comparison) for comparison in comparisons if comparison.first == run.name]
    return facts | ({"compared": pairs} if pairs else {})


def mean_tokens(run):
    """Mean output tokens a line; None where not every line holds its count."""
    return run.counts["output_tokens"] / run.n if run.counts["output_tokens_lines"] == run.n else None


def report(runs, published, comparisons, options):
    """The table of runs, that of comparisons, and notes, as text or as Markdown."""
    render, bullet = (render_markdown, "- ") if options.markdown else (render_text, "")
    print(render(run_table(runs, published, options.commands)))
    if comparisons:
        print("\n" + render(comparison_table(comparisons)))
    lines = [bullet + printable(note) for note in notes(runs, comparisons)]
    if lines:
        print("\n" + "\n".join(lines))


def run_table(runs, published, commands=False):
    """Rows of cells, the first being the header."""
    header = ["file", "lines", "final answer %", "published rule %"]
    header += ["published %", "in interval", "protocol"] if published else []
    header += ["unfinished", "at limit", "no answer", "ambiguous"]
    header += ["forced"] if any(run.counts["forced_lines"] for run in runs) else []
    header += ["tokens"] if any(mean_tokens(run) for run in runs) else []
    header += ["seconds", "command"] if commands else []
    return [header, *(run_cells(run, published, header) for run in runs)]


def run_cells(run, published, header):
    limit, tokens, row = truncated(run), mean_tokens(run), published.get(run.name)
    cells = {
        "file": run.name,
        "lines": f"{run.n:,}",
        "final answer %": with_interval(percent(run.counts["right"], run.n), accuracy_interval(run, "right")),
        "published rule %": with_interval(percent(run.counts["published"], run.n), accuracy_interval(run, "published")),
        "published %": row and f"{row.accuracy:.2f}" + (" (file)" if row.source == "file" else ""),
        "in interval": row and {True: "yes", False: "no", None: "-"}[row.inside],
        "protocol": row and row.protocol,
        "unfinished": f"{run.counts['unfinished']:,}",
        "at limit": None if limit is None else f"{limit:,}",
        "no answer": f"{run.counts['no_answer']:,}",
        "ambiguous": f"{run.counts['ambiguous']:,}",
        "forced": f"{run.counts['forced']:,}" if run.counts["forced_lines"] else None,
        "tokens": None if tokens is None else f"{tokens:,.0f}",
    }
    if "command" in header:
        cells |= made_by(run)
    return [cells[column] or "-" for column in header]


def made_by(run):
    """Wall time in seconds and command, as the run records say; of several seeds the first command and all times."""
    segments = [segment for path in run.paths for segment in (read_record(path) or {"segments": []})["segments"]]
    times = [segment.get("seconds") for segment in segments]
    whole = bool(times) and all(isinstance(seconds, (int, float)) for seconds in times)
    return {
        "seconds": f"{sum(times):,.1f}" if whole else None,
        "command": str(segments[0]["command"]) if segments and "command" in segments[0] else None,
    }


def comparison_table(comparisons):
    header = ["first", "second", "difference, points", "right in first only", "in second only", "p", "p (Holm)"]
    return [header] + [
        [
            pair.first,
            pair.second,
            with_interval(pair.difference, pair.interval, "+"),
            f"{pair.first_only:,}",
            f"{pair.second_only:,}",
            f"{pair.p:.2g}",
            f"{pair.p_holm:.2g}",
        ]
        for pair in comparisons
    ]


def with_interval(value, interval, sign=""):
    return f"{value:{sign}.2f} [{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


WORDS = ("file", "first", "second", "protocol", "command")  # columns set to the left; figures go to the right


def render_text(table):
    table = [[printable(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [header in WORDS for header in table[0]]
    lines = []
    for row in table:
        cells = zip(row, widths, left, strict=True)
        lines.append("  ".join(cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in cells))
    return "\n".join(line.rstrip() for line in lines)


def render_markdown(table):
    table = [[printable(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    ruler = ["---" if header in WORDS else "---:" for header in table[0]]
    return "\n".join("| " + " | ".join(row) + " |" for row in (table[0], ruler, *table[1:]))


MOST_NOTES = 3  # of one kind
MISLEADING = 0.02  # share of lines from which a note is worth its line


def notes(runs, comparisons):
    """Lines in plain words, where a figure alone would mislead."""
    for run in runs:
        for note in run_notes(run):
            yield f"{run.name}: {note}"
    alike = [pair for pair in comparisons if pair.p_holm >= 0.05]
    for pair in alike[:MOST_NOTES]:
        yield f"no difference shown between {pair.first} and {pair.second} ({pair.test}, p = {pair.p_holm:.2g})"
    if len(alike) > MOST_NOTES:
        yield f"nor in {len(alike) - MOST_NOTES} more of the {len(comparisons)} pairs: where p (Holm) is 0.05 or more"


def run_notes(run):
    counts, right = run.counts, run.counts["right"]
    finished = run.n - counts["unfinished"]
    if run.skipped:
        yield f"{run.skipped:,} lines could not be read and are left out"
    if counts["unfinished"] > MISLEADING * run.n:
        of_those = f"; of those that did, {percent(right, finished):.0f} % were right" if finished else ""
        counted = f" (the published rule counts {counts['unfinished_published']:,} of them right)"
        yield (
            f"{percent(counts['unfinished'], run.n):.0f} % of the answers never finished"
            f"{counted if counts['unfinished_published'] else ''}{of_those}: raise --max-new-tokens"
        )
    elif (truncated(run) or 0) > MISLEADING * run.n:
        yield f"{percent(truncated(run), run.n):.0f} % of the answers were cut at the limit: raise --max-new-tokens"
    if counts["worked"] > 0.1 * right:
        yield (
            f"{percent(counts['worked'], right):.0f} % of the right answers worked the problem out after `####`: "
            "this is not a direct answer"
        )
    if counts["off_format"]:
        yield f"{counts['off_format']:,} answers were right but not in the asked format, `#### 18` alone on the last line"
    if counts["no_answer_right"]:
        yield (
            f"{counts['no_answer_right']:,} of the {counts['no_answer']:,} without an answer "
            "end in the right number: a matter of format, not of arithmetic"
        )
    if len(run.paths) > 1:
        yield f"{len(run.paths)} seeds, taken together: the interval covers the choice of questions, not that of seeds"
    elif run.several:
        votes = count_votes(run)
        k = len(votes.pass_at)
        yield (
            f"{run.questions:,} questions, pass@{k} {votes.pass_at[-1]:.2f}, maj@{k} "
            f"{with_interval(votes.majority_at[-1], votes.majority_interval)}; "
            f"{votes.ties:,} tied votes went to the answer given first"
        )


def print_wrong(run, options):
    """The first --wrong answers of a run that are not right: question, gold, what was read, the end."""
    wrong = ((row, reading, status) for row, reading, status in read_again(run, options) if status != "right")
    for row, reading, status in islice(wrong, options.wrong):
        read = status.replace("_", " ") if reading.number is None else f"read {reading.number}"
        print(f"\n--- {printable(run.name)}, id {printable(str(row.id))}, sample {row.sample}: {read}, gold {row.gold}")
        print(printable(row.question))
        print("..." + printable(row.text[-400:]) if len(row.text) > 400 else printable(row.text))


def read_again(run, options, share=1.0):
    """(Row, Reading, status) of a share of the questions once more, for what shows texts: a Run keeps none."""
    for row in read_rows(run.path, [] if options.skip_bad else None):
        if share < 1 and crc32(row.question.encode("utf-8", "surrogatepass")) >= share * 2**32:
            continue
        reading = read_final(row.text, thought(row, run.prefilled, options.thinking))
        yield row, reading, grade(reading, row.gold)


# ------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------

# Okabe and Ito's palette, told apart by people with any colour vision; the order is that of STATUSES.
STATUS_COLOURS = dict(zip(STATUSES, ("#0072B2", "#D55E00", "#999999", "#F0E442", "#CC79A7"), strict=True))


def plot(runs, published, path):
    """Accuracies with intervals and published figures; what became of the answers; tokens and votes where there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    below = [draw_tokens] if any(mean_tokens(run) for run in runs) else []
    below += [draw_votes] if any(has_votes(run) for run in runs) else []
    below += [draw_budgets] if sum(think_budget(run) is not None for run in runs) > 1 else []
    pairs = [below[i : i + 2] for i in range(0, len(below), 2)]
    layout = [[draw_accuracies, draw_statuses], *([pair[0], pair[-1]] for pair in pairs)]
    heights = [1.6 + 0.5 * max(len(runs), 4)] + [3.4] * len(pairs)  # inches; README shows 8 in about 850 pixels
    figure, axes = pyplot.subplot_mosaic(layout, figsize=(8, sum(heights)), height_ratios=heights, layout="constrained")
    for draw, axis in axes.items():
        draw(axis, runs, published)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def wrap_name(name):
    """The name on lines of about 24 characters, broken after `-` and `_`; `$` starts no formula."""
    lines = [""]
    for part in re.findall(r"[^-_]*[-_]?", printable(name).replace("$", r"\$")):
        if len(lines[-1]) + len(part) > 24 and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def draw_accuracies(axis, runs, published):
    names = [f"{wrap_name(run.name)}  {number}" for number, run in enumerate(runs, 1)]
    height = 0.36 if published else 0.6
    for place, run in enumerate(runs):
        accuracy, (low, high) = percent(run.counts["right"], run.n), accuracy_interval(run, "right")
        row = published.get(run.name)
        row = row if row and row.inside is not None else None
        top = place - height / 2 if row else place
        axis.barh(top, accuracy, height, color=STATUS_COLOURS["right"])
        axis.errorbar(accuracy, top, xerr=[[accuracy - low], [high - accuracy]], color="black", capsize=3, linewidth=1)
        axis.text(high + 2, top, f"{accuracy:.1f}", va="center")
        if row:
            axis.barh(top + height, row.accuracy, height, color="#BBBBBB")
            axis.text(row.accuracy + 2, top + height, f"{row.accuracy:.1f}", va="center", color="#555555")
    axis.set(xlim=(0, 118), xticks=range(0, 101, 20), xlabel="right, %, with 95 % interval")
    axis.set_yticks(range(len(runs)), names)
    axis.invert_yaxis()
    axis.bar(0, 0, color=STATUS_COLOURS["right"], label="measured, by final answer")
    if published:
        axis.bar(0, 0, color="#BBBBBB", label="published, by its own rule")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)


def draw_statuses(axis, runs, _):
    left = [0.0] * len(runs)
    for status, colour in STATUS_COLOURS.items():
        shares = [percent(run.counts[status], run.n) for run in runs]
        label = status.replace("_", " ")
        axis.barh(
            range(len(runs)), shares, left=left, height=0.6, color=colour, edgecolor="white", linewidth=0.5, label=label
        )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axis.set(xlim=(0, 100), xlabel="answers, %")
    axis.set_yticks(range(len(runs)), range(1, len(runs) + 1))
    axis.invert_yaxis()
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def draw_tokens(axis, runs, _):
    """A point a run that counts its tokens, with the run's number."""
    widest, spots = max(mean_tokens(run) or 0 for run in runs), []
    for number, run in enumerate(runs, 1):
        tokens = mean_tokens(run)
        if tokens is None:
            continue
        accuracy, (low, high) = percent(run.counts["right"], run.n), accuracy_interval(run, "right")
        error = [[accuracy - low], [high - accuracy]]
        axis.errorbar(tokens, accuracy, yerr=error, fmt="o", color=STATUS_COLOURS["right"], ecolor="black", capsize=3)
        spots.append((tokens, accuracy, number))
    annotate_runs(axis, spots, 0.05 * widest)
    axis.set(xlabel="output tokens, mean", ylabel="right by final answer, %", ylim=(0, 100), xlim=(0, 1.3 * widest))


def draw_votes(axis, runs, _):
    """pass@k and maj@k over k for the runs with several samples, each line ending in its run's number."""
    spots, ends = [], [1]
    for number, run in enumerate(runs, 1):
        if not has_votes(run):
            continue
        votes = count_votes(run)
        for shares, style in ((votes.pass_at, "--"), (votes.majority_at, "-")):
            axis.plot(range(1, len(shares) + 1), shares, style, marker=".", color=STATUS_COLOURS["right"])
            spots.append((len(shares), shares[-1], number))
            ends.append(len(shares))
    annotate_runs(axis, spots, 0.04 * max(ends))
    axis.plot([], [], "--", color=STATUS_COLOURS["right"], label="pass@k")
    axis.plot([], [], "-", color=STATUS_COLOURS["right"], label="maj@k")
    axis.set(xlabel="samples, k", ylabel="right, %", ylim=(0, 105), xlim=(0.8, 1.25 * max(ends)))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="lower right", frameon=False)


def has_votes(run):
    return run.several and len(run.paths) == 1


def think_budget(run):
    """The --think-budget that a run was made with, by its record; None without one."""
    record = read_record(run.path)
    return record and record["decides"].get("think_budget")


OF_A_BUDGET = ("think_budget", "max_new_tokens")


def draw_budgets(axis, runs, _):
    """Accuracy against thinking budget; a line joins runs that differ in nothing else."""
    curves, spots = {}, []
    for number, run in enumerate(runs, 1):
        budget = think_budget(run)
        if budget is None:
            continue
        decides = {key: value for key, value in read_record(run.path)["decides"].items() if key not in OF_A_BUDGET}
        accuracy, (low, high) = percent(run.counts["right"], run.n), accuracy_interval(run, "right")
        curves.setdefault(json.dumps(decides, sort_keys=True), []).append((budget, accuracy, accuracy - low, high - accuracy))
        spots.append((budget, accuracy, number))
    for curve in curves.values():
        budgets, accuracies, *error = zip(*sorted(curve), strict=True)
        axis.errorbar(budgets, accuracies, error, fmt="o-", color=STATUS_COLOURS["right"], ecolor="black", capsize=3)
    for budget, accuracy, number in spots:
        axis.annotate(str(number), (budget, accuracy), (5, 7), textcoords="offset points")
    budgets = sorted({budget for budget, _, _ in spots})
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axis.minorticks_off()
    axis.set(xlabel="thinking budget, tokens", ylabel="right by final answer, %", ylim=(0, 100))


def annotate_runs(axis, spots, near):
    """Numbers of runs to the right of their (x, y) spots; one spot has one label, and labels keep apart."""
    labels = {}
    for x, y, number in sorted(spots):
        same = (spot for spot in labels if abs(spot[0] - x) < near and abs(spot[1] - y) < 1)
        labels.setdefault(next(same, (x, y)), []).append(number)
    placed = []
    for (x, y), numbers in sorted(labels.items(), key=lambda label: label[0][1]):
        height = max([y] + [other + 7 for at, other in placed if abs(at - x) < 4 * near])
        placed.append((x, height))
        axis.annotate(
            ", ".join(map(str, sorted(numbers))),
            (x, y),
            (x + near, height),
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999"},
        )


# ------------------------------------------------------------------------------------------
# Completions to train on
# ------------------------------------------------------------------------------------------


def keep_correct(runs, options):
    """Write the distinct right completions of the runs, of each question the shortest, in the order of ids.

    Only what the model wrote to its end by itself: a completion that was cut would teach it not to stop,
    one whose thought was closed for it to write what closed it.
    """
    for run in runs:
        refuse_test_split(run)
    right = {}
    for run in runs:
        system_prompt = read_record(run.path)["decides"].get("system_prompt")
        for row, _, status in read_again(run, options):
            if status == "right" and row.finish_reason != "length" and not row.forced:
                key = str(type(row.id)), row.id, row.question
                right.setdefault(key, {}).setdefault(row.text, (row, system_prompt))
    keys = (*PUBLISHED_KEYS, "mode", "sample", "thinking_open", "system_prompt")
    lines = []
    for _, completions in sorted(right.items()):
        for _, (row, system_prompt) in sorted(completions.items(), key=lambda item: (len(item[0]), item[0]))[: options.keep_most]:
            values = row.id, row.question, row.text, row.answer, row.mode, row.sample, row.thinking_open, system_prompt
            lines.append(json.dumps(dict(zip(keys, values, strict=True))) + "\n")
    try:
        write_atomically(options.keep_correct, "".join(lines))
    except OSError as error:
        raise UserError(f"--keep-correct {options.keep_correct}: cannot be written: {error.strerror}") from error
    print(f"{options.keep_correct}: {len(lines):,} right completions of {len(right):,} questions", file=sys.stderr)


def refuse_test_split(run):
    """Refuse what is not certain to hold no test question: by the run record, and by the questions themselves."""
    record = read_record(run.path)
    if record is None or record["decides"].get("split") != "train":
        raise UserError(
            f"--keep-correct: {run.path}: no run record beside it says --split train; test answers stay out"
        )
    dataset = str(record["segments"][-1].get("dataset"))
    test = {question.question.strip() for question in load_questions(dataset, "test")}
    if any(row.question.strip() in test for row in read_rows(run.path, [])):
        raise UserError(f"--keep-correct: {run.path}: holds questions of the test split of {dataset}")


# ------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------

PAGE_BYTES = 20_000_000  # of completions that go into a page whole; of more, a sample of the questions


def write_page(runs, published, comparisons, options):
    """One file for reading the answers in a browser, without network.

    What a model wrote reaches the page as JSON inside a script element and is shown as text nodes
    alone, and the template escapes all else. Where the files are too large, the same share of the
    questions is taken from each, chosen by a checksum of their text.
    """
    import jinja2

    share = min(1.0, PAGE_BYTES / max(1, sum(run.counts["bytes"] for run in runs)))
    questions = {}
    for place, run in enumerate(runs):
        for row, reading, status in read_again(run, options, share):
            key = row.id, row.question, row.answer
            empty = {"id": row.id, "question": row.question, "answer": row.answer, "outputs": [[] for _ in runs]}
            output = page_output(row, reading, status)
            questions.setdefault(key, empty)["outputs"][place].append(output)
    warning = ""
    if share < 1:
        kept, total = len(questions), max(run.questions for run in runs)
        warning = f"The files are large: this page holds a sample of {kept:,} of {total:,} questions."
        print(f"--html: {warning}", file=sys.stderr)
    environment = jinja2.Environment(autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    page = environment.from_string(PAGE).render(
        tables=[run_table(runs, published)] + ([comparison_table(comparisons)] if comparisons else []),
        words=WORDS,
        notes=list(notes(runs, comparisons)),
        warning=warning,
        colours=STATUS_COLOURS,
        data={
            "statuses": STATUSES,
            "runs": [run.name for run in runs],
            "questions": sorted(questions.values(), key=lambda question: (str(type(question["id"])), question["id"])),
        },
    )
    try:
        # Half of a surrogate pair is legal in JSON and cannot be written as UTF-8.
        write_atomically(options.html, SURROGATE.sub("\ufffd", page))
    except OSError as error:
        raise UserError(f"--html {options.html}: cannot be written: {error.strerror}") from error


SURROGATE = re.compile("[\ud800-\udfff]")


def page_output(row, reading, status):
    """One completion for the page: its text in four parts, thought, before, what was read, after."""
    close = row.text.rfind("</think>")
    answer = len(row.text) if status == "unfinished" else 0 if close < 0 else close + len("</think>")
    answer = len(row.text) - len(row.text[answer:].lstrip())  # blank lines go with the thought
    start, end = (max(answer, reading.start), reading.end) if reading.end else (len(row.text), len(row.text))
    return {
        "sample": row.sample,
        "status": STATUSES.index(status),
        "read": None if reading.number is None else str(reading.number),
        "tokens": row.output_tokens,
        "finish": row.finish_reason,
        "parts": [row.text[:answer], row.text[answer:start], row.text[start:end], row.text[end:]],
    }


PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>GSM8K answers</title>
<style>
:root { {% for status, colour in colours.items() %}--{{ status }}: {{ colour }}; {% endfor %} }
{% raw %}
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 0 16px; color: #1a1a1a; }
[hidden] { display: none !important; }
h1 { font-size: 20px; }
table { border-collapse: collapse; margin: 12px 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 3px 8px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th.words, td.words { text-align: left; }
ul.notes { font-size: 13px; padding-left: 18px; }
.warning, #error:not(:empty) { background: #fff3cd; border: 1px solid #d8b24a; padding: 8px 12px; }
#controls { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #888; padding: 8px 0; z-index: 1; }
#search { font: inherit; padding: 5px 8px; width: min(420px, 60%); }
#filters { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 2px 24px;
  margin-top: 6px; font-size: 13px; }
#filters div { display: flex; justify-content: space-between; }
#filters label { display: inline-flex; align-items: center; gap: 4px; overflow-wrap: anywhere; }
.hint { color: #666; font-size: 12px; }
.question { border-bottom: 1px solid #e5e5e5; content-visibility: auto; contain-intrinsic-size: auto 32px; }
.question > button { all: unset; box-sizing: border-box; display: flex; gap: 10px; width: 100%; padding: 5px 4px;
  cursor: pointer; align-items: center; }
.question > button:focus-visible { outline: 3px solid #0072B2; outline-offset: -3px; }
.question > button .id { color: #666; min-width: 44px; text-align: right; }
.question > button .asked { flex: 1; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.question.open { content-visibility: visible; background: #f6f8fa; }
.question.open > button .asked { white-space: normal; font-weight: 600; }
.chip { display: inline-block; box-sizing: border-box; min-width: 22px; height: 20px; line-height: 20px; padding: 0 4px;
  text-align: center; font-size: 12px; border-radius: 3px; color: #000; background: #eee; }
.chip.right { background: var(--right); color: #fff; }
.chip.wrong { background: var(--wrong); }
.chip.unfinished { background: var(--unfinished); }
.chip.no_answer { background: var(--no_answer); }
.chip.ambiguous { background: var(--ambiguous); }
.opened { padding: 4px 8px 16px; }
.outputs { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(340px, 1fr); gap: 12px; overflow-x: auto; }
.output { border: 1px solid #ccc; background: #fff; padding: 8px 10px; margin-bottom: 8px; }
.run { font-weight: 600; overflow-wrap: anywhere; }
.facts { font-size: 13px; color: #444; margin: 4px 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; font: 13px/1.45 ui-monospace, monospace;
  unicode-bidi: isolate; }
details > pre { color: #555; border-left: 3px solid #ccc; padding-left: 8px; }
mark { background: #ffe08a; }
</style>
{% endraw %}
</head>
<body>
<h1>GSM8K answers</h1>
<div id="error" role="alert"></div>
{% if warning %}<p class="warning">{{ warning }}</p>{% endif %}
{% for table in tables %}
<table>
<tr>{% for cell in table[0] %}<th{% if cell in words %} class="words"{% endif %}>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}
<tr>{% for cell in row %}<td{% if table[0][loop.index0] in words %} class="words"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
<div id="controls">
  <input id="search" type="search" placeholder="Search questions, answers and outputs" aria-label="Search">
  <span id="count" aria-live="polite"></span>
  <button id="reset" type="button">Reset</button>
  <span class="hint">/ search &middot; j, k next and previous question &middot; Esc close</span>
  <div id="filters"></div>
</div>
<main id="questions"></main>
<script type="application/json" id="data">{{ data|tojson }}</script>
{% raw %}
<script>
"use strict";
window.addEventListener("error", event => {
  document.getElementById("error").textContent = "This page has an error: " + event.message;
});

const { statuses, runs, questions } = JSON.parse(document.getElementById("data").textContent);
const MARKS = { right: "✓", wrong: "✗", unfinished: "…", no_answer: "∅", ambiguous: "?" };
const words = status => status.replace("_", " ");
const byId = id => document.getElementById(id);

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// The whole state of the view. It lives in the URL's fragment, so that a view can be shared.
let state;

function readState() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  const shown = fragment.get("show");
  state = {
    search: fragment.get("search") || "",
    filters: runs.map((_, run) => fragment.get("run" + run) || ""),
    shown: runs.map((_, run) => shown === null || shown.split(",").includes(String(run))),
    open: fragment.get("open"),
  };
}

function writeState() {
  const fragment = new URLSearchParams();
  if (state.search) fragment.set("search", state.search);
  state.filters.forEach((filter, run) => { if (filter) fragment.set("run" + run, filter); });
  if (state.shown.includes(false)) fragment.set("show", runs.map((_, run) => run).filter(run => state.shown[run]));
  if (state.open !== null) fragment.set("open", state.open);
  history.replaceState(null, "", "#" + fragment);
  render();
}

// A question passes a run's filter where any of its samples does.
function passes(outputs, filter) {
  if (filter === "not_right") return outputs.some(output => statuses[output.status] !== "right");
  return !filter || outputs.some(output => statuses[output.status] === filter);
}

const haystacks = new Map();
function haystack(question) {
  if (!haystacks.has(question)) {
    const texts = question.outputs.flat().map(output => output.parts.join(""));
    haystacks.set(question, [question.id, question.question, question.answer, ...texts].join("\n").toLowerCase());
  }
  return haystacks.get(question);
}

const rows = questions.map(question => {
  const chips = question.outputs.map((outputs, run) => {
    const right = outputs.filter(output => statuses[output.status] === "right").length;
    const status = !outputs.length ? "" : right * 2 > outputs.length ? "right" : statuses[outputs.find(
      output => statuses[output.status] !== "right").status];
    const label = outputs.length > 1 ? right + "/" + outputs.length : MARKS[status] || "-";
    const told = outputs.length > 1 ? right + " of " + outputs.length + " right" : words(status);
    return make("span", { className: "chip " + status, textContent: label, title: runs[run] + ": " + told });
  });
  const button = make("button", { type: "button" },
    make("span", { className: "id", textContent: question.id }),
    make("span", { className: "asked", textContent: question.question }), ...chips);
  const node = make("div", { className: "question" }, button);
  button.addEventListener("click", () => {
    state.open = state.open === String(question.id) ? null : String(question.id);
    writeState();
  });
  return { question, node, button, chips, opened: null };
});

function showOutput(output) {
  const status = statuses[output.status];
  const [thought, before, read, after] = output.parts;
  const facts = [output.read === null ? "nothing read" : "read " + output.read];
  if (output.tokens !== null) facts.push(output.tokens + " tokens");
  if (output.finish === "length") facts.push("cut at the limit");
  if (output.sample) facts.push("sample " + output.sample);
  const node = make("div", { className: "output" },
    make("div", { className: "facts" },
      make("span", { className: "chip " + status, textContent: MARKS[status] + " " + words(status) }),
      " " + facts.join(" · ")));
  if (thought) {
    const told = (status === "unfinished" ? "thought, never closed, " : "thought, ") + thought.length + " characters";
    node.append(make("details", {}, make("summary", { textContent: told }), make("pre", { textContent: thought })));
  }
  const text = make("pre", {}, before);
  if (read) text.append(make("mark", { textContent: read }));
  text.append(after);
  if (before || read || after) node.append(text);
  return node;
}

function openRow(row) {
  const columns = row.question.outputs.map((outputs, run) => state.shown[run] &&
    make("div", { className: "column" }, make("div", { className: "run", textContent: runs[run] }),
      ...outputs.map(showOutput), outputs.length ? "" : "not in this file")).filter(Boolean);
  row.opened = make("div", { className: "opened" },
    make("details", {}, make("summary", { textContent: "gold: " + row.question.answer.split("####").pop().trim() }),
      make("pre", { textContent: row.question.answer })),
    make("div", { className: "outputs" }, ...columns));
  row.node.append(row.opened);
}

function render() {
  const needle = state.search.toLowerCase();
  let count = 0;
  for (const row of rows) {
    const fits = row.question.outputs.every((outputs, run) => passes(outputs, state.filters[run])) &&
      (!needle || haystack(row.question).includes(needle));
    row.node.hidden = !fits;
    count += fits;
    const open = fits && state.open === String(row.question.id);
    if (row.opened) row.opened.remove();
    row.opened = null;
    row.node.classList.toggle("open", open);
    row.button.setAttribute("aria-expanded", open);
    row.chips.forEach((chip, run) => { chip.hidden = !state.shown[run]; });
    if (open) openRow(row);
  }
  byId("count").textContent = count.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " questions";
  if (byId("search").value !== state.search) byId("search").value = state.search;
  controls.forEach(({ show, filter }, run) => {
    show.checked = state.shown[run];
    filter.value = state.filters[run];
  });
}

const controls = runs.map((name, run) => {
  const show = make("input", { type: "checkbox", title: "show " + name });
  const filter = make("select", { title: "which answers of " + name });
  for (const value of ["", ...statuses, "not_right"])
    filter.append(make("option", { value, textContent: value ? words(value) : "any" }));
  show.addEventListener("change", () => { state.shown[run] = show.checked; writeState(); });
  filter.addEventListener("change", () => { state.filters[run] = filter.value; writeState(); });
  byId("filters").append(make("div", {}, make("label", {}, show, name), " ", filter));
  return { show, filter };
});

function move(step) {
  const visible = rows.filter(row => !row.node.hidden);
  const now = visible.findIndex(row => String(row.question.id) === state.open);
  const next = visible[now < 0 ? (step > 0 ? 0 : visible.length - 1) : now + step];
  if (!next) return;
  state.open = String(next.question.id);
  writeState();
  next.button.focus({ preventScroll: true });
  scrollToOpen();
}

function scrollToOpen() {
  const row = rows.find(row => row.opened);
  if (row) window.scrollBy(0, row.node.getBoundingClientRect().top - byId("controls").offsetHeight - 8);
}

let typing;
byId("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => { state.search = byId("search").value; writeState(); }, 120);
});
byId("reset").addEventListener("click", () => { history.replaceState(null, "", "#"); readState(); render(); });
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (document.activeElement === byId("search")) byId("search").blur();
    else { state.open = null; writeState(); }
  } else if (/^(INPUT|SELECT)$/.test(document.activeElement.tagName)) return;
  else if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
});
window.addEventListener("hashchange", () => { readState(); render(); scrollToOpen(); });

byId("questions").append(...rows.map(row => row.node));
readState();
render();
scrollToOpen();
</script>
{% endraw %}
</body>
</html>
"""


if __name__ == "__main__":
    main()
