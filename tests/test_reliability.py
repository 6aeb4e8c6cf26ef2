"""Faults that happen to a run: it says so in one line, loses no finished answer, and goes on afterwards.

`python bench/reliability.py` runs this file and its neighbours and writes results/reliability.md.
"""

import contextlib
import errno
import functools
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import common
import inference
import runs

MODEL, PROBLEMS = ROOT / "demo/model", ROOT / "demo/problems"
KILLS = 20


def arguments(output, *flags, model=MODEL, dataset=PROBLEMS):
    return list(map(str, ["--model-id", model, "--dataset", dataset, "--output", output, *flags]))


def start(output, *flags, **options):
    """The command as a person would start it."""
    command = [sys.executable, ROOT / "inference.py", *arguments(output, *flags)]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen(command, **options)


def fork(output, *flags):
    """The same main in a process that has its imports already, to be killed where it works."""

    def main():
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        inference.main(arguments(output, *flags))

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def part(output):
    """The bytes of the answers of an unfinished run."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"{output}.part").read_bytes()
    return b""


def wait_for_answers(output, count):
    deadline = time.monotonic() + 600  # of a machine that others use too
    while part(output).count(b"\n") < count:
        assert time.monotonic() < deadline, "the process writes no answers"
        time.sleep(0.005)


def whole_run(output, *flags, **places):
    assert inference.main(arguments(output, *flags, **places)) == 0
    return output.read_bytes()


def refused(capsys, *command, **places):
    """The one line in which a run ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        inference.main(arguments(*command, **places))
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("starter", "flags"),
    [
        (start, ("--mode", "few_shot", "--limit", 240)),
        (fork, ("--mode", "thinking", "--num-samples", 2, "--limit", 90)),
    ],
    ids=["greedy, whole processes", "sampled, processes forked after their imports"],
)
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(starter, flags, tmp_path, record_property):
    expected = whole_run(tmp_path / "whole.jsonl", *flags)
    output, draw = tmp_path / "killed.jsonl", random.Random(20)
    survivors, torn, while_starting = set(), 0, 0
    for kill in range(KILLS):
        before = part(output).count(b"\n")
        process = starter(output, *flags, "--batch-size", 4)
        if starter is start and kill % 3 == 0:
            time.sleep(draw.uniform(0, 4))
        else:
            wait_for_answers(output, before + draw.randint(1, 7))
            time.sleep(draw.uniform(0, 0.1))
        process.kill()
        assert (process.wait() if starter is start else process.join() or process.exitcode) == -signal.SIGKILL
        *lines, last = part(output).split(b"\n")
        while_starting += len(lines) == before
        torn += len(last)
        survivors.update(lines)
    process = starter(output, *flags)
    assert (process.wait() if starter is start else process.join() or process.exitcode) == 0
    assert output.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir() if "killed" in path.name) == [
        "killed.jsonl",
        "killed.run.json",
    ]
    segments = common.read_json(tmp_path / "killed.run.json")["segments"]
    assert sum(segment["answers"] for segment in segments) == expected.count(b"\n")
    assert all(segment["seconds"] >= 0 for segment in segments)
    lost = sum(len(line) for line in survivors - set(expected.split(b"\n")))
    record_property("survived", f"{KILLS} SIGKILLs, {while_starting} of them before the first new answer")
    record_property("answers", f"{len(lines)} on disk at the last kill, {len(expected.splitlines())} at the end")
    record_property("bytes of finished answers lost", lost)
    record_property("bytes of torn lines dropped", torn)
    assert lost == 0


def test_a_process_killed_between_its_last_answer_and_the_end_is_finished_by_the_next(tmp_path, monkeypatch):
    expected = whole_run(tmp_path / "whole.jsonl", "--limit", 6)
    output = tmp_path / "a.jsonl"
    replace = os.replace

    def die(source, target):
        if Path(target) == output:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    process = fork(output, "--limit", 6)
    process.join()
    monkeypatch.undo()
    assert process.exitcode == -signal.SIGKILL and not output.exists() and len(part(output)) == len(expected)
    assert whole_run(output, "--limit", 6) == expected
    assert sorted(path.name for path in tmp_path.iterdir() if "whole" not in path.name) == ["a.jsonl", "a.run.json"]


def test_a_stop_says_how_many_are_done_and_how_to_go_on(tmp_path, capsys, record_property):
    flags = ("--mode", "thinking", "--limit", 60)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it off, and its children too
    output = tmp_path / "a.jsonl"
    for number, code, word in ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")):
        before = part(output).count(b"\n")
        process = start(output, *flags, "--batch-size", 4, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for_answers(output, before + 3)
        assert "another process is writing it" in refused(capsys, output, *flags)
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
        assert process.returncode == code and err.splitlines()[-1] == word and "Traceback" not in err
        done = part(output).count(b"\n")
        assert (
            out.splitlines()[-1]
            == f"{output}: stopped, {done} answers are on disk; the same command goes on from there"
        )
    assert whole_run(output, *flags) == whole_run(tmp_path / "whole.jsonl", *flags)
    record_property("survived", "SIGINT, SIGTERM and two second writers")


@contextlib.contextmanager
def full_disk(monkeypatch, folder):
    """No file may grow beyond 8,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        yield "make room there, then start the same command again"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def exchanged(path, content):
    before = path.read_bytes()
    path.write_bytes(content)
    yield
    path.write_bytes(before)


@contextlib.contextmanager
def model_cut(monkeypatch, folder):
    path = folder / "model/model.safetensors"
    with exchanged(path, path.read_bytes()[:-1000]):
        yield "model.safetensors is damaged"


@contextlib.contextmanager
def dataset_changed(monkeypatch, folder):
    path = folder / "data/test.jsonl"
    with exchanged(path, path.read_bytes().replace(b"how", b"How", 1)):
        yield "was made with dataset_sha256 = "


@contextlib.contextmanager
def not_numbers_injected(monkeypatch, folder):
    with forward_from_the_fortieth(monkeypatch, lambda output: output.logits.fill_(float("nan"))):
        yield "the model's logits are not numbers (NaN)"


@contextlib.contextmanager
def out_of_memory_injected(monkeypatch, folder):
    import torch

    def fail(output):
        raise torch.OutOfMemoryError("injected by the test")

    with forward_from_the_fortieth(monkeypatch, fail):
        yield "out of memory, though one sequence at a time is the least: injected by the test"


@contextlib.contextmanager
def forward_from_the_fortieth(monkeypatch, act):
    """Something happens to the model's output from its fortieth pass on."""
    import transformers

    forward, passes = transformers.Qwen3ForCausalLM.forward, []

    @functools.wraps(forward)
    def injected(self, *args, **inputs):
        output = forward(self, *args, **inputs)
        passes.append(1)
        if len(passes) >= 40:
            act(output)
        return output

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Qwen3ForCausalLM, "forward", injected)
        yield


@pytest.mark.parametrize(
    "fault",
    [full_disk, model_cut, dataset_changed, not_numbers_injected, out_of_memory_injected],
    ids=lambda f: f.__name__,
)
def test_a_fault_is_named_and_the_run_goes_on_after_it(fault, tmp_path, monkeypatch, capsys, record_property):
    places = {"model": tmp_path / "model", "dataset": tmp_path / "data"}
    shutil.copytree(MODEL, places["model"])
    shutil.copytree(PROBLEMS, places["dataset"])
    output = tmp_path / "a.jsonl"
    finished = whole_run(output, "--limit", 4, **places)
    with fault(monkeypatch, tmp_path) as expected:
        assert expected in refused(capsys, output, "--limit", 30, "--batch-size", 3, **places)
    assert output.read_bytes() == finished
    *lines, torn = part(output).split(b"\n")
    ended = whole_run(output, "--limit", 30, **places)
    assert ended == whole_run(tmp_path / "whole.jsonl", "--limit", 30, **places)
    record_property("answers", f"{4 + len(lines)} kept of 30")
    record_property("bytes of finished answers lost", sum(len(line) for line in set(lines) - set(ended.split(b"\n"))))
    record_property("bytes of torn lines dropped", len(torn))


def test_an_output_folder_removed_while_running_comes_back_with_its_answers(tmp_path, monkeypatch, capsys):
    output, append = tmp_path / "gone" / "a.jsonl", runs.RunOutput.append

    def remove_once(self, row):
        if len(self.answers.places) == 3:
            shutil.rmtree(output.parent)
        append(self, row)

    monkeypatch.setattr(runs.RunOutput, "append", remove_once)
    err = refused(capsys, output, "--limit", 6)
    assert "was removed while the run wrote to it; 3 answers are back" in err
    monkeypatch.undo()
    assert whole_run(output, "--limit", 6) == whole_run(tmp_path / "whole.jsonl", "--limit", 6)


def test_a_full_disk_under_the_notes_ends_a_process_in_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(tmp_path / "a.jsonl", "--limit", 2, stdout=full, stderr=subprocess.PIPE, text=True)
        _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (2, "inference.py: error: [Errno 28] No space left on device\n")


def test_what_describes_a_run_may_change_and_is_noted(tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    whole_run(output, "--limit", 2, "--batch-size", 2)
    whole_run(output, "--limit", 4, "--batch-size", 3)
    assert "note: limit is 4, was 2; batch_size is 3, was 2" in capsys.readouterr().out
    segments = common.read_json(tmp_path / "a.run.json")["segments"]
    assert [segment["batch_size"] for segment in segments] == [2, 3]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_noted_and_the_run_goes_on(number, tmp_path, monkeypatch, capsys):
    def no_flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_flock)
    whole_run(tmp_path / "a.jsonl", "--limit", 2)
    with runs.locked_folder(tmp_path / "training"):
        pass
    notes = [line for line in capsys.readouterr().out.splitlines() if "a file system without locks" in line]
    assert len(notes) == 2 and not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_take_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        whole_run(tmp_path / "a.jsonl", "--limit", 1, "--save-txt")
        (tmp_path / "weights").touch(0o600)
        common.follow_umask(tmp_path / "weights")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["a.jsonl", "a.run.json", "a.txt", "weights"], 0o666 & ~mask)


SEGMENT = {"started": "2026-01-01T00:00:00+00:00", "seconds": 1.5, "answers": 1}
BAD_RECORDS = {  # what a run record holds, and what the line names
    "no segment": ([], "is not a run record"),
    "an empty segment": ([{}], "no time in 'started'"),
    "a start that is no time": ([SEGMENT | {"started": "today"}], "no time in 'started'"),
    "seconds that are text": ([SEGMENT | {"seconds": "1"}], "no number in 'seconds'"),
    "answers that are text": ([SEGMENT | {"answers": "1"}], "no whole number in 'answers'"),
    "answers that are null": ([SEGMENT | {"answers": None}], "no whole number in 'answers'"),
}


@pytest.mark.parametrize(("segments", "told"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_run_record_of_another_shape_is_told_for_inference_and_training(segments, told, tmp_path, capsys):
    output, record = tmp_path / "a.jsonl", {"decides": {}, "segments": segments}
    common.write_atomically(tmp_path / "a.run.json", json.dumps(record))
    err = refused(capsys, output, "--limit", 1)
    assert told in err and "or --overwrite to drop it, or another --output" in err
    common.write_atomically(tmp_path / runs.RECORD, json.dumps(record))
    with pytest.raises(runs.Conflict, match=f"{told}; .*--overwrite to drop it, or another --output-dir"):
        runs.claim_folder(tmp_path, {"decides": {}, "segments": [SEGMENT]}, None, resume=True)


BAD_ANSWERS = {
    "id text": ({"id": "x"}, "'id' must be a whole number, this is \"x\""),
    "id null": ({"id": None}, "'id' must be a whole number, this is null"),
    "id true": ({"id": True}, "'id' must be a whole number, this is true"),
    "sample below zero": ({"sample": -1}, "'sample' must be a whole number, this is -1"),
    "tokens a list": ({"output_tokens": [1]}, "'output_tokens' must be a whole number, this is [1]"),
}


@pytest.mark.parametrize(("change", "told"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_of_another_shape_is_told_before_anything_is_generated(change, told, tmp_path, capsys):
    output = tmp_path / "a.jsonl"
    answer = json.loads(whole_run(output, "--limit", 1))
    output.write_text(json.dumps(answer | change) + "\n")
    err = refused(capsys, output, "--limit", 2)
    assert f"{output}:1: {told}" in err and "--overwrite" in err
    assert not part(output)


def test_a_record_that_a_kill_left_unwritten_is_repaired_at_the_next_start(tmp_path):
    output = tmp_path / "a.jsonl"
    whole_run(output, "--limit", 3)
    path = tmp_path / "a.run.json"
    record = common.read_json(path)
    (segment,) = record["segments"]
    torn = segment | dict.fromkeys(runs.TOTALS, 0) | {"seconds": None}  # as it is written when the run begins
    common.write_atomically(path, json.dumps(record | {"segments": [torn]}))
    whole_run(output, "--limit", 3)
    (repaired,) = common.read_json(path)["segments"]
    assert repaired | {"seconds": 0} == segment | {"seconds": 0}
    assert 0 <= repaired["seconds"] < 600


def training_folder(folder, **more):
    """A folder as a training leaves it, with files of the user's own beside."""
    record = {"decides": {"seed": 1}, "segments": [SEGMENT], "result": {"eval_loss": 1.0}} | more
    for name in ("checkpoint-4/model.safetensors", "model.safetensors", "tokenizer.json", "runs/Nov/events.out.tfevents.1",
                 "README.md", "my_notes.txt", "runs/mine/plot.png", "checkpoint-4-backup/x", "other.safetensors"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / runs.RECORD).write_text(json.dumps(record))
    return {"decides": {"seed": 2}, "segments": [SEGMENT], "result": None}


@pytest.mark.parametrize(("overwrite", "resume"), [("always", False), ("changed", True)])
def test_overwrite_deletes_what_a_training_writes_and_names_what_is_left(overwrite, resume, tmp_path, capsys):
    record = training_folder(tmp_path)
    assert runs.claim_folder(tmp_path, record, overwrite, resume) == (False, None)
    left = ["checkpoint-4-backup", "my_notes.txt", "other.safetensors", "runs"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, runs.RECORD]
    assert [path.name for path in tmp_path.rglob("runs/*")] == ["mine"]
    assert f"--overwrite leaves what is not a run's: {', '.join(left)}" in capsys.readouterr().out
    assert common.read_json(tmp_path / runs.RECORD) == record


def test_a_kill_while_overwrite_deletes_leaves_a_run_that_can_go_on(tmp_path, monkeypatch):
    record = training_folder(tmp_path)
    monkeypatch.setattr(runs, "drop_checkpoints", lambda folder: os._exit(9))
    process = multiprocessing.get_context("fork").Process(
        target=runs.claim_folder, args=(tmp_path, record, "always", False)
    )
    process.start()
    process.join()
    monkeypatch.undo()
    assert common.read_json(tmp_path / runs.RECORD)["result"] is None  # not taken for finished
    assert runs.claim_folder(tmp_path, record, "always", False) == (False, None)


def test_a_difference_is_shown_where_it_is():
    old, new = (
        {"decides": {"prompt": f"{'word ' * 40}Today is {day}.{' word' * 40}"}} for day in ("Monday", "Tuesday")
    )
    assert re.search(r"prompt = .*Monday.*, this run has .*Tuesday.*", runs.find_difference(old, new))


UNFORESEEN = {  # what goes wrong inside, and how the line begins
    "a programming error": (KeyError("weight_map"), "inference.py: unexpected KeyError: 'weight_map'"),
    "of two lines": (ValueError("no\nmatter"), "inference.py: unexpected ValueError: no"),
    "without a text": (AssertionError(), "inference.py: unexpected AssertionError: AssertionError"),
}


@pytest.mark.parametrize(("error", "line"), UNFORESEEN.values(), ids=UNFORESEEN)
def test_what_nobody_foresaw_ends_in_one_line_after_the_record(error, line, tmp_path, monkeypatch, capsys):
    def append(self, answer):
        raise error

    monkeypatch.setattr(runs.RunOutput, "append", append)
    with pytest.raises(SystemExit, match="1"):
        inference.main(arguments(tmp_path / "a.jsonl", "--limit", 1))
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"{line}; --traceback shows where it came from" and "Traceback" not in err
    assert common.read_json(tmp_path / "a.run.json")["segments"][0]["seconds"] > 0


@pytest.mark.parametrize("way", ["--traceback", "--trace", "GSM8K_TRACEBACK"])
def test_a_traceback_is_shown_to_who_asks_for_it(way, tmp_path, monkeypatch, capsys):
    if way.startswith("--"):
        flags = [way]
    else:
        flags = []
        monkeypatch.setenv(way, "1")
    err = refused(capsys, tmp_path / "a.jsonl", "--limit", 0, *flags)
    assert err == "inference.py: error: argument --limit: must be 1 or more, got 0"
    with pytest.raises(SystemExit):
        inference.main(arguments(tmp_path / "a.jsonl", "--limit", 0, *flags))
    assert "Traceback (most recent call last)" in capsys.readouterr().err


LAUNCHES = {
    "no process": ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: the launcher sets a number of processes there"),
    "processes that are text": ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: "),
    "processes that are empty": ({"WORLD_SIZE": ""}, "WORLD_SIZE=: "),
    "a number without how many": ({"RANK": "1"}, "RANK=1, and WORLD_SIZE is not set"),
    "a number beyond them": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, and WORLD_SIZE is 2"),
    "a number below zero": ({"RANK": "-1"}, "RANK=-1: "),
    "a number here that is text": ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: "),
    "no address of the first": ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
}


@pytest.mark.parametrize(("environment", "told"), LAUNCHES.values(), ids=LAUNCHES)
def test_a_launch_that_cannot_be_is_told(environment, told, tmp_path, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    err = refused(capsys, tmp_path / "a.jsonl", "--limit", 1)
    assert told in err and "start several processes with accelerate launch" in err
    assert not list(tmp_path.iterdir())


def test_closed_streams_do_not_end_a_run(tmp_path):
    command = [sys.executable, ROOT / "inference.py", *arguments(tmp_path / "a.jsonl", "--limit", 1)]
    done = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "-", *map(str, command)], check=False)
    assert done.returncode == 0 and (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 1


def test_characters_that_a_console_lacks_are_escaped(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)

    @common.command_line
    def main(argv=None):
        print("1 − 1")

    main([])
    assert console.buffer.getvalue() == b"1 \\u2212 1" + os.linesep.encode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_burst_of_signals_is_one_request_and_the_callers_handlers_come_back(number, capsys):
    cleaned = []

    @common.command_line
    def main(argv=None):
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            for other in (signal.SIGINT, signal.SIGTERM, number):
                os.kill(os.getpid(), other)
                time.sleep(0.001)
            cleaned.append(True)

    before = [signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        mine = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(SystemExit) as stopped:
            main([])
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == mine
    finally:
        for each, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(each, handler)
    assert stopped.value.code == 128 + number and cleaned
    assert capsys.readouterr().err == {signal.SIGINT: "interrupted\n", signal.SIGTERM: "terminated\n"}[number]


def test_a_second_signal_after_a_while_acts(monkeypatch):
    monkeypatch.setattr(common, "BURST_SECONDS", 0)
    heeded = []
    restore = common.heed_stops(heeded.append)
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        restore()
    assert heeded == [signal.SIGINT, signal.SIGTERM]


WINDOWS = """
import os, signal, sys
LACKS = {"fcntl", "grp", "resource", "termios", "tty", "pty", "readline", "curses", "syslog"}
class Windows:
    def find_spec(self, name, path=None, target=None):
        if name in LACKS:
            raise ImportError(f"Windows has no {name}")
sys.meta_path.insert(0, Windows())
import benchmark
assert not benchmark.main(["results/demo/cot.jsonl"])
assert "torch" not in sys.modules

sys.meta_path.pop(0)  # the libraries have branches of their own for Windows, which are not tried here
from trl import SFTConfig, SFTTrainer
sys.meta_path.insert(0, Windows())
for name in LACKS:
    sys.modules.pop(name, None)
for name in ("SIGKILL", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGUSR1", "alarm", "setitimer"):
    delattr(signal, name)
for name in ("fork", "geteuid", "getuid", "killpg", "sched_getaffinity", "uname"):
    delattr(os, name)
for path in sorted(os.listdir(".")):
    if path.endswith(".py"):
        __import__(path[:-3])
import inference
try:
    inference.main(["--help"])
except SystemExit as stop:
    assert not stop.code
"""


def test_windows_standard_library_is_enough_to_import_everything_and_to_score():
    done = subprocess.run([sys.executable, "-c", WINDOWS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "73.25" in done.stdout and "--model-id" in done.stdout


@pytest.mark.parametrize("path", ["C:\\models\\qwen", "C:/models/qwen", "d:qwen", "models\\qwen", "\\\\host\\share"])
@pytest.mark.parametrize("flag", ["--model-id", "--dataset"])
def test_a_path_of_windows_is_not_taken_for_a_hub_id(flag, path, tmp_path, capsys):
    err = refused(capsys, tmp_path / "a.jsonl", flag, path)
    assert f"{flag} {path}: no" in err and "from the hub" not in err  # "no such file" or "not a model folder"


def test_a_burst_that_reaches_a_process_leaves_no_traceback(tmp_path):
    output = tmp_path / "a.jsonl"
    process = start(output, "--limit", 240, "--batch-size", 4, stderr=subprocess.PIPE, text=True)
    wait_for_answers(output, 3)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.001)
    _, err = process.communicate(timeout=600)
    assert "Traceback" not in err and err.splitlines()[-1] in ("interrupted", "terminated")
    assert process.returncode in (130, 143)
