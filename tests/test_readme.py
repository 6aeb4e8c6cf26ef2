"""The README's tables are what its commands print."""

import re

import pytest
from conftest import ROOT

import benchmark
import common

README = (ROOT / "README.md").read_text()
DEMO_RUNS = [str(ROOT / f"results/demo/{mode}.jsonl") for mode in common.MODES]


def block(mark):
    """What stands between the comment that begins with `mark` and the next `<!-- end -->`."""
    return re.search(rf"<!-- {re.escape(mark)}[^\n]*-->\n(.*?)\n?<!-- end -->", README, re.DOTALL)[1]


def test_the_demo_table_is_what_benchmark_prints(capsys):
    benchmark.main([*DEMO_RUNS, "--markdown"])
    assert block("python benchmark.py") == capsys.readouterr().out.strip()


def test_the_published_table_holds_the_published_facts():
    rows = common.read_json(ROOT / "results/published.json")["rows"]
    lines = [
        f"| `{name}` | {row['protocol']['mode']} | {cell(row['published'])} | {cell(row['file'])} |"
        for name, row in rows.items()
    ]
    header = ["| run | mode | published % | recomputed from its file % |", "| --- | --- | ---: | ---: |"]
    assert block("published").splitlines() == header + lines


def cell(value):
    return "" if value is None else f"{value:.2f}"


def test_the_scoring_table_is_the_one_of_its_page():
    page = (ROOT / "results/scoring.md").read_text()
    assert block("scoring") == re.search(r"\| file \| final answer.*?(?=\n\n)", page, re.DOTALL)[0]


@pytest.mark.parametrize("path", DEMO_RUNS)
def test_the_committed_runs_are_of_the_committed_demo(path):
    decides = common.read_json(path.replace(".jsonl", ".run.json"))["decides"]
    model, problems = ROOT / "demo/model", str(ROOT / "demo/problems")
    assert decides["sha256 of model.safetensors"] == common.hash_file(model / "model.safetensors")
    assert decides["dataset_sha256"] == common.hash_questions(common.load_questions(problems, "test"))


def test_every_file_that_the_readme_names_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
