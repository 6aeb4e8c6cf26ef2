"""Files of answers: reading, intervals, votes, comparison, published figures."""

import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple
from zlib import crc32

from common import PUBLISHED_KEYS, UserError, is_run_record, read_json, read_jsonl
from reading import grade, last_number, opens_thought, read_final, read_gold, score_published

Z95 = NormalDist().inv_cdf(0.975)


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

    So it is where no line holds `thinking_open` and no text opens a thought, yet at least half of the
    texts hold `</think>`. Reads on only until a line speaks.
    """
    closed = count = 0
    for row in read_rows(path, [] if skip_bad else None):
        if row.thinking_open is not None or opens_thought(row.text):
            return False
        count += 1
        closed += "</think>" in row.text
    return count > 0 and 2 * closed >= count


def thought(row, prefilled, override=None):
    """Whether a thought was opened before or in the completion; `override` is --thinking."""
    if override:
        return override == "yes"
    return prefilled or bool(row.thinking_open) or opens_thought(row.text)


ASKED_FORMAT = re.compile(r"#### ?-?[0-9][0-9,]*(\.[0-9]+)?\s*\Z")


@dataclass
class Rows:
    """What votes and comparisons need of every line: under 30 bytes a line, in the file's order."""

    questions: array = field(default_factory=lambda: array("q"))  # hashes of id, question and answer
    samples: array = field(default_factory=lambda: array("i"))
    right: bytearray = field(default_factory=bytearray)
    published: bytearray = field(default_factory=bytearray)
    answers: array = field(default_factory=lambda: array("q"))  # places of the numbers in `numbers`; -1: none was read
    numbers: dict = field(default_factory=dict)  # each number that was read, and its place


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
    for name in ("questions", "samples", "right", "published"):
        setattr(rows, name, getattr(first.rows, name) + getattr(second.rows, name))
    rows.numbers = {number: place for place, number in enumerate({**first.rows.numbers, **second.rows.numbers})}
    for old in (first.rows, second.rows):
        places = [*(rows.numbers[number] for number in old.numbers), -1]  # a place of -1 finds the last, -1
        rows.answers.extend(places[answer] for answer in old.answers)
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
        counts["ran_on"] += reading.ran_on
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
            whole = row.finish_reason != "length" and not reading.ran_on
            counts["off_format"] += whole and not ASKED_FORMAT.search(row.text, max(0, len(row.text) - 80))
        elif status == "unfinished":
            counts["unfinished_published"] += published
        elif status == "no_answer":
            counts["no_answer_right"] += last_number(row.text.rpartition("</think>")[2]) == row.gold
        if keep:
            # The id as text: Python's hashes of -1 and -2 are the same.
            rows.questions.append(hash((repr(row.id), row.question, row.answer)))
            rows.samples.append(row.sample)
            rows.right.append(status == "right")
            rows.published.append(published)
            number = reading.number
            rows.answers.append(-1 if number is None else rows.numbers.setdefault(number, len(rows.numbers)))
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


def percent(part, whole):
    return 100 * part / whole


def accuracy_interval(run, reading):
    """The 95 % interval in percent of a run's accuracy by a reading, "right" or "published"."""
    share = percent(run.counts[reading], run.n)
    low, high = (
        clustered(run.rows.questions, getattr(run.rows, reading)) if run.several else wilson(run.counts[reading], run.n)
    )
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
            majority_right[k] += winner in right  # several numbers can meet a reference with a fraction part
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


def truncated(run):
    """Lines that ran into the token limit; None where not every line says how it ended."""
    return run.counts["truncated"] if run.counts["finish_reason"] == run.n else None


def mean_tokens(run):
    """Mean output tokens a line; None where not every line holds its count."""
    return run.counts["output_tokens"] / run.n if run.counts["output_tokens_lines"] == run.n else None


def made_by(run):
    """Wall time in seconds and command, as the run records say; of several seeds the first command and all times."""
    segments = [segment for path in run.paths for segment in (read_record(path) or {"segments": []})["segments"]]
    times = [segment.get("seconds") for segment in segments]
    whole = bool(times) and all(isinstance(seconds, (int, float)) for seconds in times)
    return {
        "seconds": f"{sum(times):,.1f}" if whole else None,
        "command": str(segments[0]["command"]) if segments and "command" in segments[0] else None,
    }


def read_again(run, options, share=1.0):
    """(Row, Reading, status) of a share of the questions once more, for what shows texts: a Run keeps none."""
    for row in read_rows(run.path, [] if options.skip_bad else None):
        if share < 1 and crc32(row.question.encode("utf-8", "surrogatepass")) >= share * 2**32:
            continue
        reading = read_final(row.text, thought(row, run.prefilled, options.thinking))
        yield row, reading, grade(reading, row.gold)


def has_votes(run):
    return run.several and len(run.paths) == 1


def think_budget(run):
    """The --think-budget that a run was made with, by its record; None without one."""
    record = read_record(run.path)
    return record and record["decides"].get("think_budget")
