"""Our final-answer reading held against others, row by row, on the published files.

The others are the published rule and the two GSM8K filters of EleutherAI's lm-evaluation-harness
(`lm_eval/tasks/gsm8k/gsm8k.yaml`), written here from their definition. To
write the page anew:

    python tests/test_harness.py > results/scoring.md
"""

import json
import re
from collections import defaultdict

import pytest
from conftest import ROOT, SHARED

from reading import grade, read_final, read_gold, read_published, score_published

FILES = (
    "zero_shot_model_outputs",
    "cot_model_outputs",
    "few_shot_model_outputs",
    "BF16-thinking_model_outputs_reduced_batch",
    "Qwen3-GSM8k-SFT-BF16-temp0",
)
PREFILLED = FILES[-1:]

STRICT_MATCH = re.compile(r"#### (\-?[0-9\.\,]+)")  # the first match
FLEXIBLE_EXTRACT = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # the last match
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")  # taken out of both texts before they are compared
INVALID = "[invalid]"


def read_strict(text):
    return next(iter(STRICT_MATCH.findall(text)), INVALID)


def read_flexible(text):
    matches = FLEXIBLE_EXTRACT.findall(text)
    return next(filter(None, matches[-1])) if matches else INVALID


def exact_match(read, answer):
    for pattern in IGNORED:
        read, answer = re.sub(pattern, "", read), re.sub(pattern, "", answer)
    return read == answer


OTHERS = {
    "strict match": (read_strict, lambda text, answer: exact_match(read_strict(text), answer)),
    "flexible extract": (read_flexible, lambda text, answer: exact_match(read_flexible(text), answer)),
    "published rule": (lambda text: str(read_published(text)), score_published),
}

# What tells two readings apart, and which of them a person who reads the row agrees with.
KINDS = {
    "unfinished": "counts a thought that never closed, whose last number happens to be right | ours",
    "no_answer": "takes a number from the thought or the working; the answer was cut before it was given | ours",
    "wrong": "takes a part of `2/3` for the number | ours",
    "ambiguous": "takes one of several numbers | ours",
    "nothing": "reads nothing: markup, a word or a currency sign before the number, `####` behind it, or a box | ours",
    "punctuation": "reads `$$` or `$.` | ours",
    "text": "compares texts: `28.00` is not `28` | ours",
    "another": "reads another number than the one given as the answer | ours",
}


def kind_of_difference(status, read, gold):
    if status != "right":
        return status
    if read in {INVALID, "None"}:
        return "nothing"
    if not re.search("[0-9]", read):
        return "punctuation"
    number = re.sub(r"[$,]|\.$", "", read)
    return "text" if re.fullmatch(r"-?[0-9]+\.[0-9]+", number) and float(number) == gold else "another"


def read_all(folder):
    """Right answers by file and reading, and the ids of the rows that differ by reading, kind and file."""
    right, differing = defaultdict(int), defaultdict(list)
    for name in FILES:
        with open(folder / "published_outputs" / f"{name}.jsonl") as file:
            rows = [json.loads(line) for line in file]
        for row in rows:
            text, answer = row["model_output"], row["ground_truth_answer"]
            gold = read_gold(answer)
            status = grade(read_final(text, name in PREFILLED or "<think>" in text), gold)
            right[name, "final answer"] += status == "right"
            right[name, "lines"] += 1
            for other, (read, score) in OTHERS.items():
                counted = score(text, answer)
                right[name, other] += counted
                if counted != (status == "right"):
                    differing[other, kind_of_difference(status, read(text), gold), name].append(row["id"])
    return right, differing


def write_page(folder):
    right, differing = read_all(folder)
    readings = ["final answer", *OTHERS]
    lines = [
        "# Four readings of the same answers",
        "",
        "Right answers on the published output files, in percent, and how many. *Final answer* is this project's",
        "reading; *strict match* and *flexible extract* are the GSM8K filters of EleutherAI's lm-evaluation-harness;",
        "the *published rule* is the one behind the published figures. Made by",
        "`python tests/test_harness.py > results/scoring.md`; a test fails when this page is stale.",
        "",
        "| file | " + " | ".join(readings) + " |",
        "| --- |" + " ---: |" * len(readings),
    ]
    for name in FILES:
        cells = (f"{100 * right[name, r] / right[name, 'lines']:.2f} ({right[name, r]})" for r in readings)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Every row where another reading differs from the final answer, by kind:",
        "",
        "| reading | what it does where it differs | right | file | rows | ids, the first five |",
        "| --- | --- | --- | --- | ---: | --- |",
    ]
    for other in OTHERS:
        for kind, meaning in KINDS.items():
            for name in FILES:
                ids = differing[other, kind, name]
                if ids:
                    some = ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
                    lines.append(f"| {other} | {meaning} | {name} | {len(ids)} | {some} |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("name", "strict"), [("zero_shot_model_outputs", "0.00"), ("cot_model_outputs", "47.99")])
def test_strict_match_misses_right_answers_that_are_not_bare_numbers(shared, name, strict):
    right, _ = read_all(shared)
    assert f"{100 * right[name, 'strict match'] / right[name, 'lines']:.2f}" == strict


def test_the_page_on_scoring_is_what_the_files_give(shared):
    assert (ROOT / "results" / "scoring.md").read_text() == write_page(shared)


if __name__ == "__main__":
    print(write_page(SHARED), end="")
