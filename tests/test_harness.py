"""This project's readings held against others and against labels made by hand, as results/scoring.md tells it."""

import json
from collections import Counter

import pytest
from conftest import ROOT

from bench import scoring


@pytest.mark.parametrize(("name", "strict"), [("zero_shot_model_outputs", "0.00"), ("cot_model_outputs", "47.99")])
def test_strict_match_misses_right_answers_that_are_not_bare_numbers(shared, name, strict):
    right, _ = scoring.read_all(shared)
    assert f"{100 * right[name, 'strict match'] / right[name, 'lines']:.2f}" == strict


def test_the_page_on_scoring_is_what_the_files_give(shared):
    assert scoring.PAGE.read_text() == scoring.page(shared), "python bench/scoring.py makes it anew"


def test_the_lenient_reading_takes_no_number_that_a_reader_does_not_take(shared):
    counts = Counter()
    for line in scoring.labelled(shared):
        agrees, says_right = scoring.verdicts(line)["lenient"]
        right = line["label"] is not None and line["label"] == line["gold"]
        counts["agree"] += agrees
        assert not (says_right and not right), (line["file"], line["id"])
    assert counts["agree"] >= 297  # of 300; the rest are last sentences with two numbers, or with another behind them


def test_every_file_has_its_share_of_labels():
    labels = [json.loads(line) for line in (ROOT / "tests/labels.jsonl").read_text().splitlines()]
    files = Counter(label["file"] for label in labels)
    assert {name: files[name] for name in scoring.FILES} == dict.fromkeys(scoring.FILES, 20)
    assert [count for name, count in files.items() if name not in scoring.FILES] == [100, 100]
    assert len({(label["file"], label["id"]) for label in labels}) == len(labels)
