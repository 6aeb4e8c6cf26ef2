"""`make reproduce` runs every row, and each row runs again only where its recipe has changed.

The commands that make would run are run here in this process, for importing torch anew takes seconds.
"""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import common
import inference
import model
import train
import train_lora

MAINS = {"inference.py": inference.main, "train.py": train.main, "train_lora.py": train_lora.main}
SPLITS = {"train": 48, "test": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Few of the demo's problems, and folders for outputs and results."""
    place = tmp_path_factory.mktemp("reproduce")
    for split, count in SPLITS.items():
        lines = (ROOT / f"demo/problems/{split}.jsonl").read_text().splitlines(keepends=True)[:count]
        (place / f"{split}.jsonl").write_text("".join(lines))
    return place


def commands(place, target, **variables):
    """The shell commands of a target at the smallest size."""
    small = {
        "MODEL": "demo/model", "DATASET": place, "OUT": place / "outputs", "RESULTS": place / "results",
        "TRAINED": place / "trained", "PY": sys.executable, "SEEDS": "1", "STEPS": 2, "TRAIN_LIMIT": "",
        "EVAL": "--eval-size 16 --eval-questions 4", "BUDGETS": "16 32",
    }  # fmt: skip
    settings = [f"{name}={value}" for name, value in (small | variables).items()]
    listed = subprocess.run(
        ["make", "-n", "--no-print-directory", "-o", ".venv/installed", target, *settings],
        cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"MAKEFLAGS": ""},
    )  # fmt: skip
    return [line for line in listed.stdout.splitlines() if not re.match(r"(\w+=\S* )*make ", line)]


def perform(lines):
    for line in lines:
        words = shlex.split(line)
        if len(words) > 1 and words[1] in MAINS:
            assert MAINS[words[1]](words[2:]) in (0, None), line
        else:
            subprocess.run(line, shell=True, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def reproduced(place):
    perform(commands(place, "reproduce"))
    return place


def test_the_whole_recipe_leaves_every_row_its_table_and_its_pictures(reproduced):
    results = reproduced / "results"
    page = (results / "README.md").read_text()
    published = common.read_json(ROOT / "results/published.json")["rows"]
    rows = [path.name.removesuffix(".jsonl.gz") for path in results.glob("*.jsonl.gz")]
    assert set(published) < set(rows) and len(rows) == 12 + 6 + 4 + 3 + 2
    for row in rows:
        assert f"| {re.sub('-seed1$', '', row)} |" in page, row
        lines = [json.loads(line) for line in gzip.decompress((results / f"{row}.jsonl.gz").read_bytes()).splitlines()]
        assert {line["id"] for line in lines} == set(range(SPLITS["test"]))
        assert (results / f"{row}.run.json").exists()
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (results / picture).stat().st_size > 10_000
    assert page.count("python inference.py") == len(rows) + 2  # two rows stand in a second table as well
    assert len(list((results / "train").iterdir())) == 5 + 4 + 2


def test_the_rows_follow_the_published_protocol(reproduced):
    for name, row in common.read_json(ROOT / "results/published.json")["rows"].items():
        decides = common.read_json(reproduced / f"results/{name}.run.json")["decides"]
        wanted = {key: value for key, value in row["protocol"].items() if key != "model"}
        assert {key: decides[key] for key in wanted} == wanted, name


def test_a_finished_row_is_left_alone_and_one_of_another_recipe_is_made_again(reproduced, capsys):
    row = reproduced / "outputs/cot_model_outputs.jsonl"
    before = row.stat().st_mtime_ns
    perform(commands(reproduced, "row/cot_model_outputs"))
    assert "finished already" in capsys.readouterr().out and row.stat().st_mtime_ns == before
    record = row.with_suffix(".run.json")
    record.write_text(record.read_text().replace('"max_new_tokens": 512', '"max_new_tokens": 100'))
    perform(commands(reproduced, "row/cot_model_outputs"))
    assert "max_new_tokens" in capsys.readouterr().out
    assert row.stat().st_mtime_ns > before and common.read_json(record)["decides"]["max_new_tokens"] == 512


def test_the_published_checkpoints_are_evaluated_in_place_of_own_training(place, tmp_path):
    """Stand-ins of the published names: the full models a copy of the demo's, the adapters new ones."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "demo/model")
    for name in ("SFT-FP32-eval-score", "SFT-FP32", "SFT-BF16"):
        base.save_pretrained(tmp_path / f"hub/Qwen3-GSM8k-{name}")
        model.load_tokenizer(model.find_model(str(ROOT / "demo/model"))).save_pretrained(
            tmp_path / f"hub/Qwen3-GSM8k-{name}"
        )
    for rank in (4, 32):
        adapter = peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
        adapter.peft_config["default"].base_model_name_or_path = str(ROOT / "demo/model")
        adapter.save_pretrained(tmp_path / f"hub/Qwen3-GSM8k-LoRA-r{rank}-FP32-eval-score")
        base = adapter.unload()
    own = {"CHECKPOINTS": "published", "HUB": tmp_path / "hub", "OUT": tmp_path / "outputs", "LIMIT": 2}
    lines = [line for line in commands(place, "rows/published", **own) if "Qwen3-GSM8k" in line]
    assert len(lines) == 6 and not any("train" in line.split()[1] for line in lines)
    perform(lines)
    assert len(list((tmp_path / "outputs").glob("Qwen3-GSM8k-*.jsonl"))) == 6
