"""bench/generation.py beside a program in a process of its own: here a fake one that speaks vLLM's protocol."""

import json
import sys

import pytest
import torch

from bench import generation as bench
from common import UserError
from generation import generate, stop_token_ids

# Answers each turn with what a file holds, and writes down what it was started with and asked.
FAKE = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
record = open(folder / "asked", "w")
print(json.dumps({{"command": sys.argv[1:], "files": sorted(p.name for p in pathlib.Path(sys.argv[2]).iterdir())}}), file=record)
print(json.dumps({{"version": "1.2", "seconds": 3.0}}), flush=True)
for line in sys.stdin:
    print(line.strip(), file=record, flush=True)
    answers = folder / "answers"
    if not answers.exists():
        sys.exit("no kernel for this processor")
    print(json.dumps({{"token_ids": json.loads(answers.read_text())}}), flush=True)
"""


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs the benchmark on two of the demo's questions beside a fake that gives these answers, None for none."""
    monkeypatch.setattr(bench, "SETTLE", (0, 0))
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(python=sys.executable, folder=str(tmp_path)))
    fake.chmod(0o755)
    (tmp_path / "gsm8k").symlink_to(bench.ROOT / "demo/problems")

    def measure(answers, *flags):
        if answers is not None:
            (tmp_path / "answers").write_text(json.dumps(answers))
        model = ["--model-id", str(bench.ROOT / "demo/model"), "--shared", str(tmp_path), "--threads", "1"]
        size = ["--limit", "2", "--max-new-tokens", "4", "--repeats", "2"]
        code = bench.main([*model, *size, "--peer", "vllm", "--peer-python", str(fake), *flags])
        return code, [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]

    return measure


@pytest.fixture(scope="module")
def own():
    """(requests, stop ids, answers) of the same questions, made here."""
    args = bench.parse_args(["--limit", "2", "--max-new-tokens", "4"])
    tokenizer, model = bench.load(args, torch.device("cpu"))
    requests = bench.build_requests(args, "cot", model, tokenizer)
    done = {one.id: one.token_ids for one in generate(model, tokenizer, requests, note=lambda line: None)}
    return requests, sorted(stop_token_ids(model, tokenizer)), [done[one.id] for one in requests]


def test_a_peer_is_asked_the_same_and_compared(measured, own, capsys):
    requests, stop_ids, answers = own
    code, (start, *turns) = measured(answers, "--enforce-eager")
    assert code == 0
    assert "--enforce-eager" in start["command"] and "float32" in start["command"]
    assert {"config.json", "model.safetensors"} <= set(start["files"])
    question = {
        "prompts": [list(one.prompt_ids) for one in requests],
        "max_new_tokens": [4, 4],
        "stop_token_ids": stop_ids,
    }
    assert turns == [question, question]
    out = capsys.readouterr().out
    assert "vLLM 1.2" in out and "started in 3 s, which are not counted" in out and "between its turns" in out
    found = json.loads(out.splitlines()[-1])["cot"]
    assert found["vllm"]["rows_that_differ"] == found["plain"]["rows_that_differ"] == 0
    assert found["vllm"]["ratio"] > 0 and found["output_tokens"] == sum(map(len, answers))


def test_texts_of_a_peer_that_rounding_does_not_explain_fail(measured, own, capsys):
    _, _, answers = own
    code, _ = measured([answers[0], [answers[1][0] + 1, *answers[1][1:]]], "--without-plain")
    assert code == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["cot"]
    assert (found["vllm"]["rows_that_differ"], found["vllm"]["parted_beyond_rounding"]) == (1, 1)
    assert "plain" not in found


def test_a_peer_that_ends_is_named_with_what_it_wrote_last(measured, capsys):
    with pytest.raises(SystemExit) as end:
        measured(None)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "no kernel for this processor" in error and "--peer-python" in error


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--peer", "vllm"], "--peer and --peer-python go together"),
        (["--peer-python", "python"], "--peer and --peer-python go together"),
        (["--enforce-eager"], "pass --peer vllm too"),
        (["--limit", "0"], "must be 1 or more"),
        (["--model-id", "demo/model", "--shared", "nowhere"], "no gsm8k/ in it"),
    ],
)
def test_flags_of_the_benchmark_that_cannot_be_met_are_refused(flags, told, capsys):
    try:
        bench.parse_args(flags)
    except UserError as error:
        assert told in str(error)
    except SystemExit:
        assert told in capsys.readouterr().err
    else:
        raise AssertionError("accepted")
