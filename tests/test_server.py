"""An inference server answers as a local model does, and its faults lose no answer and double none."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

import common
import generation
import inference
import server as server_module
from server import request_seed

DEMO = ["--model-id", "demo/model", "--dataset", "demo/problems"]
FAULTS = "429", "500", "dropped", "stalled", "cut", "malformed", "empty"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in list(os.environ):  # a proxy would be asked for loopback too
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def faulty(monkeypatch):
    """A server whose every prompt meets two of the FAULTS before it is answered, and the requests it got."""
    monkeypatch.setattr(server_module, "SERVER_TIMEOUT", 1)
    tries, answered, requests, lock = Counter(), Counter(), [], threading.Lock()

    class Faulty(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            key = body["prompt"], body.get("seed")
            with lock:
                number = list(tries).index(key) if key in tries else len(tries)
                tries[key] += 1
                requests.append((self.headers["authorization"], body))
                faults = FAULTS[number % len(FAULTS)], FAULTS[(number // 2 + 3) % len(FAULTS)], None
                fault = server.always or faults[min(tries[key] - 1, 2)]
            if fault is None:
                with lock:
                    answered[key] += 1
            self.answer(fault, body)

        def answer(self, fault, body):
            usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
            choice = {"index": 0, "text": f"{len(body['prompt'])} {body.get('seed')}\n#### 4", "finish_reason": "stop"}
            reply = json.dumps(
                {
                    "id": "x",
                    "object": "text_completion",
                    "created": 0,
                    "model": "m",
                    "choices": [choice],
                    "usage": usage,
                }
            )
            if fault == "dropped":
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault == "stalled":
                time.sleep(1.5)
            status = int(fault) if fault and fault.isdigit() else 200
            reply = {"cut": reply, "malformed": reply[:40], "empty": "{}"}.get(fault, reply)
            if status != 200:
                reply = json.dumps({"error": {"message": "no, not now"}})
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("retry-after-ms", "10")
            self.send_header("content-length", str(len(reply) + 50 * (fault == "cut")))
            self.end_headers()
            self.wfile.write(reply.encode())
            self.close_connection = True

        def handle(self):
            with contextlib.suppress(OSError):  # the client has given up on a stalled reply
                super().handle()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Faulty) as server:
        server.always, server.requests, server.answered = None, requests, answered
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.flag = ["--server", f"http://127.0.0.1:{server.server_address[1]}"]
        yield server
        server.shutdown()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_faulty_server_loses_no_answer_and_doubles_none(faulty, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    flags = [*DEMO, *faulty.flag, "--mode", "thinking", "--limit", "14", "--num-samples", "2", "--concurrency", "16"]
    assert inference.main([*flags, "--output", str(tmp_path / "a.jsonl")]) == 0
    lines = rows(tmp_path / "a.jsonl")
    assert [(row["id"], row["sample"]) for row in lines] == [(i, sample) for i in range(14) for sample in range(2)]
    assert len(faulty.answered) == 28 and len({row["model_output"] for row in lines}) == 28
    assert all((row["finish_reason"], row["prompt_tokens"], row["output_tokens"]) == ("stop", 7, 5) for row in lines)
    key, body = faulty.requests[0]
    assert key == "Bearer sk-very-secret"
    assert (body["model"], body["temperature"], body["top_p"], body["top_k"]) == ("demo/model", 0.6, 0.95, 20)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())
    record = common.read_json(tmp_path / "a.run.json")
    assert record["decides"]["model_on_server"] == "demo/model" and "sha256 of tokenizer.json" in record["decides"]
    assert "sha256 of model.safetensors" not in record["decides"]


def test_a_stopped_run_asks_a_server_only_for_what_is_missing(faulty, tmp_path):
    flags = [*DEMO, *faulty.flag, "--output", str(tmp_path / "a.jsonl")]
    inference.main([*flags, "--limit", "3"])
    before = len(faulty.requests)
    inference.main([*flags, "--limit", "4"])
    assert len({body["prompt"] for _, body in faulty.requests[before:]}) == 1 and len(rows(tmp_path / "a.jsonl")) == 4


@pytest.mark.parametrize(
    ("always", "told"),
    [("404", "answers 404 to question 0"), ("401", "answers 401"), ("empty", "lack text, finish_reason or usage")],
)
def test_a_server_that_cannot_answer_is_told_in_one_line(faulty, always, told, tmp_path, monkeypatch, capsys):
    faulty.always = always
    monkeypatch.setattr(server_module, "SERVER_RETRIES", 1)
    with pytest.raises(SystemExit, match="2"):
        inference.main([*DEMO, *faulty.flag, "--limit", "1", "--output", str(tmp_path / "a.jsonl")])
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and told in errors[0]


def test_no_server_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server_module, "SERVER_RETRIES", 0)
    with pytest.raises(SystemExit, match="2"):
        inference.main([*DEMO, "--server", "http://127.0.0.1:9", "--limit", "1", "--output", str(tmp_path / "a.jsonl")])
    assert "gives no answer to question 0: Connection error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--server", "localhost:8000"], "must be an address such as http://localhost:8000"),
        (["--server", "http://me:key@localhost"], "holds a key"),
        (["--server", "http://localhost", "--dtype", "bf16"], "--dtype: cannot be combined with --server"),
        (
            ["--server", "http://localhost", "--mode", "thinking", "--think-budget", "9"],
            "--think-budget: cannot be combined with --server",
        ),
        (["--concurrency", "4"], "--concurrency: needs --server"),
        (["--tokenizer", "demo/model"], "--tokenizer: needs --server"),
    ],
)
def test_flags_that_a_server_cannot_keep_are_refused(flags, told, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        inference.main([*DEMO, *flags, "--output", str(tmp_path / "a.jsonl")])
    assert told in capsys.readouterr().err


def test_without_the_client_its_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SystemExit, match="2"):
        inference.main([*DEMO, "--server", "http://localhost:1", "--limit", "1", "--output", str(tmp_path / "a.jsonl")])
    assert "pip install openai" in capsys.readouterr().err


def test_transformers_serve_gives_the_greedy_answers_of_the_local_model(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["serve", "demo/model", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-c", code, *command], cwd=ROOT, stdout=log, stderr=log)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
        for mode in ("cot", "chatml_think_prefill"):
            flags = [*DEMO, "--mode", mode, "--limit", "6", "--max-new-tokens", "200"]
            inference.main([*flags, "--output", str(tmp_path / "local.jsonl"), "--overwrite"])
            address = ["--server", f"http://127.0.0.1:{port}/v1", "--concurrency", "3"]
            inference.main([*flags, *address, "--output", str(tmp_path / "served.jsonl"), "--overwrite"])
            for local, served in zip(rows(tmp_path / "local.jsonl"), rows(tmp_path / "served.jsonl"), strict=True):
                assert served == local
    finally:
        server.kill()
        server.wait()


def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=1).status == 200
    except OSError:
        return False


def test_seeds_of_requests_differ_by_sample_and_stay():
    request = generation.Request(3, 1, [], 5)
    others = [generation.Request(i, sample, [], 5) for i in range(20) for sample in range(20)]
    assert len({request_seed(42, other) for other in others}) == 400
    assert request_seed(42, request) == request_seed(42, request) != request_seed(43, request)
    assert re.fullmatch(r"\d+", str(request_seed(42, request))) and request_seed(42, request) < 2**31
