"""What is shown of scored files: tables, notes, pictures, the page."""

import re
import sys
from itertools import islice
from pathlib import Path

from answers import read_harness, same_text
from common import UserError, one_line, plain_markdown, printable, write_atomically
from pictures import STATUS_COLOURS
from reading import STATUSES
from scores import (
    READINGS,
    accuracy_interval,
    can_be_read,
    count_votes,
    has_votes,
    made_by,
    made_from,
    mean_tokens,
    percent,
    read_again,
    read_record,
    seed_interval,
    seed_shares,
    shown_name,
    truncated,
)


def summary(run, published, comparisons):
    """What --json prints of a file: counts of lines, accuracies and intervals in percent."""
    by_rule = can_be_read(run, "published")
    facts = {
        "path": str(run.path),
        "n": run.n,
        "questions": run.questions,
        "skipped": run.skipped,
        "correct_published": run.counts["published"] if by_rule else None,
        "accuracy_published": percent(run.counts["published"], run.n) if by_rule else None,
        "interval_published": accuracy_interval(run, "published") if by_rule else None,
        "correct": run.counts["right"],
        "accuracy": percent(run.counts["right"], run.n),
        "interval": accuracy_interval(run, "right"),
        "correct_lenient": run.counts["lenient"],
        "accuracy_lenient": percent(run.counts["lenient"], run.n),
        "interval_lenient": accuracy_interval(run, "lenient"),
        **{status: run.counts[status] for status in STATUSES[1:]},
        "truncated": truncated(run),
        "prompt_too_long": run.counts["prompt_too_long"],
        "forced": run.counts["forced"] if run.counts["forced_lines"] else None,
        "ran_on": run.counts["ran_on"],
        "no_answer_right": run.counts["no_answer_right"],
        "output_tokens_mean": mean_tokens(run),
    }
    if len(run.paths) > 1:
        facts["paths"] = list(map(str, run.paths))
        facts["interval_seeds"] = seed_interval(seed_shares(run))
    elif run.several:
        facts |= vars(count_votes(run))
    if run.name in published:
        facts["published"] = vars(published[run.name])
    if run.counts["no_gold"]:
        facts["no_gold"] = run.counts["no_gold"]
    if run.rows and run.rows.clusters:
        facts["clusters"] = len(set(run.rows.clusters))
    pairs = [vars(comparison) for comparison in comparisons if comparison.first == run.name]
    return facts | ({"compared": pairs} if pairs else {})


def report(runs, published, comparisons, options):
    """The table of runs, that of comparisons, and notes, as text or as Markdown."""
    render, show, bullet = (render_markdown, plain_markdown, "- ") if options.markdown else (render_text, one_line, "")
    print(render(run_table(runs, published, options.commands)))
    if comparisons:
        print("\n" + render(comparison_table(comparisons)))
    lines = [bullet + note for note in notes(runs, comparisons, show)]
    if lines:
        print("\n" + "\n".join(lines))


NOT_READ = "–"  # a reading that cannot be applied to these references


def run_table(runs, published, commands=False):
    """Rows of cells, the first being the header."""
    header = ["file", "lines", *(f"{title} %" for title in READINGS.values())]
    header += ["over seeds"] if any(len(run.paths) > 1 for run in runs) else []
    header += ["maj@k %"] if any(has_votes(run) for run in runs) else []
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
        "over seeds": bounds(seed_interval(seed_shares(run))) if len(run.paths) > 1 else None,
        "maj@k %": votes_cell(run) if has_votes(run) else None,
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
    for reading, title in READINGS.items():
        share = percent(run.counts[reading], run.n)
        cells[f"{title} %"] = (
            with_interval(share, accuracy_interval(run, reading)) if can_be_read(run, reading) else NOT_READ
        )
    if "command" in header:
        cells |= made_by(run)
    return [cells[column] or "-" for column in header]


def votes_cell(run):
    votes = count_votes(run)
    return f"{with_interval(votes.majority_at[-1], votes.majority_interval)}, k = {len(votes.majority_at)}"


def comparison_table(comparisons):
    """Rows of cells: a difference and its interval by each reading; p is that of the final answer."""
    seeds = any(pair.interval_seeds for pair in comparisons)
    header = ["first", "second", "questions", *(f"{title}, points" for title in READINGS.values())]
    header += ["over seeds"] if seeds else []
    table = [[*header, "right in first only", "in second only", "p", "p (Holm)"]]
    for pair in comparisons:
        cells = [pair.first, pair.second, f"{pair.questions:,}"]
        found = [pair.by_reading[reading] for reading in READINGS]
        cells += [with_interval(*difference, "+") if difference else NOT_READ for difference in found]
        cells += [bounds(pair.interval_seeds, "+") if pair.interval_seeds else "-"] if seeds else []
        cells += [f"{pair.first_only:,}", f"{pair.second_only:,}", f"{pair.p:.2g}", f"{pair.p_holm:.2g}"]
        table.append(cells)
    return table


def with_interval(value, interval, sign=""):
    return f"{value:{sign}.2f} {bounds(interval, sign)}"


def bounds(interval, sign=""):
    return f"[{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"


WORDS = ("file", "first", "second", "protocol", "command")  # columns set to the left; figures go to the right


def render_text(table):
    table = [[one_line(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = [header in WORDS for header in table[0]]
    lines = []
    for row in table:
        cells = zip(row, widths, left, strict=True)
        lines.append("  ".join(cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in cells))
    return "\n".join(line.rstrip() for line in lines)


def render_markdown(table):
    ruler = ["---" if header in WORDS else "---:" for header in table[0]]
    left = [header in WORDS for header in table[0]]  # the other cells are figures, and of our own making
    table = [
        [plain_markdown(cell) if to_left else cell for cell, to_left in zip(row, left, strict=True)] for row in table
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (table[0], ruler, *table[1:]))


MOST_NOTES = 3  # of one kind
MISLEADING = 0.02  # share of lines from which a note is worth its line


def notes(runs, comparisons, show):
    """Lines in plain words, where a figure alone would mislead. `show` makes a run's name fit for where they go."""
    for run in runs:
        for note in run_notes(run):
            yield f"{show(run.name)}: {note}"
    clusters = {len(set(run.rows.clusters)) for run in runs if run.rows and run.rows.clusters}
    if clusters:
        counts = " and ".join(f"{count:,}" for count in sorted(clusters))
        yield f"intervals are over {counts} clusters of questions, with Student's t"
    yield from first_few(
        comparisons,
        lambda pair: pair.left_out,
        lambda pair: (
            f"{show(pair.first)} and {show(pair.second)} are compared on the {pair.questions:,} questions that both hold; "
            f"{pair.left_out:,} stand in one alone"
        ),
    )
    yield from first_few(
        comparisons,
        lambda pair: pair.other_golds,
        lambda pair: (
            f"{show(pair.first)} and {show(pair.second)} were scored against other answers for {pair.other_golds:,} "
            "questions: pass --gold"
        ),
    )
    yield from first_few(
        comparisons,
        lambda pair: not pair.shown,
        lambda pair: (
            f"no difference shown between {show(pair.first)} and {show(pair.second)} "
            + (f"({pair.test}, p = {pair.p_holm:.2g})" if pair.p_holm >= 0.05 else "over seeds")
        ),
    )


def first_few(comparisons, concerned, note):
    """The note on each pair that it concerns: the first few, and how many more."""
    pairs = [pair for pair in comparisons if concerned(pair)]
    yield from map(note, pairs[:MOST_NOTES])
    if len(pairs) > MOST_NOTES:
        yield f"so it is for {len(pairs) - MOST_NOTES} more of the {len(comparisons)} pairs"


def amount(count: int, one: str, several: str) -> str:
    return f"1 {one}" if count == 1 else f"{count:,} {several}"


def run_notes(run):
    counts, right = run.counts, run.counts["right"]
    finished = run.n - counts["unfinished"]
    if run.skipped:
        yield amount(run.skipped, "line could not be read and is left out", "lines could not be read and are left out")
    if counts["no_gold"]:
        left_out = amount(counts["no_gold"], "line is left out", "lines are left out")
        yield f"{left_out}: not a question of --gold"
    if counts["prompt_too_long"]:
        too_long = amount(counts["prompt_too_long"], "prompt was", "prompts were")
        yield f"{too_long} too long for the model; an empty answer counts as wrong"
    if counts["without_marker"]:
        without = amount(counts["without_marker"], "reference has", "references have")
        yield f"{without} no `####`, so the published rule cannot be applied"
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
            f"in {counts['ran_on']:,} of {run.n:,} texts the model went on with a problem of its own after the answer; "
            "only the answer before it counts, and --stop TEXT would end the text there"
        )
    if counts["off_format"]:
        right_ones = amount(counts["off_format"], "answer was", "answers were")
        yield f"{right_ones} right but not in the asked format, `#### 18` alone on the last line"
    if counts["no_answer_right"]:
        yield (
            f"{counts['no_answer_right']:,} of the {counts['no_answer']:,} without an answer "
            "give the right number in another form, which only the lenient figure counts"
        )
    if len(run.paths) > 1:
        shares = ", ".join(f"{share:.2f}" for share in seed_shares(run))
        yield (
            f"{len(run.paths)} seeds ({shares}): the first interval covers the choice of questions, `over seeds` that "
            "of seeds"
        )
    elif run.several:
        votes = count_votes(run)
        k = len(votes.pass_at)
        yield (
            f"{run.questions:,} questions of {k} samples or more: the accuracy is their mean, pass@{k} is "
            f"{votes.pass_at[-1]:.2f}; {votes.ties:,} tied votes went to the answer given first"
        )


def print_wrong(run, format, most):
    """The first answers of a run that are not right: question, gold, what was read, the end."""
    wrong = ((row, reading, status) for row, reading, status in read_again(run, format) if status != "right")
    for row, reading, status in islice(wrong, most):
        read = status.replace("_", " ") if reading.number is None else f"read {reading.number}"
        print(f"\n--- {one_line(run.name)}, id {one_line(str(row.id))}, sample {row.sample}: {read}, gold {row.gold}")
        print(printable(row.question))
        print("..." + printable(row.text[-400:]) if len(row.text) > 400 else printable(row.text))


PAGE_BYTES = 60_000_000  # of text that goes into a page whole; of more, a sample of the questions


def write_page(runs, published, comparisons, format, path):
    """One file for reading the answers in a browser, without network.

    What a model wrote reaches the page as JSON inside a script element and is shown as text nodes
    alone, and the template escapes all else. Where the files are too large, the same share of the
    questions is taken from each, chosen by a checksum of their text.
    """
    import jinja2

    share = min(1.0, PAGE_BYTES / max(1, page_bytes(runs)))
    questions = {}
    for place, run in enumerate(runs):
        for row, reading, status in read_again(run, format, share):
            key = same_text(row.question)
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
        title=made_from(runs),
        tables=[run_table(runs, published)] + ([comparison_table(comparisons)] if comparisons else []),
        words=WORDS,
        notes=list(notes(runs, comparisons, str)),
        made=[(run.name, run_facts(run)) for run in runs],
        brief=("model", "mode", "decoding"),
        code=("command", "prompt of the first question"),
        warning=warning,
        colours=STATUS_COLOURS,
        marks=STATUS_MARKS,
        meanings=STATUS_MEANINGS,
        data={
            "marks": STATUS_MARKS,
            "runs": [run.name for run in runs],
            "questions": sorted(questions.values(), key=lambda question: (str(type(question["id"])), question["id"])),
        },
    )
    try:
        # Half of a surrogate pair is legal in JSON and cannot be written as UTF-8.
        write_atomically(path, SURROGATE.sub("\ufffd", page))
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written: {error.strerror}") from error


SURROGATE = re.compile("[\ud800-\udfff]")
STATUS_MARKS = dict(zip(STATUSES, "✓✗…∅?", strict=True))
STATUS_MEANINGS = {
    "right": "the final answer equals the reference",
    "wrong": "the final answer is another number",
    "unfinished": "the thought was never closed",
    "no_answer": "nothing stands where the final answer is asked for",
    "ambiguous": "an expression, or several numbers where one is asked for",
}


def page_bytes(runs):
    """About how many bytes the texts of a page take: each completion, and each question with its answer once."""
    outputs = sum(run.counts["bytes"] + 60 * run.n for run in runs)
    return outputs + max(run.counts["question_bytes"] * run.questions / run.n for run in runs)


def run_facts(run):
    """(fact, text) of how a run was made, as its record says or the lines of EleutherAI's harness do."""
    record = read_record(run.path)
    made, segment = (record["decides"], record["segments"][-1]) if record else read_harness(run.path)
    facts = {
        "model": segment.get("model") and shown_name(segment["model"]),
        "data": segment.get("dataset") and f"{shown_name(segment['dataset'])}, {made.get('split') or 'test'}",
        "mode": made.get("mode"),
        "decoding": decoding(made),
        "samples a question": segment.get("num_samples"),
        "dtype": made.get("dtype"),
        "tokens at most": made.get("max_new_tokens"),
        "thinking budget": made.get("think_budget"),
        "command": segment.get("command"),
        "prompt of the first question": made.get("prompt"),
    }
    return [(fact, str(value)) for fact, value in facts.items() if value is not None] or [("record", "none")]


def decoding(made):
    """How tokens were chosen, in words; None where it is not known."""
    if made.get("do_sample") is None:
        return None
    if not made["do_sample"]:
        return "greedy"
    flags = ("temperature", "top_p", "top_k", "seed")
    return ", ".join(["sampled", *(f"{key} {made[key]}" for key in flags if made.get(key) is not None)])


def page_output(row, reading, status):
    """One completion for the page: its text in four parts, thought, before, what was read, after."""
    answer = len(row.text) - len(row.text[reading.begin :].lstrip())  # blank lines go with the thought
    start, end = (max(answer, reading.start), reading.end) if reading.end else (len(row.text), len(row.text))
    output = {
        "sample": row.sample or None,
        "read": None if reading.number is None else str(reading.number),
        "tokens": row.output_tokens,
        "finish": row.finish_reason,
    }
    known = {key: value for key, value in output.items() if value is not None}
    parts = [row.text[:answer], row.text[answer:start], row.text[start:end], row.text[end:]]
    return {"status": STATUSES.index(status), **known, "parts": parts}
