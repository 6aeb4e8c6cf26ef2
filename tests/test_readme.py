"""The README's tables are what its commands print."""

import json
import re

import pytest
from conftest import ROOT

import benchmark
import common
import data

README = (ROOT / "README.md").read_text()
DEMO_RUNS = [str(ROOT / f"results/demo/{mode}.jsonl") for mode in common.MODES]


def block(mark):
    """What stands between the comment that begins with `mark` and the next `<!-- end -->`."""
    return re.search(rf"<!-- {re.escape(mark)}[^\n]*-->\n(.*?)\n?<!-- end -->", README, re.DOTALL)[1]


def test_the_demo_table_is_what_benchmark_prints(capsys):
    benchmark.main([*DEMO_RUNS, "--markdown"])
    assert block("python benchmark.py") == capsys.readouterr().out.strip()


def test_the_published_table_holds_the_published_facts_and_the_demos_measurements(capsys):
    rows = common.read_json(ROOT / "results/published.json")["rows"]
    benchmark.main([*(str(ROOT / f"results/demo/model/{name}.jsonl.gz") for name in rows), "--json"])
    measured = [run["accuracy_published"] for run in json.loads(capsys.readouterr().out)]
    lines = [
        f"| `{name}` | {row['protocol']['mode']} | {cell(row['published'])} | {cell(row['file'])} | {cell(demo)} |"
        for (name, row), demo in zip(rows.items(), measured, strict=True)
    ]
    header = ["| run | mode | published % | from its file % | demo % |", "| --- | --- | ---: | ---: | ---: |"]
    assert block("published and demo").splitlines() == header + lines


def cell(value):
    return "" if value is None else f"{value:.2f}"


def test_what_the_readme_says_of_own_answers_was_measured(capsys):
    paths = ROOT.glob("results/demo/model/own-answers-seed*.jsonl.gz")
    base = ROOT / "results/demo/model/thinking-4096.jsonl.gz"
    benchmark.main([*map(str, sorted(paths)), str(base), "--pool-seeds", "--compare", "--json"])
    own, base = json.loads(capsys.readouterr().out)
    ((low, high), difference) = own["compared"][0]["interval"], own["compared"][0]["difference"]
    told = f"from {base['accuracy']:.1f} to {own['accuracy']:.1f} % ({difference:+.1f} points, 95 % interval {low:.1f} to {high:.1f}"
    assert told in " ".join(README.split())


def test_the_scoring_table_is_the_one_of_its_page():
    page = (ROOT / "results/scoring.md").read_text()
    assert block("scoring") == re.search(r"\| file \| final answer.*?(?=\n\n)", page, re.DOTALL)[0]


@pytest.mark.parametrize("path", DEMO_RUNS)
def test_the_committed_runs_are_of_the_committed_demo(path):
    decides = common.read_json(path.replace(".jsonl", ".run.json"))["decides"]
    model, problems = ROOT / "demo/model", str(ROOT / "demo/problems")
    assert decides["sha256 of model.safetensors"] == common.hash_file(model / "model.safetensors")
    assert decides["dataset_sha256"] == data.hash_questions(data.load_questions(problems, "test"))


def test_every_file_that_the_readme_names_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_the_readme_says_of_the_demos_training_is_in_its_table():
    table = (ROOT / "results/demo/training.txt").read_text()
    told = " ".join(README.split())
    best = {"full": ("full", "1e-2"), "lora-r4": ("rank 4", "3e-2"), "lora-r32": ("rank 32", "1e-2")}
    for run, (words, rate) in best.items():
        accuracy = re.search(rf"^{run}_best +800 +([0-9.]+)", table, re.MULTILINE)[1]
        assert f"{float(accuracy):.1f} % ({words})" in told
        assert re.search(rf"^{run}  +{rate} .* best$", table, re.MULTILINE)
