"""An inference server answers as a local model does, and its faults lose no answer and double none."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

import common
import generation
import inference
import runs
import server as server_module
from model import find_tokenizer, load_tokenizer
from server import request_seed

DEMO = ["--model-id", "demo/model", "--dataset", "demo/problems"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in list(os.environ):  # a proxy would be asked for loopback too
        if name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)


STALL = 300  # seconds, of a server that stalls: a run that ends in the middle of one was not held up by it


class Fake(BaseHTTPRequestHandler):
    """Answers as `server.fault(number of try, body)` says: None answers, a name of FAULTS or a dict changes the reply."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["max_tokens"] == 1 and not self.server.probes:  # what the client asks first, to learn the server's ways
            return self.answer(None, body)
        key = json.dumps(body["prompt"]), body.get("seed")
        with self.server.lock:
            tries = self.server.tries[key] = self.server.tries.get(key, 0) + 1
            number = list(self.server.tries).index(key)
            self.server.requests.append((self.headers["authorization"], body))
            fault = self.server.fault(number, tries, body)
            self.server.answered += [key] if fault is None else []
        self.answer(fault, body)

    def answer(self, fault, body):
        prompt, seed = body["prompt"], body.get("seed")
        choice = {"index": 0, "text": f"{hash(str(prompt))} {seed}\n#### 4", "finish_reason": "stop"}
        count = len(prompt) if isinstance(prompt, list) else len(self.server.tokenizer(prompt)["input_ids"])
        usage = {"prompt_tokens": count, "completion_tokens": min(5, body["max_tokens"])}
        reply = {
            "id": "x",
            "object": "text_completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }
        status, headers, told, fault = 200, {"retry-after-ms": "10", "connection": "close"}, "no, not now", fault or {}
        if isinstance(fault, dict):
            told = fault.get("message", told)
            status, headers = fault.get("status", 200), headers | fault.get("headers", {})
            choice |= fault.get("choice", {})
            usage |= fault.get("usage", {})
            reply |= fault.get("reply", {})
        if fault == "dropped":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "stalled":
            self.server.waited_out += not self.server.stall.wait(STALL)
        text = json.dumps(reply if status == 200 else {"error": {"message": told}})
        text = {"malformed": text[:40], "empty": "{}", "page": "<html>"}.get(
            fault if isinstance(fault, str) else "", text
        )
        self.send_response(status)
        for name, value in (headers | {"content-type": "text/html" if fault == "page" else "application/json"}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text) + 50 * (fault == "cut")))
        self.end_headers()
        if fault == "dripping":
            for _ in range(600):
                self.wfile.write(b" ")
                if self.server.stall.wait(0.1):
                    return None
        self.wfile.write(text.encode())
        return None

    def handle(self):
        with contextlib.suppress(OSError):  # the client has given up on a stalled reply
            super().handle()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_tokenizer(str(ROOT / "demo/model")))


@pytest.fixture
def fake(monkeypatch, tokenizer):
    """A server on this machine that answers every request, until a test gives it faults; waits are short."""
    monkeypatch.setattr(server_module, "RETRY_AFTER_SECONDS", 0.02)
    with ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        server.tries, server.requests, server.answered, server.lock = {}, [], [], threading.Lock()
        server.fault, server.probes, server.tokenizer = lambda *_: None, False, tokenizer
        server.stall, server.waited_out = threading.Event(), 0
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        server.flag = ["--server", server.url]
        yield server
        server.stall.set()
        server.shutdown()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(fake, path, *flags):
    return inference.main([*DEMO, *fake.flag, "--output", str(path), *map(str, flags)])


def refusal(capsys, run, *arguments):
    """The one error line in which a run ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


FAULTS = {"status": 429}, {"status": 500}, "dropped", "stalled", "cut", "malformed", "empty"


def test_a_faulty_server_loses_no_answer_and_doubles_none(fake, tmp_path, monkeypatch):
    """Every prompt meets two of the faults before it is answered."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    monkeypatch.setattr(server_module, "REPLY_SECONDS", 1)
    monkeypatch.setattr(server_module, "WAIT_SECONDS", 0.01)
    fake.fault = lambda number, tries, body: [FAULTS[number % 7], FAULTS[(number // 2 + 3) % 7], None][
        min(tries, 3) - 1
    ]
    flags = "--mode", "thinking", "--limit", 14, "--num-samples", 2, "--concurrency", 16
    assert ask(fake, tmp_path / "a.jsonl", *flags) == 0
    lines = rows(tmp_path / "a.jsonl")
    assert [(row["id"], row["sample"]) for row in lines] == [(i, sample) for i in range(14) for sample in range(2)]
    assert len(fake.answered) == len(set(fake.answered)) == 28 and len({row["model_output"] for row in lines}) == 28
    assert all((row["finish_reason"], row["output_tokens"]) == ("stop", 5) for row in lines)
    key, body = fake.requests[0]
    assert key == "Bearer sk-very-secret"
    assert (body["model"], body["temperature"], body["top_p"], body["top_k"]) == ("demo/model", 0.6, 0.95, 20)
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())
    record = common.read_json(tmp_path / "a.run.json")
    assert record["decides"]["model_on_server"] == "demo/model" and "sha256 of tokenizer.json" in record["decides"]
    assert "sha256 of model.safetensors" not in record["decides"]


def test_a_stopped_run_asks_a_server_only_for_what_is_missing(fake, tmp_path):
    ask(fake, tmp_path / "a.jsonl", "--limit", 3)
    before = len(fake.requests)
    ask(fake, tmp_path / "a.jsonl", "--limit", 4)
    assert len(fake.requests) - before == 1 and len(rows(tmp_path / "a.jsonl")) == 4


NOT_WHOLE = "gives no whole reply to question 0: "
BAD_REPLIES = {
    "key refused": ({"status": 401}, "answers 401 to question 0: Error code: 401"),
    "model unknown": ({"status": 404}, "answers 404 to question 0"),
    "too long": ({"status": 400}, "answers 400 to question 0"),
    "always busy": ({"status": 503}, "answers 503 to question 0"),
    "an object without anything": ("empty", NOT_WHOLE + "it must hold one choice and holds none"),
    "two choices": ({"reply": {"choices": [{}, {}]}}, NOT_WHOLE + "it must hold one choice and holds 2"),
    "broken JSON": ("malformed", NOT_WHOLE + "it is not JSON"),
    "a web page": ("page", NOT_WHOLE + "it is not JSON"),
    "cut": ("cut", "gives no answer to question 0: peer closed connection"),
    "dropped": ("dropped", "gives no answer to question 0: Server disconnected"),
    "no text": ({"choice": {"text": None}}, NOT_WHOLE + "its choice has no text"),
    "filtered": ({"choice": {"finish_reason": "content_filter"}}, "must be stop or length and is 'content_filter'"),
    "no counts": ({"reply": {"usage": None}}, NOT_WHOLE + "it has no usage"),
    "a count that is text": ({"usage": {"prompt_tokens": "7"}}, NOT_WHOLE + "it has no usage"),
    "a count that is true": ({"usage": {"completion_tokens": True}}, NOT_WHOLE + "it has no usage"),
    "more tokens than asked for": ({"usage": {"completion_tokens": 513}}, "and 513 new ones, of at most 512"),
    "fewer tokens than none": ({"usage": {"completion_tokens": -1}}, "and -1 new ones"),
    "a text of no tokens": ({"usage": {"completion_tokens": 0}}, "and 0 new ones"),
    "an empty prompt": ({"usage": {"prompt_tokens": 0}}, "it counts 0 prompt tokens"),
    "another prompt": ({"usage": {"prompt_tokens": 3}}, "reads 3 tokens in the prompt of question 0, which has"),
    "sent on elsewhere": (
        {"status": 307, "headers": {"location": "http://localhost:9/v1"}},
        "sends the request on to http://localhost, which is not followed",
    ),
    "a reply without end": ("dripping", "gives no answer to question 0: no whole reply in time"),
    "no reply": ("stalled", "gives no answer to question 0: no whole reply in time"),
}


@pytest.mark.parametrize(("fault", "told"), BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_server_that_cannot_answer_is_told_with_the_cause(fault, told, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server_module, "TRIES", 1)
    monkeypatch.setattr(server_module, "REPLY_SECONDS", 1)
    fake.fault = lambda *_: fault
    line = refusal(capsys, ask, fake, tmp_path / "a.jsonl", "--limit", 1)
    assert told in line and "--server http://127.0.0.1" in line


def test_a_redirect_on_the_same_host_is_followed(fake, tmp_path):
    there = {"status": 307, "headers": {"location": f"{fake.url}/elsewhere/v1/completions"}}
    fake.fault = lambda number, tries, body: there if tries == 1 else None
    assert ask(fake, tmp_path / "a.jsonl", "--limit", 1) == 0


@pytest.mark.parametrize("key", ["sk-one\nX-Header: two", "sk-one\r", "sk-\u00e9t\u00e9", "sk one"], ids=ascii)
def test_a_key_that_cannot_be_is_told_and_not_shown(key, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    line = refusal(capsys, ask, fake, tmp_path / "a.jsonl", "--limit", 1)
    assert "OPENAI_API_KEY: character" in line and "sk" not in line.replace("ask", "") and not fake.requests


def test_a_server_without_encryption_asked_for_it_is_told(fake, tmp_path, capsys):
    address = ["--server", fake.url.replace("http:", "https:"), "--output", str(tmp_path / "a.jsonl")]
    line = refusal(capsys, inference.main, [*DEMO, *address, "--limit", "1"])
    assert "its certificate or encryption is not accepted: [SSL" in line and "SSL_CERT_FILE" in line


def test_a_port_where_nothing_listens_is_told_long_before_all_tries(tmp_path, monkeypatch, capsys):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)
        monkeypatch.setattr(server_module, "FIRST_SECONDS", server_module.FIRST_SECONDS - seconds)

    monkeypatch.setattr(server_module.asyncio, "sleep", sleep)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = ["--server", f"http://127.0.0.1:{free.getsockname()[1]}", "--output", str(tmp_path / "a.jsonl")]
        line = refusal(capsys, inference.main, [*DEMO, *address, "--limit", "1"])
    assert "cannot be reached: " in line and "is it running, and at this address?" in line
    assert 3 < sum(waits) < 9


@pytest.mark.parametrize("overwrite", ["always", "changed"])
def test_overwrite_drops_no_answers_where_the_server_gives_none(overwrite, fake, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    ask(fake, path, "--limit", 2)
    before = path.read_bytes()
    fake.fault, fake.probes = (lambda *_: {"status": 401}), True
    line = refusal(capsys, ask, fake, path, "--limit", 2, "--max-new-tokens", 9, "--overwrite", overwrite)
    assert "answers 401" in line and path.read_bytes() == before


WAITS = {  # what the headers say, and the seconds that are waited
    "seconds": ({"retry-after": "12"}, 12),
    "a part of one": ({"retry-after-ms": "250"}, 0.25),
    "an hour": ({"retry-after": "3600"}, 30),
    "forever": ({"retry-after": "inf"}, 30),
    "the past": ({"retry-after": "-5"}, 0),
    "a date that is past": ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
    "a date far away": ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, 30),
    "a word": ({"retry-after": "soon"}, 4.5),
    "no number": ({"retry-after": "nan"}, 4.5),
    "nothing": ({}, 4.5),
}


@pytest.mark.parametrize(("headers", "seconds"), WAITS.values(), ids=WAITS)
def test_a_server_can_ask_to_wait_up_to_a_bound(headers, seconds):
    assert server_module.asked_wait(headers, otherwise=4.5) == seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stop_does_not_wait_for_a_server_that_stalls(number, fake, tmp_path, monkeypatch, capsys):
    fake.fault = lambda place, tries, body: "stalled" if place > 2 else None
    append = runs.RunOutput.append

    def stop_after_three(self, answer):
        append(self, answer)
        if len(self.answers.places) == 3:
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

    monkeypatch.setattr(runs.RunOutput, "append", stop_after_three)
    with pytest.raises(SystemExit, match=str(128 + number)):
        ask(fake, tmp_path / "a.jsonl", "--limit", 20)
    assert not fake.waited_out
    told = capsys.readouterr()
    assert "3 answers are on disk" in told.out and "Traceback" not in told.err
    assert len(rows(tmp_path / "a.jsonl.part")) == 3


def test_an_error_that_stays_is_told_although_others_stall(fake, tmp_path, capsys):
    fake.fault = lambda place, tries, body: [None, {"status": 401}, "stalled"][min(place, 2)]
    assert "answers 401" in refusal(capsys, ask, fake, tmp_path / "a.jsonl", "--limit", 20)
    assert not fake.waited_out
    assert len(rows(tmp_path / "a.jsonl.part")) == 1  # what was answered is kept


def takes(ids=True, extended=True):
    """A server that refuses token ids, or parameters beyond the API."""

    def fault(number, tries, body):
        if isinstance(body["prompt"], list) and ids is not True:
            return {"usage": {"prompt_tokens": 1}} if ids == "as a list of prompts" else {"status": 400}
        if {"top_k", "stop_token_ids"} & set(body) and not extended:
            return {"status": 422}
        return None

    return fault


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("ids", [True, False, "as a list of prompts"])
def test_a_prompt_goes_as_token_ids_where_the_server_takes_them(ids, extended, fake, tokenizer, tmp_path, capsys):
    fake.fault, fake.probes = takes(ids, extended), True
    ask(fake, tmp_path / "a.jsonl", "--limit", 3)
    body = fake.requests[-1][1]
    assert isinstance(body["prompt"], list) == (ids is True)
    assert ("note: " in capsys.readouterr().out) == (ids is not True)
    assert "<|im_end|>" in body["stop"]
    assert ("stop_token_ids" in body) == extended


def test_a_server_that_adds_a_token_to_the_prompt_is_refused(fake, tokenizer, tmp_path, capsys):
    def second_bos(number, tries, body):
        if isinstance(body["prompt"], list):
            return {"status": 400}
        return {"usage": {"prompt_tokens": len(tokenizer(body["prompt"])["input_ids"]) + 1}}

    fake.fault, fake.probes = second_bos, True
    line = refusal(capsys, ask, fake, tmp_path / "a.jsonl", "--limit", 2)
    assert re.search(r"reads (\d+) tokens in the prompt of question [01], which has (\d+)", line)
    assert "or a server that takes token ids" in line


def test_top_k_is_not_left_out_in_silence(fake, tmp_path, capsys):
    fake.fault, fake.probes = takes(extended=False), True
    line = refusal(capsys, ask, fake, tmp_path / "a.jsonl", "--limit", 1, "--do-sample")
    assert "takes no top_k; pass --top-k 0" in line
    assert ask(fake, tmp_path / "b.jsonl", "--limit", 1, "--do-sample", "--top-k", 0) == 0


THOUGHTS = {  # the first reply, whether it is gone on behind, and whether the thought is closed first
    "open at its budget": ({"text": "Let me see", "finish_reason": "length"}, True, True),
    "open, with its token ids": ({"text": "Let me", "token_ids": [7] * 6, "finish_reason": "length"}, True, True),
    "closed before": ({"text": "Easy.\n</think>\n\nThe", "finish_reason": "length"}, True, False),
    "done before": ({"text": "Easy.\n</think>\n\n#### 4", "finish_reason": "stop"}, False, False),
}


@pytest.mark.parametrize(("first", "goes_on", "closed"), THOUGHTS.values(), ids=THOUGHTS)
def test_a_thinking_budget_is_kept_by_a_second_request(first, goes_on, closed, fake, tokenizer, tmp_path):
    used = {"completion_tokens": 6 if first["finish_reason"] == "length" else 4}
    fake.fault = lambda number, tries, body: (
        {"choice": first, "usage": used} if body["max_tokens"] == 6 else {"choice": {"text": " 4"}}
    )
    ask(fake, tmp_path / "a.jsonl", "--limit", 1, "--mode", "chatml_think_prefill", "--think-budget", 6)
    (row,) = rows(tmp_path / "a.jsonl")
    early_stop = tokenizer(common.EARLY_STOP)["input_ids"] if closed else []
    text = first["text"] + common.EARLY_STOP * closed
    bodies = [body for _, body in fake.requests]
    assert len(bodies) == 1 + goes_on and row["forced"] == closed
    assert row["model_output"] == text + " 4" * goes_on
    if goes_on:
        thought = first.get("token_ids") or tokenizer(first["text"])["input_ids"]
        assert bodies[1]["prompt"] == bodies[0]["prompt"] + thought + early_stop
        assert bodies[1]["max_tokens"] == 6 + inference.ANSWER_TOKENS - 6 - len(early_stop)
        assert row["output_tokens"] == 6 + len(early_stop) + 5


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--server", "localhost:8000"], "must be an address such as http://localhost:8000"),
        (["--server", "http://localhost:99999"], "must be an address such as http://localhost:8000"),
        (["--server", "http://localhost:port"], "must be an address such as http://localhost:8000"),
        (["--server", "http://[::1"], "must be an address such as http://localhost:8000"),
        (["--server", "http://me:key@localhost"], "holds a key"),
        (["--server", "http://localhost", "--dtype", "bf16"], "--dtype: cannot be combined with --server"),
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
    assert "pip install -r requirements-optional.txt" in capsys.readouterr().err


@pytest.mark.parametrize("room", ["none", "a little"])
def test_a_prompt_beyond_the_servers_context_gets_an_empty_answer_and_the_rest_goes_on(room, fake, tmp_path, capsys):
    refusal_of_length = {"status": 400, "message": "This model's maximum context length is 64 tokens."}

    def fault(number, tries, body):
        fits = len(body["prompt"]) < 85 or (room == "a little" and body["max_tokens"] == 1)
        return None if fits else refusal_of_length

    fake.fault, fake.probes = fault, True
    flags = fake, tmp_path / "a.jsonl", "--limit", 8
    if room == "a little":  # the limit is too large then, and not the prompt
        assert "maximum context length" in refusal(capsys, ask, *flags)
        return
    ask(*flags)
    answers = rows(tmp_path / "a.jsonl")
    too_long = [row for row in answers if row["finish_reason"] == "prompt_too_long"]
    assert 0 < len(too_long) < len(answers) == 8
    assert all(row["model_output"] == "" and row["prompt_tokens"] >= 85 for row in too_long)


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
