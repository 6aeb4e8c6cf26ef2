"""The README's tables are what its commands print."""

import re

import pytest
from conftest import ROOT

import common
import data
from bench import readme

README = (ROOT / "README.md").read_text()
DEMO_RUNS = [str(ROOT / f"results/demo/{mode}.jsonl") for mode in common.MODES]


@pytest.mark.parametrize("block", list(readme.BLOCK.finditer(README)), ids=lambda block: block[2][:60])
def test_every_table_is_what_its_command_prints(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert block[0] == f"{block[1]}{readme.made(block[2])}\n{block[3]}", "python bench/readme.py makes it anew"


def test_no_figure_stands_in_a_table_that_no_command_prints():
    outside = readme.BLOCK.sub("", README)
    assert len(readme.BLOCK.findall(README)) >= 7
    assert not re.search(r"^\|.*\d\.\d+ (%|\[)", outside, re.MULTILINE) and not re.search(r"\d\d?\.\d+ ?%", outside)


def test_words_are_expanded_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-1.x", "a-2.x", "b.x"):
        (tmp_path / name).touch()
    assert readme.expanded("{a,b}/{c,d}") == ["a/c", "a/d", "b/c", "b/d"]
    assert readme.expanded("a-*.x") == ["a-1.x", "a-2.x"] and readme.expanded("--compare") == ["--compare"]


@pytest.mark.parametrize("path", DEMO_RUNS)
def test_the_committed_runs_are_of_the_committed_demo(path):
    decides = common.read_json(path.replace(".jsonl", ".run.json"))["decides"]
    model, problems = ROOT / "demo/model", str(ROOT / "demo/problems")
    assert decides["sha256 of model.safetensors"] == common.hash_file(model / "model.safetensors")
    assert decides["dataset_sha256"] == data.hash_questions(data.load_questions(problems, "test"))


def test_every_file_that_the_readme_names_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in set(re.findall(r"`([a-z_]+\.(?:py|html))`", README)):
        assert (ROOT / name).exists(), name


def test_every_script_of_the_project_is_told_of():
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"`([a-z_]+\.py)`", README))


def test_every_command_of_the_readme_is_one_that_its_script_takes():
    """Flags that a script dropped would stand on in the page."""
    for script, words in re.findall(
        r"^(?:accelerate launch --num_processes 8|python) (\w+\.py)(.*)$", README, re.MULTILINE
    ):
        helps = (ROOT / script).read_text() + (ROOT / "train.py").read_text()
        for flag in re.findall(r"--[a-z-]+", words.partition("#")[0]):
            assert f'"{flag}"' in helps, (script, flag)
