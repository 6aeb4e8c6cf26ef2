"""What is shown of scored files: tables, notes, pictures, the page."""

import json
import re
import sys
from itertools import islice
from pathlib import Path

from common import UserError, printable, write_atomically
from reading import STATUSES
from scores import (
    accuracy_interval,
    count_votes,
    has_votes,
    made_by,
    mean_tokens,
    percent,
    read_again,
    read_record,
    think_budget,
    truncated,
)


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
        "ran_on": run.counts["ran_on"],
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
    header += ["ran on"] if any(run.counts["ran_on"] for run in runs) else []
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
        "ran on": f"{run.counts['ran_on']:,}",
        "forced": f"{run.counts['forced']:,}" if run.counts["forced_lines"] else None,
        "tokens": None if tokens is None else f"{tokens:,.0f}",
    }
    if "command" in header:
        cells |= made_by(run)
    return [cells[column] or "-" for column in header]


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
    if counts["ran_on"]:
        yield (
            f"{counts['ran_on']:,} texts ran on with a problem of their own after the answer, which counts alone: "
            "a base model wants a stop text"
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
        curves.setdefault(json.dumps(decides, sort_keys=True), []).append(
            (budget, accuracy, accuracy - low, high - accuracy)
        )
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
    page = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).render(
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
    answer = len(row.text) - len(row.text[reading.begin :].lstrip())  # blank lines go with the thought
    start, end = (max(answer, reading.start), reading.end) if reading.end else (len(row.text), len(row.text))
    return {
        "sample": row.sample,
        "status": STATUSES.index(status),
        "read": None if reading.number is None else str(reading.number),
        "tokens": row.output_tokens,
        "finish": row.finish_reason,
        "parts": [row.text[:answer], row.text[answer:start], row.text[start:end], row.text[end:]],
    }
