"""Score GSM8K completions: two readings of every answer, with intervals.

    python benchmark.py outputs/cot_model_outputs.jsonl outputs/thinking_model_outputs.jsonl
    python benchmark.py FILES --json          # one object a file, for programs

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
from array import array
from collections import Counter
from dataclasses import dataclass, field
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from common import (
    PUBLISHED_KEYS,
    STATUSES,
    ArgumentParser,
    UserError,
    command_line,
    grade,
    last_number,
    read_final,
    read_gold,
    read_jsonl,
    score_published,
)

Z95 = NormalDist().inv_cdf(0.975)


@command_line
def main(argv=None):
    options = parse(argv)
    runs = [score_run(path, options) for path in options.files]
    if options.json:
        print(json.dumps([summary(run) for run in runs], indent=2))
        return
    print_table(runs)
    for line in notes(runs):
        print(printable(line))


def parse(argv):
    parser = ArgumentParser(description="Score GSM8K completions: two readings of every answer, with intervals.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL files of completions")
    parser.add_argument("--json", action="store_true", help="print one JSON array, an object a file, and no table")
    parser.add_argument(
        "--thinking",
        choices=("yes", "no"),
        help="whether every completion began or may begin a thought; default: as lines and texts say",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="count lines that cannot be read, and score the rest"
    )
    return parser.parse_args(argv)


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
    thinking_open: bool | None
    finish_reason: str | None
    output_tokens: int | None


OPTIONAL_KEYS = {"sample": int, "thinking_open": bool, "finish_reason": str, "output_tokens": int}


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
            raise UserError(
                f"{key!r} must be {'a count' if kind is int else kind.__name__}, this is {value!r:.40}"
            )
    answer = row["ground_truth_answer"]
    return Row(
        row["id"],
        row["question"],
        row["model_output"],
        answer,
        read_gold(answer),
        row.get("sample") or 0,
        row.get("thinking_open"),
        row.get("finish_reason"),
        row.get("output_tokens"),
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


@dataclass
class Rows:
    """What votes and comparisons need of every line: under 30 bytes a line, in the file's order."""

    questions: array = field(default_factory=lambda: array("q"))  # hashes of id, question and answer
    samples: array = field(default_factory=lambda: array("i"))
    right: bytearray = field(default_factory=bytearray)
    published: bytearray = field(default_factory=bytearray)
    answers: array = field(default_factory=lambda: array("q"))  # equal numbers, equal entries; -1: none read


@dataclass
class Run:
    """One scored file. `rows` is None where the file was read as a stream."""

    path: Path
    name: str
    questions: int
    counts: Counter  # lines by status and by the other facts that `score_rows` counts
    skipped: int
    rows: Rows | None

    @property
    def n(self):
        return self.counts["lines"]

    @property
    def several(self):
        return self.questions < self.n


def score_run(path, options):
    """Score a file: as a stream where it is in order with one sample a question, else with its rows kept."""
    prefilled = not options.thinking and was_prefilled(path, options.skip_bad)
    run = score_rows(path, options, prefilled, keep=False) or score_rows(path, options, prefilled, keep=True)
    if not run.n:
        raise UserError(f"{path}: holds no line to score")
    return run


def score_rows(path, options, prefilled, keep):
    """The Run of a file; None where it needs `keep`, because an id does not exceed the one before."""
    counts, bad, rows, numbers, previous = Counter(), [], Rows(), {}, None
    for row in read_rows(path, bad if options.skip_bad else None):
        if not keep:
            if type(row.id) is not int or (previous is not None and row.id <= previous):
                return None
            previous = row.id
        reading = read_final(row.text, thought(row, prefilled, options.thinking))
        status = grade(reading, row.gold)
        counts["lines"] += 1
        counts[status] += 1
        published = score_published(row.text, row.answer)
        counts["published"] += published
        if row.finish_reason is not None:
            counts["finish_reason"] += 1
            counts["truncated"] += row.finish_reason == "length"
        if row.output_tokens is not None:
            counts["output_tokens_lines"] += 1
            counts["output_tokens"] += row.output_tokens
        if status == "no_answer":
            counts["no_answer_right"] += last_number(row.text.rpartition("</think>")[2]) == row.gold
        if keep:
            rows.questions.append(hash((row.id, row.question, row.answer)))
            rows.samples.append(row.sample)
            rows.right.append(status == "right")
            rows.published.append(published)
            rows.answers.append(-1 if reading.number is None else numbers.setdefault(reading.number, len(numbers)))
    questions = count_questions(path, rows) if keep else counts["lines"]
    return Run(path, path.name.removesuffix(".jsonl"), questions, counts, len(bad), rows if keep else None)


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
    if run.several:
        return clustered(run.rows.questions, getattr(run.rows, reading))
    return wilson(run.counts[reading], run.n)


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
        if answer >= 0:
            counts[answer] += 1
        winners.append(max(counts, key=counts.get, default=-1))  # of the tied: the first given
    return winners, list(counts.values()).count(max(counts.values(), default=0)) > 1


# ------------------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------------------


def truncated(run):
    """Lines that ran into the token limit; None where not every line says how it ended."""
    return run.counts["truncated"] if run.counts["finish_reason"] == run.n else None


def summary(run):
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
        "no_answer_right": run.counts["no_answer_right"],
        "output_tokens_mean": mean_tokens(run),
    }
    return facts | (vars(count_votes(run)) if run.several else {})


def mean_tokens(run):
    """Mean output tokens a line; None where not every line holds its count."""
    return run.counts["output_tokens"] / run.n if run.counts["output_tokens_lines"] == run.n else None


COLUMNS = (
    "file",
    "lines",
    "final answer %",
    "published rule %",
    "unfinished",
    "at limit",
    "no answer",
    "ambiguous",
)


def table_row(run):
    limit = truncated(run)
    return (
        run.name,
        f"{run.n:,}",
        with_interval(percent(run.counts["right"], run.n), accuracy_interval(run, "right")),
        with_interval(percent(run.counts["published"], run.n), accuracy_interval(run, "published")),
        *(f"{count:,}" if count is not None else "-" for count in (run.counts["unfinished"], limit)),
        *(f"{run.counts[status]:,}" for status in ("no_answer", "ambiguous")),
    )


def with_interval(value, interval):
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def print_table(runs):
    rows = [COLUMNS, *(tuple(printable(cell) for cell in table_row(run)) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


def notes(runs):
    """Lines for under the table, where a figure alone would mislead."""
    for run in runs:
        if run.skipped:
            yield f"{run.name}: {run.skipped:,} lines could not be read and are left out"
        if run.counts["no_answer_right"]:
            yield (
                f"{run.name}: {run.counts['no_answer_right']:,} of {run.counts['no_answer']:,} answers without `####` "
                "or box end in the right number: a matter of format, not of arithmetic"
            )
        if run.several:
            votes = count_votes(run)
            k = len(votes.pass_at)
            yield (
                f"{run.name}: {run.questions:,} questions, pass@{k} {votes.pass_at[-1]:.2f}, maj@{k} "
                f"{with_interval(votes.majority_at[-1], votes.majority_interval)}; "
                f"{votes.ties:,} tied votes went to the answer given first"
            )


def printable(text):
    """Text for the terminal: whatever could steer it, or cannot be encoded, is escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


if __name__ == "__main__":
    main()
