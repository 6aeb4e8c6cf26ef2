"""Pictures of scored files: accuracies, what became of the answers, paired differences, votes and budgets."""

import json
import re

from common import UserError, one_line
from reading import STATUSES
from scores import (
    accuracy_interval,
    count_votes,
    has_votes,
    made_from,
    mean_tokens,
    percent,
    read_record,
    think_budget,
)

# Okabe and Ito's palette, told apart by people with any colour vision; the order is that of STATUSES.
STATUS_COLOURS = dict(zip(STATUSES, ("#0072B2", "#D55E00", "#999999", "#F0E442", "#CC79A7"), strict=True))
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
VOTE, PUBLISHED, SEEDS = "#56B4E9", "#BBBBBB", "#D55E00"
MOST_PAIRS = 12  # drawn; of more, those with the first run


def plot(runs, published, comparisons, path):
    """Draw the picture of --plot: panels for what the runs hold. UserError where it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = sum(len(bars_of(run, published)) for run in runs)
    panels = {(draw_accuracies, draw_statuses): 1.3 + 0.22 * bars + 0.14 * len(runs)}  # heights in inches
    pairs = drawn_pairs(comparisons)
    if pairs:
        panels[draw_differences, draw_differences] = 1.1 + 0.36 * len(pairs)
    below = [draw_votes] if any(has_votes(run) for run in runs) else []
    below += [draw_budgets] if sum(think_budget(run) is not None for run in runs) > 1 else []
    if below:
        panels[below[0], below[-1]] = 3.4
    heights = list(panels.values())
    figure, axes = pyplot.subplot_mosaic(
        list(map(list, panels)),
        figsize=(9, sum(heights) + 0.4),  # README shows it in about 850 pixels
        height_ratios=heights,
        width_ratios=[5, 4],
        layout="constrained",
    )
    figure.suptitle(label(made_from(runs)), fontsize=12)
    for draw, axis in axes.items():
        axis.spines[["top", "right"]].set_visible(False)
        if draw is draw_differences:
            draw(axis, pairs, len(comparisons))
        else:
            draw(axis, runs, published)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def label(text):
    """Text for a picture: `$` starts no formula."""
    return one_line(text).replace("$", r"\$")


def wrap_name(name, width=26):
    """The name on lines of about so many characters, broken after `-` and `_`."""
    lines = [""]
    for piece in re.findall(r"[^-_]*[-_]?", label(name)):
        if len(lines[-1]) + len(piece) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def bars_of(run, published):
    """(legend, colour, accuracy, interval or None, remark) of each bar that a run gets."""
    votes = count_votes(run) if has_votes(run) else None
    accuracy = percent(run.counts["right"], run.n), accuracy_interval(run, "right")
    if votes:
        k = len(votes.majority_at)
        bars = [("vote of all samples", VOTE, votes.majority_at[-1], votes.majority_interval, f"maj@{k}")]
        bars.append(("final answer", STATUS_COLOURS["right"], *accuracy, f"mean of {k}"))
    else:
        bars = [("final answer", STATUS_COLOURS["right"], *accuracy, "")]
    row = published.get(run.name)
    if row and row.inside is not None:
        bars.append(("published, by its own rule", PUBLISHED, row.accuracy, None, "published"))
    return bars


def draw_accuracies(axis, runs, published):
    place, ticks, seen = 0.0, [], set()
    for run in runs:
        bars = bars_of(run, published)
        ticks.append(place + (len(bars) - 1) / 2)
        for legend, colour, value, interval, remark in bars:
            axis.barh(place, value, 0.8, color=colour, label=None if legend in seen else legend)
            seen.add(legend)
            if interval:
                error = [[value - interval[0]], [interval[1] - value]]
                axis.errorbar(value, place, xerr=error, color="black", capsize=2.5, linewidth=1)
            axis.text(102, place, f"{value:.1f}  {remark}".rstrip(), va="center", fontsize=9)
            place += 1
        place += 0.6
    axis.set(xlim=(0, 100), xticks=range(0, 101, 20), xlabel="right, %, with 95 % interval")
    axis.set_yticks(ticks, [wrap_name(run.name) for run in runs], fontsize=9)
    axis.set_ylim(place - 1.1, -0.5)
    if len(seen) > 1:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9)


def draw_statuses(axis, runs, published):
    """What became of the answers, in line with the accuracies; statuses that no run has are left out."""
    place, places, heights = 0.0, [], []
    for run in runs:
        count = len(bars_of(run, published))
        places.append(place + (count - 1) / 2)
        heights.append(count - 0.2)
        place += count + 0.6
    left = [0.0] * len(runs)
    for status, colour in STATUS_COLOURS.items():
        shares = [percent(run.counts[status], run.n) for run in runs]
        if any(shares):
            style = {"color": colour, "edgecolor": "white", "linewidth": 0.5, "label": status.replace("_", " ")}
            axis.barh(places, shares, left=left, height=heights, **style)
            left = [start + share for start, share in zip(left, shares, strict=True)]
    for place_of_run, run in zip(places, runs, strict=True):
        tokens = mean_tokens(run)
        axis.text(102, place_of_run, "" if tokens is None else f"{tokens:,.0f} tokens", va="center", fontsize=9)
    axis.set(xlim=(0, 100), xticks=range(0, 101, 20), xlabel="answers, %", yticks=[])
    axis.set_ylim(place - 1.1, -0.5)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)


def drawn_pairs(comparisons):
    """All comparisons, or where they are many those with the first run."""
    if len(comparisons) <= MOST_PAIRS:
        return comparisons
    return [pair for pair in comparisons if pair.first == comparisons[0].first][:MOST_PAIRS]


def draw_differences(axis, pairs, count):
    """Paired differences with intervals, the second run less the first, so that what improves lies to the right."""
    ends = [-0.5, 0.5]
    for place, pair in enumerate(pairs):
        found = [(pair.interval, "black", 0.0, 5)]
        found += [(pair.interval_seeds, SEEDS, 0.28, 0)] if pair.interval_seeds else []
        for (low, high), colour, below, marker in found:
            axis.plot([-high, -low], [place + below] * 2, color=colour, linewidth=1.6, solid_capstyle="butt")
            filled = colour if pair.shown else "white"
            axis.plot(-pair.difference, place + below, "o", ms=marker, color=colour, markerfacecolor=filled)
            ends += [-high, -low]
        value, low, high = (signed(-bound) for bound in (pair.difference, pair.interval[1], pair.interval[0]))
        told = f"{value} [{low}, {high}]"
        axis.annotate(told, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.axvline(0, color="#999999", linewidth=1)
    room = 0.04 * (max(ends) - min(ends))
    axis.set(xlim=(min(ends) - room, max(ends) + room))
    drawn = f" ({len(pairs)} of {count} pairs)" if len(pairs) < count else ""
    told = f"difference in points over the same questions, with 95 % interval{drawn}"
    axis.set_xlabel(f"{told}\nfilled where it is shown: p < 0.05 by Holm, and over seeds where there are several")
    names = [f"{wrap_name(pair.second, 40)} − {wrap_name(pair.first, 40)}" for pair in pairs]
    axis.set_yticks(range(len(pairs)), names, fontsize=9)
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    if any(pair.interval_seeds for pair in pairs):
        axis.plot([], [], "-", color="black", label="over questions")
        axis.plot([], [], "-", color=SEEDS, label="over seeds")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)


def signed(points):
    """A difference with its sign, to a tenth; what rounds to 0 has none."""
    return f"{points:+.1f}".replace("-", "−") if abs(points) >= 0.05 else "0.0"


def draw_votes(axis, runs, _):
    """pass@k and maj@k over k for the runs with several samples."""
    voting, most = [run for run in runs if has_votes(run)], 1
    for place, run in enumerate(voting):
        votes, colour = count_votes(run), LINE_COLOURS[place % len(LINE_COLOURS)]
        for shares, style, name in ((votes.pass_at, "--", None), (votes.majority_at, "-", wrap_name(run.name))):
            axis.plot(range(1, len(shares) + 1), shares, style, marker=".", color=colour, label=name)
            most = max(most, len(shares))
    axis.set(xlabel="samples, k: pass@k dashed, maj@k solid", ylabel="right, %", ylim=(0, 100), xlim=(0.8, most + 0.2))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="lower right", frameon=False, fontsize=9)


OF_A_BUDGET = ("think_budget", "max_new_tokens")


def draw_budgets(axis, runs, _):
    """Accuracy against thinking budget; a line joins runs that differ in nothing else."""
    curves = {}
    for run in runs:
        budget = think_budget(run)
        if budget is None:
            continue
        decides = {key: value for key, value in read_record(run.path)["decides"].items() if key not in OF_A_BUDGET}
        accuracy, (low, high) = percent(run.counts["right"], run.n), accuracy_interval(run, "right")
        _, points = curves.setdefault(json.dumps(decides, sort_keys=True), (run.name, []))
        points.append((budget, accuracy, accuracy - low, high - accuracy))
    for place, (name, points) in enumerate(curves.values()):
        budgets, accuracies, *error = zip(*sorted(points), strict=True)
        style = {"color": LINE_COLOURS[place % len(LINE_COLOURS)], "ecolor": "black", "capsize": 3}
        axis.errorbar(budgets, accuracies, error, fmt="o-", label=wrap_name(name), **style)
    budgets = sorted({budget for _, points in curves.values() for budget, *_ in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axis.minorticks_off()
    axis.set(xlabel="thinking budget, tokens", ylabel="right by final answer, %", ylim=(0, 100))
    if len(curves) > 1:
        axis.legend(loc="lower right", frameon=False, fontsize=9)
