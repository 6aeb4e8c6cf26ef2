"""Scored files of answers: what was right, intervals, votes, comparison, published figures."""

import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import combinations
from math import comb, sqrt
from pathlib import Path
from statistics import NormalDist, mean, variance
from zlib import crc32

from answers import FORMAT, read_rows, same_text
from common import UserError, is_run_record, read_json
from reading import grade, opens_thought, read_final, read_lenient, score_published

Z95 = NormalDist().inv_cdf(0.975)


def was_prefilled(path, format):
    """Whether the prompts of a file that does not say so ended inside a thought.

    So it is where no line holds `thinking_open` and no text opens a thought, yet at least half of the
    texts hold `</think>`. Reads on only until a line speaks.
    """
    closed = count = 0
    for row in read_rows(path, format, [] if format.skip_bad else None):
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
    """What votes, clusters and comparisons need of every line: under 60 bytes a line, in the file's order."""

    questions: array = field(default_factory=lambda: array("q"))  # hashes of id, question and answer
    texts: array = field(default_factory=lambda: array("q"))  # hashes of the question alone, as other files hold it
    golds: array = field(default_factory=lambda: array("q"))  # hashes of the reference numbers
    clusters: array = field(default_factory=lambda: array("q"))  # hashes of the values of --cluster; else empty
    samples: array = field(default_factory=lambda: array("i"))
    right: bytearray = field(default_factory=bytearray)
    lenient: bytearray = field(default_factory=bytearray)
    published: bytearray = field(default_factory=bytearray)
    answers: array = field(default_factory=lambda: array("q"))  # the numbers that were read, by `as_vote`
    others: dict = field(default_factory=dict)  # each number that `as_vote` cannot hold itself, and its place


NO_VOTE = -(2**63)
OTHER_NUMBERS = 2**62


def as_vote(number, others):
    """An exact number in 64 bits: itself where it is whole and small, else its place among `others`, which it joins."""
    if number is None:
        return NO_VOTE
    if number.denominator == 1 and abs(number) < OTHER_NUMBERS:
        return int(number)
    return OTHER_NUMBERS + others.setdefault(number, len(others))


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
    lengths: tuple = ()  # lines of each path

    @property
    def path(self):
        return self.paths[0]

    @property
    def n(self):
        return self.counts["lines"]

    @property
    def several(self):
        return self.questions < self.n


SEED = re.compile(r"-seed[0-9]+$")


def name_runs(runs):
    """Runs of the same file name in several folders go by their paths, and so do other seeds of them."""
    names = Counter(run.name for run in runs)
    repeated = {SEED.sub("", name) for name, count in names.items() if count > 1}
    for run in runs:
        if SEED.sub("", run.name) in repeated:
            run.name = str(bare(run.path))
    return runs


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
    for name in ("questions", "texts", "golds", "clusters", "samples", "right", "lenient", "published"):
        setattr(rows, name, getattr(first.rows, name) + getattr(second.rows, name))
    for old in (first.rows, second.rows):
        others = list(old.others)
        rows.answers.extend(
            as_vote(others[answer - OTHER_NUMBERS], rows.others) if answer >= OTHER_NUMBERS else answer
            for answer in old.answers
        )
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
        first.lengths + second.lengths,
    )


def score_run(path, format=FORMAT, keep=False):
    """Score a file: as a stream where it is in order with one sample a question, else with its rows kept.

    `keep`: with its rows in any case, as comparing and pooling need them.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a plain file, and files are read more than once; write it to one first")
    prefilled = not format.thinking and was_prefilled(path, format)
    run = None if keep or format.cluster else score_rows(path, format, prefilled, keep=False)
    run = run or score_rows(path, format, prefilled, keep=True)
    if not run.n and run.counts["no_gold"]:
        raise UserError(f"{path}: --gold holds none of its {run.counts['no_gold']:,} questions")
    if not run.n:
        raise UserError(f"{path}: holds no line to score")
    return run


def score_rows(path, format, prefilled, keep):
    """The Run of a file; None where it needs `keep`, because an id does not exceed the one before."""
    counts, bad, rows, previous = Counter(), [], Rows(), None
    for row in read_rows(path, format, bad if format.skip_bad else None):
        if row.gold is None:
            counts["no_gold"] += 1
            continue
        if not keep:
            if type(row.id) is not int or (previous is not None and row.id <= previous):
                return None
            previous = row.id
        thinking, cut = thought(row, prefilled, format.thinking), row.finish_reason == "length"
        reading = read_final(row.text, thinking)
        status = grade(reading, row.gold)
        lenient = grade(read_lenient(row.text, thinking, cut, reading), row.gold) == "right"
        counts["lines"] += 1
        counts["lenient"] += lenient
        counts["bytes"] += len(row.text) if row.text.isascii() else len(row.text.encode("utf-8", "replace"))
        counts["question_bytes"] += len(row.question) + len(row.answer)
        counts[status] += 1
        counts["ran_on"] += reading.ran_on
        marked = "####" in row.answer  # what the published rule reads of a reference
        published = marked and score_published(row.text, row.answer)
        counts["without_marker"] += not marked
        counts["published"] += published
        if row.finish_reason is not None:
            counts["finish_reason"] += 1
            counts["truncated"] += row.finish_reason == "length"
            counts["prompt_too_long"] += row.finish_reason == "prompt_too_long"
        if row.output_tokens is not None:
            counts["output_tokens_lines"] += 1
            counts["output_tokens"] += row.output_tokens
        if row.forced is not None:
            counts["forced_lines"] += 1
            counts["forced"] += row.forced
        if status == "right":
            counts["worked"] += "=" in row.text[reading.start : reading.end]
            whole = not cut and not reading.ran_on
            counts["off_format"] += whole and not ASKED_FORMAT.search(row.text, max(0, len(row.text) - 80))
        elif status == "unfinished":
            counts["unfinished_published"] += published
        elif status == "no_answer":
            counts["no_answer_right"] += lenient
        if keep:
            rows.questions.append(hash_text(f"{row.id!r}\0{row.question}\0{row.answer}"))
            rows.texts.append(hash_text(same_text(row.question)))
            rows.golds.append(hash_text(repr(row.gold)))
            if format.cluster:
                rows.clusters.append(hash_text(row.cluster))
            rows.samples.append(row.sample)
            rows.right.append(status == "right")
            rows.lenient.append(lenient)
            rows.published.append(published)
            rows.answers.append(as_vote(reading.number, rows.others))
    questions = count_questions(path, rows) if keep else counts["lines"]
    kept = rows if keep else None
    return Run((path,), bare(path).name, questions, counts, len(bad), prefilled, kept, (counts["lines"],))


def hash_text(text):
    """64 bits of a text, the same in every process: sums go in the order of hashes, and must round alike."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)


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


def can_be_read(run, reading):
    """Whether a reading can be applied: the published rule needs references with `####`."""
    return reading != "published" or not run.counts["without_marker"]


def accuracy_interval(run, reading):
    """The 95 % interval in percent of a run's accuracy by a reading, "right", "lenient" or "published"."""
    share = percent(run.counts[reading], run.n)
    if run.rows and (run.several or run.rows.clusters):
        right = bits(getattr(run.rows, reading))
        low, high = (percent(bound, 1) for bound in clustered(right, run.rows.clusters or run.rows.questions))
    else:
        low, high = wilson(run.counts[reading], run.n)
    return min(low, share), max(high, share)  # where all are right rounding would leave the share outside


def bits(flags):
    """A bytearray of 0 and 1 as an array of numbers."""
    import numpy

    return numpy.frombuffer(flags, dtype=numpy.uint8)


def wilson(right, n):
    """Wilson's 95 % interval of a share, in percent."""
    share, z2 = right / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 100 * min(share, max(0.0, middle - half)), 100 * max(share, min(1.0, middle + half))  # but for rounding


def clustered(right, clusters):
    """The 95 % interval of the share of 1 among `right`, whose errors are correlated inside a cluster.

    Student's t with one degree less than clusters; one cluster says nothing: 0 to 1. Where all are 1, or none,
    no spread can be seen: the interval is Wilson's, for as many answers as there are clusters.
    """
    share, error, count = clustered_mean(right, clusters)
    if count < 2:
        return 0.0, 1.0
    if share in (0, 1):
        low, high = wilson(share * count, count)
        return low / 100, high / 100
    half = t95(count - 1) * error
    return max(0.0, share - half), min(1.0, share + half)


def clustered_mean(values, clusters):
    """The mean, its cluster-robust standard error, and the number of clusters.

    With the G / (G - 1) correction (Miller, "Adding Error Bars to Evals", 2024, section 2.2). Where `clusters` is
    None each value is its own, and it is the plain standard error of a mean.
    """
    import numpy

    middle = float(values.mean())
    residuals = values - middle
    if clusters is not None:
        _, cluster = numpy.unique(numpy.asarray(clusters), return_inverse=True)
        residuals = numpy.bincount(cluster, residuals)
    count = len(residuals)
    return middle, sqrt(count / max(1, count - 1) * (residuals**2).sum()) / len(values), count


def t95(degrees):
    """The 97.5 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def seed_interval(shares):
    """The 95 % interval of the mean share, in percent, of several seeds: Student's t. None for a single seed."""
    if len(shares) < 2:
        return None
    middle, squared, degrees = mean_of_seeds(shares)
    half = t95(degrees) * sqrt(squared)
    return max(0.0, middle - half), min(100.0, middle + half)


def seed_shares(run, kept=None):
    """The share of right lines of each seed that was pooled, in percent; of the lines `kept`, a mask, where given."""
    import numpy

    right = bits(run.rows.right)
    kept = numpy.ones(len(right), bool) if kept is None else kept
    ends = numpy.cumsum(run.lengths)
    return [
        percent(float(right[end - length : end][kept[end - length : end]].mean()), 1)
        for end, length in zip(ends, run.lengths, strict=True)
    ]


@dataclass(frozen=True)
class Votes:
    """What several samples a question give, for k = 1 … K, in percent. K: the fewest samples of a question."""

    pass_at: list  # the unbiased estimate, from all samples
    majority_at: list  # the vote of the first k samples
    majority_interval: tuple  # of the last vote: 95 %, bootstrap over questions; with --cluster over clusters
    ties: int  # questions whose last vote was tied


def count_votes(run):
    """The Votes of a run with several samples a question.

    pass@k is 1 - C(n - c, k) / C(n, k) for c right of n samples, averaged over questions (Chen et
    al., "Evaluating Large Language Models Trained on Code", 2021). In the vote only answers that
    could be read have a voice; of tied answers the one given first wins.
    """
    import numpy

    by_question = {}
    for index, question in enumerate(run.rows.questions):
        by_question.setdefault(question, []).append(index)
    most = min(map(len, by_question.values()))
    drawn, majority_right, ties, last_right = Counter(), [0] * most, 0, []
    for lines in by_question.values():
        lines.sort(key=run.rows.samples.__getitem__)
        right = [run.rows.answers[line] for line in lines if run.rows.right[line]]
        drawn[len(lines), len(right)] += 1
        winners, tied = vote([run.rows.answers[line] for line in lines[:most]])
        for k, winner in enumerate(winners):
            majority_right[k] += winner in right  # several numbers can meet a reference with a fraction part
        ties += tied
        last_right.append(winners[-1] in right)
    questions = len(by_question)
    pass_at = [
        percent(sum(many * (1 - comb(n - c, k) / comb(n, k)) for (n, c), many in drawn.items()), questions)
        for k in range(1, most + 1)
    ]
    if run.rows.clusters:
        clusters = [run.rows.clusters[lines[0]] for lines in by_question.values()]
        interval = tuple(percent(bound, 1) for bound in clustered(numpy.array(last_right, float), clusters))
    else:
        interval = bootstrap_interval(majority_right[-1], questions)
    return Votes(pass_at, [percent(right, questions) for right in majority_right], interval, ties)


def bootstrap_interval(right, n):
    """The 95 % bootstrap interval of a share, in percent: resampling right and wrong is a binomial draw.

    Where all are right, or none, every draw is alike: the interval is Wilson's.
    """
    from scipy.stats import binom

    if right in (0, n):
        return wilson(right, n)
    low, high = binom.ppf([0.025, 0.975], n, right / n)
    return percent(float(low), n), percent(float(high), n)


def vote(answers):
    """The winner after each answer (NO_VOTE: nothing read yet), and whether the last vote is tied."""
    counts, winners = Counter(), []
    for answer in answers:
        if answer != NO_VOTE:
            counts[answer] += 1
        winners.append(max(counts, key=counts.get, default=NO_VOTE))  # of the tied: the first given
    return winners, list(counts.values()).count(max(counts.values(), default=0)) > 1


READINGS = {"right": "final answer", "lenient": "lenient", "published": "published rule"}


@dataclass
class Comparison:
    """Two runs over the questions that both hold: accuracies, difference and interval in percentage points."""

    first: str
    second: str
    questions: int
    left_out: int  # questions that only one of the two holds
    other_golds: int  # questions that the two were scored against different reference numbers
    accuracies: tuple
    difference: float  # first - second
    interval: tuple  # 95 %, of the paired difference
    interval_seeds: tuple | None  # 95 %, over the seeds of --pool-seeds
    by_reading: dict  # the difference and its interval by each of READINGS; None where one cannot be applied
    first_only: int  # questions where the first run is right and the second is not, or right more often
    second_only: int
    test: str
    p: float
    p_holm: float = 1.0

    @property
    def shown(self):
        """Whether a difference is shown: by the test, and where seeds were pooled by their interval too."""
        low, high = self.interval_seeds or (1, 1)
        return self.p_holm < 0.05 and (low > 0 or high < 0)


def compare_runs(runs):
    """A Comparison for every two runs; UserError where two hold no question in common."""
    by_text = [questions_by_text(run) for run in runs]
    comparisons = [
        compare(a, b, *questions)
        for (a, b), questions in zip(combinations(runs, 2), combinations(by_text, 2), strict=True)
    ]
    # Holm (1979): the i-th smallest of m p-values times m - i, never below the one before it.
    least = 0.0
    for i, comparison in enumerate(sorted(comparisons, key=lambda comparison: comparison.p)):
        least = comparison.p_holm = max(least, min(1.0, (len(comparisons) - i) * comparison.p))
    return comparisons


@dataclass
class Questions:
    """A run's questions, in the order of the hashes of their texts."""

    texts: object  # arrays, one value a question
    golds: object
    clusters: object  # None: each question is its own
    shares: dict  # of right samples, by each of READINGS


def questions_by_text(run):
    import numpy

    texts, first, line = numpy.unique(numpy.asarray(run.rows.texts), return_index=True, return_inverse=True)
    samples = numpy.bincount(line)
    shares = {reading: numpy.bincount(line, bits(getattr(run.rows, reading))) / samples for reading in READINGS}
    clusters = numpy.asarray(run.rows.clusters)[first] if run.rows.clusters else None
    return Questions(texts, numpy.asarray(run.rows.golds)[first], clusters, shares)


def compare(a, b, questions_a, questions_b):
    """One value a question, so samples of a question are never taken for independent.

    The interval is Student's for the mean paired difference, with --cluster over clusters. With one sample a
    question and no clusters p is McNemar's exact test on the discordant pairs; else it goes with the interval.
    """
    import numpy

    shared, in_a, in_b = numpy.intersect1d(
        questions_a.texts, questions_b.texts, assume_unique=True, return_indices=True
    )
    if not len(shared):
        raise UserError(f"--compare: {a.path} and {b.path} hold no question in common, by its text")
    shares = {reading: (questions_a.shares[reading][in_a], questions_b.shares[reading][in_b]) for reading in READINGS}
    clusters = None if questions_a.clusters is None else questions_a.clusters[in_a]
    by_reading = {reading: paired_difference(x - y, clusters) for reading, (x, y) in shares.items()}
    difference, interval, p = by_reading["right"]
    means_a, means_b = shares["right"]
    first_only, second_only = int((means_a > means_b).sum()), int((means_a < means_b).sum())
    test = "clustered t-test" if a.rows.clusters else "paired t-test"
    if not (a.several or b.several or a.rows.clusters):
        test, p = "exact McNemar", mcnemar(first_only, second_only)
    return Comparison(
        a.name,
        b.name,
        len(shared),
        len(questions_a.texts) + len(questions_b.texts) - 2 * len(shared),
        int((questions_a.golds[in_a] != questions_b.golds[in_b]).sum()),
        (percent(float(means_a.mean()), 1), percent(float(means_b.mean()), 1)),
        difference,
        interval,
        difference_over_seeds(a, b, shared),
        {
            reading: found[:2] if can_be_read(a, reading) and can_be_read(b, reading) else None
            for reading, found in by_reading.items()
        },
        first_only,
        second_only,
        test,
        p,
    )


def mcnemar(first_only, second_only):
    """The p-value of McNemar's exact test."""
    from scipy.stats import binomtest

    discordant = first_only + second_only
    return float(binomtest(first_only, discordant).pvalue) if discordant else 1.0


def paired_difference(differences, clusters):
    """The mean of one difference a question, its 95 % interval (both in points), and p: Student's t over clusters."""
    from scipy.special import stdtr

    middle, error, count = clustered_mean(differences, clusters)
    if count < 2:
        low, high, p = -1.0, 1.0, 1.0
    elif error:
        half = t95(count - 1) * error
        low, high, p = middle - half, middle + half, 2 * float(stdtr(count - 1, -abs(middle) / error))
    else:  # every question differs alike
        low, high, p = middle, middle, 0.0 if middle else 1.0
    return percent(middle, 1), (percent(low, 1), percent(high, 1)), p


def difference_over_seeds(a, b, shared):
    """The 95 % interval, in points, of the difference over the seeds that were pooled; None where none were.

    Of one pooled run Student's t over its seeds; of two Welch's, for the seeds of two trainings are no pairs.
    """
    import numpy

    if len(a.paths) == len(b.paths) == 1:
        return None
    samples = [seed_shares(run, numpy.isin(numpy.asarray(run.rows.texts), shared)) for run in (a, b)]
    (mean_a, error_a, degrees_a), (mean_b, error_b, degrees_b) = map(mean_of_seeds, samples)
    squared = error_a + error_b
    if not squared:
        return (mean_a - mean_b,) * 2
    degrees = squared**2 / (error_a**2 / max(1, degrees_a) + error_b**2 / max(1, degrees_b))
    half = t95(degrees) * sqrt(squared)
    return mean_a - mean_b - half, mean_a - mean_b + half


def mean_of_seeds(shares):
    """The mean, its squared standard error and degrees of freedom; a single seed counts as without error."""
    if len(shares) == 1:
        return shares[0], 0.0, 0
    return mean(shares), variance(shares) / len(shares), len(shares) - 1


PUBLISHED_FILE = Path(__file__).parent / "results" / "published.json"


@dataclass(frozen=True)
class Published:
    """A published row beside a run: its figure in percent, and how the run's protocol compares."""

    accuracy: float
    source: str  # "readme", or "file" where the figure is recomputed from the published output
    inside: bool | None  # the figure lies in the run's interval by the published rule; None: not comparable
    protocol: str


def published_names():
    """The names of the published rows, which are those of their files without .jsonl."""
    return list(json.loads(PUBLISHED_FILE.read_bytes())["rows"])


def load_published(runs):
    """The Published of each run whose name is that of a published row, by run name."""
    known = json.loads(PUBLISHED_FILE.read_bytes())
    found = {}
    for run in runs:
        row = known["rows"].get(bare(run.path).name)
        if row:
            source = "file" if row["published"] is None else "readme"
            accuracy = row["file"] if row["published"] is None else row["published"]
            low, high = accuracy_interval(run, "published")
            protocol = compare_protocol(run, row, known["dataset_sha256"])
            inside = None if protocol.startswith("other") else low <= accuracy <= high
            found[run.name] = Published(accuracy, source, inside, protocol)
    return found


PUBLISHER = "AnirudhCheruvu"  # of the fine-tuned checkpoints on the hub
DATA = {"max_steps": None, "completions": None, "strip_annotations": False}  # of every published training


def compare_protocol(run, row, dataset_sha256):
    """In words, how a run was made beside a published row: other questions, another protocol, or the same.

    The protocol is the model, its training where it was fine-tuned, dtype, prompt mode and decoding. A fine-tuned
    model is the published one where it is the publisher's checkpoint, or where its training record agrees.
    """
    record = read_record(run.path)
    if record is None:
        return "no run record"
    made, model = record["decides"], str(record["segments"][-1].get("model"))
    if made.get("dataset_sha256") != dataset_sha256:
        return "other questions"
    wanted, training = row["protocol"], row.get("training")
    differing = differences(wanted, made | {"model": wanted.get("model") if training else Path(model).name})
    trained = read_training(run.path, record)
    if trained and not training:
        differing.append(f"model {Path(model).name} is fine-tuned")
    elif training and model != f"{PUBLISHER}/{training['name']}":
        if trained is None:
            differing.append(f"model {Path(model).name} without a training record, not {training['name']}")
        else:
            base = Path(str(trained["segments"][-1].get("model"))).name
            flags = DATA | {"rank": None} | training | {"model": wanted.get("model")}
            flags.pop("name")
            differing += [f"training: {told}" for told in differences(flags, trained["decides"] | {"model": base})]
    return "other protocol: " + ", ".join(differing) if differing else "same protocol, our wording"


def differences(wanted, made):
    return [f"{key} {made.get(key)}, not {value}" for key, value in wanted.items() if made.get(key) != value]


def read_training(path, record):
    """The record of the training that made a run's model: in the run record, else under train/ beside the answers."""
    trained = record["segments"][-1].get("training")
    if isinstance(trained, dict) and is_run_record(trained):
        return trained
    name = Path(str(record["segments"][-1].get("model"))).name
    return read_record(Path(path).parent / "train" / name)


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


def read_again(run, format, share=1.0):
    """(Row, Reading, status) of a share of the questions once more, for what shows texts: a Run keeps none."""
    for row in read_rows(run.path, format, [] if format.skip_bad else None):
        if row.gold is None:
            continue
        if share < 1 and crc32(row.question.encode("utf-8", "surrogatepass")) >= share * 2**32:
            continue
        reading = read_final(row.text, thought(row, run.prefilled, format.thinking))
        yield row, reading, grade(reading, row.gold)


def has_votes(run):
    return run.several and len(run.paths) == 1


def think_budget(run):
    """The --think-budget that a run was made with, by its record; None without one."""
    record = read_record(run.path)
    return record and record["decides"].get("think_budget")


def made_from(runs):
    """In words, the models and data sets of runs, as their records say."""
    models, data, tuned = {}, {}, False
    for path in (path for run in runs for path in run.paths):
        record = read_record(path)
        if record is None:
            continue
        segment, trained = record["segments"][-1], read_training(path, record)
        tuned = tuned or trained is not None
        models[shown_name((trained or record)["segments"][-1].get("model"))] = None
        data[shown_name(segment.get("dataset"))] = None
    if not models:
        return "model and data set not recorded"
    return f"{listed(models)}{', as it is and fine-tuned,' if tuned else ''} on {listed(data)}"


def shown_name(name):
    """A hub id or a short relative path as it is, of any other path the last name: it says nothing elsewhere."""
    name = str(name).rstrip("/\\")
    return name if re.fullmatch(r"[^/\\]+(/[^/\\]+)?", name) else re.split(r"[/\\]", name)[-1]


def listed(names):
    """The first three names, and how many more."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
