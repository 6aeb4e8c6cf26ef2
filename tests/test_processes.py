"""Several processes answer as one does, whatever becomes of them."""

import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from filelock import FileLock

import common
import inference
import runs

RUN = [
    "--model-id",
    "demo/model",
    "--dataset",
    "demo/problems",
    "--mode",
    "thinking",
    "--num-samples",
    "2",
    "--limit",
    "24",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process writes."""
    path = tmp_path_factory.mktemp("one") / "run.jsonl"
    os.chdir(ROOT)
    assert inference.main([*RUN, "--output", str(path)]) == 0
    return path.read_bytes()


def launch(processes, output, *flags):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    return subprocess.Popen(
        [*command, "--num_processes", str(processes), "inference.py", *RUN, "--output", str(output), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_write_what_one_writes_and_one_of_them_speaks(whole, tmp_path):
    launched = launch(2, tmp_path / "run.jsonl")
    out, err = launched.communicate()
    assert launched.returncode == 0, err
    assert (tmp_path / "run.jsonl").read_bytes() == whole
    assert (out.count("writing "), out.count("48 answers in "), out.count("dtype fp32: ")) == (1, 1, 1)
    assert "process 1 of 2: 100%" in err and "process 2" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.jsonl", "run.run.json"]
    (segment,) = common.read_json(tmp_path / "run.run.json")["segments"]
    assert (segment["processes"], segment["answers"]) == (2, 48)


def test_killed_processes_lose_nothing_and_another_number_goes_on(whole, tmp_path):
    output, parts = tmp_path / "run.jsonl", [tmp_path / "run.jsonl.part", tmp_path / "run.jsonl.part-1"]
    launched = launch(2, output, "--batch-size", "1")
    while not all(part.exists() and part.stat().st_size for part in parts):
        assert launched.poll() is None
        time.sleep(0.01)
    for process in [psutil.Process(launched.pid), *psutil.Process(launched.pid).children(recursive=True)]:
        process.kill()
    launched.communicate()
    kept = {(row["id"], row["sample"]) for part in parts for _, row in common.read_jsonl(part, bad=[])}
    assert 2 <= len(kept) < 48
    launched = launch(3, output)
    out, err = launched.communicate()
    assert launched.returncode == 0, err
    assert f"{len(kept)} answers are there, {48 - len(kept)} to go" in out
    assert output.read_bytes() == whole and len(list(tmp_path.iterdir())) == 2


@pytest.fixture
def left_by_three(whole, tmp_path):
    """What three processes left that were killed: 10 whole lines, one of them twice, and two torn ones."""
    lines = whole.splitlines(keepends=True)
    for name, held in {
        "": lines[:4] + [lines[20][:30]],
        "-1": lines[3:8],
        "-2": lines[40:42] + [lines[9][:50]],
    }.items():
        (tmp_path / f"run.jsonl.part{name}").write_bytes(b"".join(held))
    inference.main([*RUN, "--output", str(tmp_path / "other.jsonl"), "--limit", "1"])
    (tmp_path / "other.run.json").rename(tmp_path / "run.run.json")
    return tmp_path / "run.jsonl"


def test_one_process_goes_on_where_three_were_killed(whole, left_by_three, capsys):
    inference.main([*RUN, "--output", str(left_by_three)])
    assert "10 answers are there, 38 to go" in capsys.readouterr().out
    assert left_by_three.read_bytes() == whole
    assert not list(left_by_three.parent.glob("run.jsonl.part*"))


def test_overwrite_drops_what_the_other_processes_left(whole, left_by_three, capsys):
    inference.main([*RUN, "--output", str(left_by_three), "--overwrite"])
    assert "answers are there" not in capsys.readouterr().out and left_by_three.read_bytes() == whole


def test_a_process_that_outlived_its_launcher_is_noticed(left_by_three, capsys):
    with FileLock(f"{left_by_three}.part-2.lock"), pytest.raises(SystemExit, match="2"):
        inference.main([*RUN, "--output", str(left_by_three)])
    assert "another process is writing it" in capsys.readouterr().err


def test_a_process_that_stopped_early_is_told(left_by_three, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(runs, "wait_for_all", lambda: None)
    with pytest.raises(SystemExit, match="2"):  # process 0 alone: nobody answers the questions of process 1
        inference.main([*RUN, "--output", str(left_by_three)])
    missing = 48 - len({(row["id"], row["sample"]) for _, row in common.read_jsonl(f"{left_by_three}.part")})
    assert f"another process has stopped, {missing} answers are missing" in capsys.readouterr().err and missing > 15


def test_samples_of_a_question_stay_with_one_process_unless_questions_are_few(monkeypatch):
    monkeypatch.setattr(inference, "processes", lambda: 2)
    shares = {}
    for questions in (3, 40):
        missing = [(i, sample) for i in range(questions) for sample in range(3)]
        for rank in (0, 1):
            monkeypatch.setattr(inference, "rank", lambda rank=rank: rank)
            shares[questions, rank] = inference.own_share(missing, questions, 3)
        assert sorted(shares[questions, 0] + shares[questions, 1]) == missing
    assert [len(shares[3, rank]) for rank in (0, 1)] == [5, 4]
    assert [len(shares[40, rank]) for rank in (0, 1)] == [60, 60]
    assert not {i for i, _ in shares[40, 0]} & {i for i, _ in shares[40, 1]}
