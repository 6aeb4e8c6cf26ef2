"""What a user or a file can get wrong: exit code 2 and one line that names the thing, never a traceback."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import benchmark
import common
import inference
from data import load_question_file

MODEL, PROBLEMS = ROOT / "demo/model", ROOT / "demo/problems"
WEIGHTS = MODEL / "model.safetensors"
QUESTION = {"question": "1 + 1?", "answer": "#### 2"}
ROW = {"id": 0, "question": "1 + 1?", "model_output": "#### 2", "ground_truth_answer": "#### 2"}


def infer(*flags, model=MODEL, dataset=PROBLEMS, output="a.jsonl", limit="2"):
    return inference.main, ["--model-id", model, "--dataset", dataset, "--output", output, "--limit", limit, *flags]


def score(*arguments):
    return benchmark.main, list(arguments)


def write(name, content):
    """A file in the current folder, from bytes, text or rows."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    with open(name, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
    return name


def model(changes, like=MODEL):
    """A model folder that differs from the demo model in these files; None leaves one out."""
    os.mkdir("model")
    for path in like.iterdir():
        if path.name not in changes:
            os.symlink(path, f"model/{path.name}")
    for name, content in changes.items():
        if content is not None:
            write(f"model/{name}", content)
    return "model"


def config(**changes):
    return {"config.json": json.dumps(json.loads((MODEL / "config.json").read_text()) | changes)}


def template(text):
    return {"chat_template.jinja": text}


def weights(change):
    """The demo model's weights as bytes, after `change` has edited their tensors in place."""
    tensors = load_file(WEIGHTS)
    change(tensors)
    save_file(tensors, "changed", {"format": "pt"})
    return {"model.safetensors": open("changed", "rb").read()}


def adapter(files=(), base=str(MODEL), **changes):
    """A LoRA adapter's folder; its query matrices fit the demo model unless `changes` says otherwise."""
    os.mkdir("adapter")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": 4,
                "target_modules": ["q_proj"]} | changes  # fmt: skip
    write("adapter/adapter_config.json", json.dumps(settings))
    tensors = {}
    for name, weight in load_file(WEIGHTS).items():
        if name.endswith("q_proj.weight"):
            lora = "base_model.model." + name.replace("weight", "lora_{}.weight")
            tensors[lora.format("A")] = torch.zeros(4, weight.shape[1])
            tensors[lora.format("B")] = torch.zeros(weight.shape[0], 4)
    save_file(tensors, "adapter/adapter_model.safetensors", {"format": "pt"})
    for name, content in dict(files).items():
        os.unlink(f"adapter/{name}") if content is None else write(f"adapter/{name}", content)
    return "adapter"


def dataset(test, train=None):
    os.mkdir("data")
    for split, content in (("test", test), ("train", train)):
        if content is not None:
            write(f"data/{split}.jsonl", content)
    return "data"


def cut(path, share=0.5):
    return path.read_bytes()[: int(path.stat().st_size * share)]


def flipped_header():
    data = bytearray(WEIGHTS.read_bytes())
    data[8:40] = bytes(byte ^ 0xFF for byte in data[8:40])
    return bytes(data)


# name: (what makes the input and the command, what its one line must hold)
FLAGS = {
    "mode unknown": (lambda: infer("--mode", "cott"), "--mode", "cott"),
    "flag unknown": (lambda: infer("--beams", "4"), "--beams"),
    "flag without its value": (lambda: infer("--seed"), "--seed"),
    "limit below one": (lambda: infer(limit="-1"), "--limit", "-1"),
    "limit not a number": (lambda: infer(limit="ten"), "--limit", "ten"),
    "batch size zero": (lambda: infer("--batch-size", "0"), "--batch-size"),
    "batch size not a number": (lambda: infer("--batch-size", "big"), "--batch-size", "big"),
    "few-shot-k in another mode": (lambda: infer("--few-shot-k", "2"), "--few-shot-k", "few_shot"),
    "few-shot-style in another mode": (lambda: infer("--few-shot-style", "turns"), "--few-shot-style"),
    "few-shot-k beyond the train split": (
        lambda: infer("--mode", "few_shot", "--few-shot-k", "99999"), "--few-shot-k", "3000"),
    "temperature where greedy": (lambda: infer("--temperature", "0.5"), "--temperature", "--do-sample"),
    "temperature zero": (lambda: infer("--do-sample", "--temperature", "0"), "--temperature"),
    "temperature not a number": (lambda: infer("--do-sample", "--temperature", "nan"), "--temperature"),
    "temperature infinite": (lambda: infer("--do-sample", "--temperature", "inf"), "--temperature"),
    "top-p above one": (lambda: infer("--do-sample", "--top-p", "1.5"), "--top-p"),
    "top-k below zero": (lambda: infer("--do-sample", "--top-k", "-1"), "--top-k"),
    "samples where greedy": (lambda: infer("--num-samples", "3"), "--num-samples", "--do-sample"),
    "samples beyond memory": (lambda: infer("--do-sample", "--num-samples", "9" * 12), "--num-samples"),
    "seed below zero": (lambda: infer("--seed", "-1"), "--seed"),
    "seed beyond 31 bits": (lambda: infer("--do-sample", "--seed", "9" * 25), "--seed"),
    "dtype unknown": (lambda: infer("--dtype", "fp64"), "--dtype", "fp64"),
    "device unknown": (lambda: infer("--device", "tpux"), "--device", "tpux"),
    "device without memory": (lambda: infer("--device", "meta"), "--device", "meta"),
    "device not there": (lambda: infer("--device", "cuda:99"), "--device", "cuda:99"),
    "prompts below one": (lambda: infer("--print-prompts", "0"), "--print-prompts"),
    "system prompt not text": (lambda: infer("--system-prompt", "\udcff"), "\\udcff", "UTF-8"),
    "output not .jsonl": (lambda: infer(output="a.txt"), "--output", "a.txt"),
    "output below a file": (lambda: infer(output=write("f", "") + "/a.jsonl"), "f/a.jsonl", "cannot be written"),
    "output is a folder": (lambda: (os.mkdir("d.jsonl"), infer(output="d.jsonl"))[1], "d.jsonl", "folder"),
    "output name too long": (lambda: infer(output="a" * 300 + ".jsonl"), "aaa", "cannot be written"),
    "output of another tool": (lambda: infer(output=write("b.jsonl", [ROW])), "b.jsonl", "--overwrite"),
    "run record damaged": (
        lambda: (write("a.run.json", "{"), infer())[1], "a.run.json", "not JSON"),
    "run record of another shape": (
        lambda: (write("a.run.json", '{"decides": 1, "segments": [{}]}'), infer())[1], "a.run.json", "--overwrite"),
    "benchmark without files": (lambda: score(), "FILE"),
    "benchmark flag unknown": (lambda: score("--nonsense", "x"), "--nonsense"),
    "benchmark thinking unknown": (lambda: score("x", "--thinking", "maybe"), "--thinking", "maybe"),
    "benchmark wrong below zero": (lambda: score("x", "--wrong", "-1"), "--wrong"),
    "benchmark json and wrong": (lambda: score("x", "--json", "--wrong", "1"), "--wrong", "--json"),
    "benchmark json and markdown": (lambda: score("x", "--json", "--markdown"), "--json", "--markdown"),
    "benchmark compares one": (lambda: score("x", "--compare"), "--compare"),
    "benchmark keeps none": (lambda: score("x", "--keep-correct", "y.jsonl", "--keep-most", "0"), "--keep-most"),
    "benchmark plot not .png": (lambda: score("x", "--plot", "x.pdf"), "--plot", "x.pdf"),
    "benchmark html in no folder": (lambda: score("x", "--html", "none/x.html"), "--html", "none/x.html"),
    "benchmark keeps over its input": (
        lambda: score(write("x.jsonl", [ROW]), "--keep-correct", "x.jsonl"), "--keep-correct", "overwrite"),
    "benchmark keeps without a run record": (
        lambda: score(write("x.jsonl", [ROW]), "--keep-correct", "y.jsonl"), "x.jsonl", "run record"),
}  # fmt: skip

MODELS = {
    "folder missing": (lambda: infer(model="./none"), "./none", "not a model folder"),
    "model is a file": (lambda: infer(model=write("f", "")), "--model-id f", "not a model folder"),
    "folder empty": (lambda: (os.mkdir("m"), infer(model="m"))[1], "--model-id m", "config.json"),
    "no weights": (lambda: infer(model=model({"model.safetensors": None})), "--model-id model", "safetensors"),
    "pickled weights alone": (
        lambda: infer(model=model({"model.safetensors": None, "pytorch_model.bin": b""})), "safetensors", "run code"),
    "config not JSON": (lambda: infer(model=model({"config.json": "{"})), "config.json", "not JSON"),
    "config a list": (lambda: infer(model=model({"config.json": "[]"})), "config.json", "object"),
    "config empty": (lambda: infer(model=model({"config.json": "{}"})), "--model-id model", "model_type"),
    "model type unknown": (lambda: infer(model=model(config(model_type="qwen9"))), "--model-id model", "qwen9"),
    "model type without text": (lambda: infer(model=model(config(model_type="vit"))), "--model-id model"),
    "quantized by what is not here": (
        lambda: infer(model=model(config(quantization_config={"quant_method": "gptq", "bits": 4}))), "--model-id model"),
    "sizes that do not fit the weights": (lambda: infer(model=model(config(hidden_size=64))), "--model-id model"),
    "a size that is text": (lambda: infer(model=model(config(hidden_size="x"))), "--model-id model"),
    "weights cut": (lambda: infer(model=model({"model.safetensors": cut(WEIGHTS)})), "--model-id model"),
    "weights empty": (lambda: infer(model=model({"model.safetensors": b""})), "--model-id model"),
    "weights with a flipped header": (
        lambda: infer(model=model({"model.safetensors": flipped_header()})), "--model-id model"),
    "weights that lack a key": (
        lambda: infer(model=model(weights(lambda w: w.pop("model.norm.weight")))), "missing keys", "model.norm.weight"),
    "weights of another shape": (
        lambda: infer(model=model(weights(lambda w: w.update({"model.norm.weight": torch.ones(7)})))),
        "model.norm.weight"),
    "weights that are NaN": (
        lambda: infer(model=model(weights(lambda w: w["model.norm.weight"].fill_(float("nan"))))), "question 0", "NaN"),
    "index names a shard that is not there": (
        lambda: infer(model=model({"model.safetensors": None, "x.safetensors": b"", "model.safetensors.index.json":
            '{"metadata": {}, "weight_map": {"model.norm.weight": "model-1.safetensors"}}'})), "model-1.safetensors"),
    "index names a pickle": (
        lambda: infer(model=model({"model.safetensors": None, "x.safetensors": b"", "x.bin": b"",
            "model.safetensors.index.json": '{"metadata": {}, "weight_map": {"model.norm.weight": "x.bin"}}'})),
        "index.json", "x.bin"),
    "generation config not JSON": (lambda: infer(model=model({"generation_config.json": "{"})), "generation_config"),
    "tokenizer damaged": (
        lambda: infer(model=model({"tokenizer.json": cut(MODEL / "tokenizer.json")})), "--model-id model", "tokenizer"),
    "tokenizer missing": (
        lambda: infer(model=model({"tokenizer.json": None, "tokenizer_config.json": None})), "tokenizer"),
    "tokenizer of a larger vocabulary": (
        lambda: infer(model=model(config(vocab_size=996) | weights(
            lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:996].clone()})))),
        "--model-id model", "tokenizer"),
    "no chat template": (lambda: infer(model=model(template(None))), "no chat template"),
    "attention from the hub": (lambda: infer(model=model(config(attn_implementation="a/b"))), "attn_implementation"),
    "chat template raises": (
        lambda: infer(model=model(template("{{ raise_exception('no system role') }}"))), "no system role"),
    "chat template not jinja": (lambda: infer(model=model(template("{% for %}"))), "chat template"),
    "hub not reachable": (lambda: infer(model="nobody/nothing"), "nobody/nothing", "pass a model folder"),
}  # fmt: skip

ADAPTERS = {
    "config not JSON": (lambda: infer(model=adapter({"adapter_config.json": "{"})), "adapter_config.json"),
    "names no base": (lambda: infer(model=adapter(base=None)), "adapter_config.json", "base"),
    "base is a number": (lambda: infer(model=adapter(base=5)), "adapter_config.json", "base"),
    "base missing": (lambda: infer(model=adapter(base="./none")), "./none"),
    "base is itself": (lambda: infer(model=adapter(base="adapter")), "adapter", "base"),
    "no weights": (lambda: infer(model=adapter({"adapter_model.safetensors": None})), "adapter_model.safetensors"),
    "pickled weights alone": (
        lambda: infer(model=adapter({"adapter_model.safetensors": None, "adapter_model.bin": b""})),
        "adapter_model.safetensors"),
    "weights cut": (
        lambda: infer(model=adapter({"adapter_model.safetensors": b"\x40"})), "--model-id adapter"),
    "rank that does not fit": (lambda: infer(model=adapter(r=8)), "--model-id adapter", "q_proj"),
    "weights of other layers": (lambda: infer(model=adapter(target_modules=["v_proj"])), "adapter_model.safetensors", "v_proj"),
    "layers that are not there": (lambda: infer(model=adapter(target_modules=["nope"])), "--model-id adapter", "nope"),
    "kind unknown": (lambda: infer(model=adapter(peft_type="MAGIC")), "--model-id adapter", "MAGIC"),
}  # fmt: skip

GOOD = json.dumps(QUESTION) + "\n"
DATA = {
    "folder missing": (lambda: infer(dataset="./none"), "--dataset ./none"),
    "dataset is a file": (lambda: infer(dataset=write("f", "")), "--dataset f"),
    "split missing": (lambda: infer("--split", "validation", dataset=dataset(GOOD)), "validation.jsonl"),
    "train split missing": (lambda: infer("--mode", "few_shot", dataset=dataset(GOOD)), "train.jsonl"),
    "empty": (lambda: infer(dataset=dataset("")), "test.jsonl", "no questions"),
    "blank": (lambda: infer(dataset=dataset("\n \n")), "test.jsonl", "no questions"),
    "a line not JSON": (lambda: infer(dataset=dataset(GOOD + "{\n")), "test.jsonl:2"),
    "a line not an object": (lambda: infer(dataset=dataset(GOOD + "[]\n")), "test.jsonl:2"),
    "a line not UTF-8": (lambda: infer(dataset=dataset(GOOD.encode() + b'{"question": "\xff"}\n')), "test.jsonl:2"),
    "no answer": (lambda: infer(dataset=dataset(GOOD + '{"question": "?"}\n')), "test.jsonl:2", "'answer'"),
    "question a number": (lambda: infer(dataset=dataset([QUESTION | {"question": 7}])), "test.jsonl:1", "'question'"),
    "question null": (lambda: infer(dataset=dataset([QUESTION | {"question": None}])), "test.jsonl:1", "'question'"),
    "answer a list": (lambda: infer(dataset=dataset([QUESTION | {"answer": []}])), "test.jsonl:1", "'answer'"),
    "half a surrogate pair": (
        lambda: infer(dataset=dataset([QUESTION | {"question": "\ud800"}])), "test.jsonl:1", "'question'"),
    "completions missing": (lambda: score("none.jsonl"), "none.jsonl", "cannot be read"),
    "completions in a folder": (lambda: (os.mkdir("d"), score("d"))[1], "d:", "not a plain file"),
    "completions empty": (lambda: score(write("x.jsonl", "")), "x.jsonl", "no line"),
    "completions not JSON": (lambda: score(write("x.jsonl", json.dumps(ROW) + "\n{")), "x.jsonl:2"),
    "completions without output": (
        lambda: score(write("x.jsonl", [{"id": 0, "question": "", "ground_truth_answer": ""}])), "x.jsonl:1",
        "'model_output'"),
    "completion null": (lambda: score(write("x.jsonl", [ROW | {"model_output": None}])), "x.jsonl:1", "'model_output'"),
    "id a list": (lambda: score(write("x.jsonl", [ROW | {"id": [1]}])), "x.jsonl:1", "'id'"),
    "no number to hold against": (
        lambda: score(write("x.jsonl", [ROW | {"ground_truth_answer": "two"}])), "x.jsonl:1", "####"),
    "completion twice": (lambda: score(write("x.jsonl", [ROW, ROW])), "x.jsonl", "repeat"),
    "other questions compared": (
        lambda: score(write("x.jsonl", [ROW]), write("y.jsonl", [ROW | {"question": "another?"}]), "--compare"), "--compare", "x.jsonl"),
}  # fmt: skip

CASES = {
    f"{kind}: {name}": case
    for kind, cases in (("flags", FLAGS), ("model", MODELS), ("adapter", ADAPTERS), ("data", DATA))
    for name, case in cases.items()
}
AS_PROCESSES = (
    "flags: mode unknown",
    "flags: benchmark compares one",
    "model: weights that lack a key",
    "adapter: weights of other layers",
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def assert_one_line(case, code, err):
    assert_error(CASES[case][1:], code, err)


def assert_error(words, code, err):
    """Exit code 2, and one line on stderr that holds these words."""
    lines = [line for line in err.splitlines() if line.strip() and "question/s" not in line]  # less progress bars
    assert (code, len(lines)) == (2, 1), err
    assert all(word in lines[0] for word in words), err


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_line_that_names_it(case, capfd):
    main, arguments = CASES[case][0]()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert_one_line(case, stop.value.code, capfd.readouterr().err)


@pytest.mark.parametrize("case", AS_PROCESSES)
def test_bad_input_ends_a_process_in_one_line(case):
    main, arguments = CASES[case][0]()
    command = [sys.executable, ROOT / f"{main.__module__}.py", *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert_one_line(case, result.returncode, result.stderr)


anything = st.none() | st.integers() | st.text() | st.just("\ud800") | st.lists(st.none())
lines = st.binary() | st.dictionaries(st.sampled_from(["question", "answer", "id"]), anything).map(
    lambda row: json.dumps(row).encode()
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(lines, max_size=4))
def test_any_bytes_give_questions_of_text_or_an_error_that_names_file_and_line(tmp_path, lines):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        questions = load_question_file(path)
    except common.UserError as error:
        assert re.match(rf"{re.escape(str(path))}:(\d+: | holds no questions| is UTF-16 text)", str(error))
    else:
        assert all((item.question + item.answer).encode() is not None for item in questions)
