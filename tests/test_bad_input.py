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


CASES = {}


def named(*words):
    """A case: the function makes a bad input and returns the `main` to call with its arguments; the one line holds the words."""

    def register(case):
        assert case.__name__ not in CASES
        CASES[case.__name__] = (case, *words)
        return case

    return register


@named("--mode", "cott")
def flags_mode_unknown():
    return infer("--mode", "cott")


@named("--beams")
def flags_flag_unknown():
    return infer("--beams", "4")


@named("--seed")
def flags_flag_without_its_value():
    return infer("--seed")


@named("--limit", "-1")
def flags_limit_below_one():
    return infer(limit="-1")


@named("--limit", "ten")
def flags_limit_not_a_number():
    return infer(limit="ten")


@named("--batch-size")
def flags_batch_size_zero():
    return infer("--batch-size", "0")


@named("--batch-size", "big")
def flags_batch_size_not_a_number():
    return infer("--batch-size", "big")


@named("--few-shot-k", "few_shot")
def flags_few_shot_k_in_another_mode():
    return infer("--few-shot-k", "2")


@named("--few-shot-style")
def flags_few_shot_style_in_another_mode():
    return infer("--few-shot-style", "turns")


@named("--few-shot-k", "3000")
def flags_few_shot_k_beyond_the_train_split():
    return infer("--mode", "few_shot", "--few-shot-k", "99999")


@named("--temperature", "--do-sample")
def flags_temperature_where_greedy():
    return infer("--temperature", "0.5")


@named("--temperature")
def flags_temperature_zero():
    return infer("--do-sample", "--temperature", "0")


@named("--temperature")
def flags_temperature_not_a_number():
    return infer("--do-sample", "--temperature", "nan")


@named("--temperature")
def flags_temperature_infinite():
    return infer("--do-sample", "--temperature", "inf")


@named("--top-p")
def flags_top_p_above_one():
    return infer("--do-sample", "--top-p", "1.5")


@named("--top-k")
def flags_top_k_below_zero():
    return infer("--do-sample", "--top-k", "-1")


@named("--num-samples", "--do-sample")
def flags_samples_where_greedy():
    return infer("--num-samples", "3")


@named("--num-samples")
def flags_samples_beyond_memory():
    return infer("--do-sample", "--num-samples", "9" * 12)


@named("--seed")
def flags_seed_below_zero():
    return infer("--seed", "-1")


@named("--seed")
def flags_seed_beyond_31_bits():
    return infer("--do-sample", "--seed", "9" * 25)


@named("--dtype", "fp64")
def flags_dtype_unknown():
    return infer("--dtype", "fp64")


@named("--device", "tpux")
def flags_device_unknown():
    return infer("--device", "tpux")


@named("--device", "meta")
def flags_device_without_memory():
    return infer("--device", "meta")


@named("--device", "cuda:99")
def flags_device_not_there():
    return infer("--device", "cuda:99")


@named("--print-prompts")
def flags_prompts_below_one():
    return infer("--print-prompts", "0")


@named("\\udcff", "UTF-8")
def flags_system_prompt_not_text():
    return infer("--system-prompt", "\udcff")


@named("--output", "a.txt")
def flags_output_not_jsonl():
    return infer(output="a.txt")


@named("f/a.jsonl", "cannot be written")
def flags_output_below_a_file():
    return infer(output=write("f", "") + "/a.jsonl")


@named("d.jsonl", "folder")
def flags_output_is_a_folder():
    os.mkdir("d.jsonl")
    return infer(output="d.jsonl")


@named("aaa", "cannot be written")
def flags_output_name_too_long():
    return infer(output="a" * 300 + ".jsonl")


@named("b.jsonl", "--overwrite")
def flags_output_of_another_tool():
    return infer(output=write("b.jsonl", [ROW]))


@named("a.run.json", "not JSON")
def flags_run_record_damaged():
    write("a.run.json", "{")
    return infer()


@named("a.run.json", "--overwrite")
def flags_run_record_of_another_shape():
    write("a.run.json", '{"decides": 1, "segments": [{}]}')
    return infer()


@named("FILE")
def flags_benchmark_without_files():
    return score()


@named("--nonsense")
def flags_benchmark_flag_unknown():
    return score("--nonsense", "x")


@named("--thinking", "maybe")
def flags_benchmark_thinking_unknown():
    return score("x", "--thinking", "maybe")


@named("--wrong")
def flags_benchmark_wrong_below_zero():
    return score("x", "--wrong", "-1")


@named("--wrong", "--json")
def flags_benchmark_json_and_wrong():
    return score("x", "--json", "--wrong", "1")


@named("--json", "--markdown")
def flags_benchmark_json_and_markdown():
    return score("x", "--json", "--markdown")


@named("--compare")
def flags_benchmark_compares_one():
    return score("x", "--compare")


@named("x.jsonl", "twice", "--compare")
def flags_benchmark_compares_a_file_with_itself():
    return score(write("x.jsonl", [ROW]), "./x.jsonl", "--compare")


@named("x.jsonl", "twice", "--pool-seeds")
def flags_benchmark_pools_a_file_twice():
    return score(write("x.jsonl", [ROW]), "x.jsonl", "--pool-seeds")


@named("--keep-most")
def flags_benchmark_keeps_none():
    return score("x", "--keep-correct", "y.jsonl", "--keep-most", "0")


@named("--plot", "x.pdf")
def flags_benchmark_plot_not_png():
    return score("x", "--plot", "x.pdf")


@named("--html", "none/x.html")
def flags_benchmark_html_in_no_folder():
    return score("x", "--html", "none/x.html")


@named("--keep-correct", "overwrite")
def flags_benchmark_keeps_over_its_input():
    return score(write("x.jsonl", [ROW]), "--keep-correct", "x.jsonl")


@named("x.jsonl", "run record")
def flags_benchmark_keeps_without_a_run_record():
    return score(write("x.jsonl", [ROW]), "--keep-correct", "y.jsonl")


@named("./none", "not a model folder")
def model_folder_missing():
    return infer(model="./none")


@named("--model-id f", "not a model folder")
def model_model_is_a_file():
    return infer(model=write("f", ""))


@named("--model-id m", "config.json")
def model_folder_empty():
    os.mkdir("m")
    return infer(model="m")


@named("--model-id model", "safetensors")
def model_no_weights():
    return infer(model=model({"model.safetensors": None}))


@named("safetensors", "run code")
def model_pickled_weights_alone():
    return infer(model=model({"model.safetensors": None, "pytorch_model.bin": b""}))


@named("config.json", "not JSON")
def model_config_not_json():
    return infer(model=model({"config.json": "{"}))


@named("config.json", "object")
def model_config_a_list():
    return infer(model=model({"config.json": "[]"}))


@named("--model-id model", "model_type")
def model_config_empty():
    return infer(model=model({"config.json": "{}"}))


@named("--model-id model", "qwen9")
def model_model_type_unknown():
    return infer(model=model(config(model_type="qwen9")))


@named("--model-id model")
def model_model_type_without_text():
    return infer(model=model(config(model_type="vit")))


@named("--model-id model")
def model_quantized_by_what_is_not_here():
    return infer(model=model(config(quantization_config={"quant_method": "gptq", "bits": 4})))


@named("--model-id model")
def model_sizes_that_do_not_fit_the_weights():
    return infer(model=model(config(hidden_size=64)))


@named("--model-id model")
def model_a_size_that_is_text():
    return infer(model=model(config(hidden_size="x")))


@named("--model-id model")
def model_weights_cut():
    return infer(model=model({"model.safetensors": cut(WEIGHTS)}))


@named("--model-id model")
def model_weights_empty():
    return infer(model=model({"model.safetensors": b""}))


@named("--model-id model")
def model_weights_with_a_flipped_header():
    return infer(model=model({"model.safetensors": flipped_header()}))


@named("missing keys", "model.norm.weight")
def model_weights_that_lack_a_key():
    return infer(model=model(weights(lambda w: w.pop("model.norm.weight"))))


@named("model.norm.weight")
def model_weights_of_another_shape():
    return infer(model=model(weights(lambda w: w.update({"model.norm.weight": torch.ones(7)}))))


@named("question 0", "NaN")
def model_weights_that_are_nan():
    return infer(model=model(weights(lambda w: w["model.norm.weight"].fill_(float("nan")))))


@named("model-1.safetensors")
def model_index_names_a_shard_that_is_not_there():
    return infer(
        model=model(
            {
                "model.safetensors": None,
                "x.safetensors": b"",
                "model.safetensors.index.json": '{"metadata": {}, "weight_map": {"model.norm.weight": "model-1.safetensors"}}',
            }
        )
    )


@named("index.json", "x.bin")
def model_index_names_a_pickle():
    return infer(
        model=model(
            {
                "model.safetensors": None,
                "x.safetensors": b"",
                "x.bin": b"",
                "model.safetensors.index.json": '{"metadata": {}, "weight_map": {"model.norm.weight": "x.bin"}}',
            }
        )
    )


@named("generation_config")
def model_generation_config_not_json():
    return infer(model=model({"generation_config.json": "{"}))


@named("--model-id model", "tokenizer")
def model_tokenizer_damaged():
    return infer(model=model({"tokenizer.json": cut(MODEL / "tokenizer.json")}))


@named("tokenizer")
def model_tokenizer_missing():
    return infer(model=model({"tokenizer.json": None, "tokenizer_config.json": None}))


@named("--model-id model", "tokenizer")
def model_tokenizer_of_a_larger_vocabulary():
    return infer(
        model=model(
            config(vocab_size=996)
            | weights(lambda w: w.update({"model.embed_tokens.weight": w["model.embed_tokens.weight"][:996].clone()}))
        )
    )


@named("no chat template")
def model_no_chat_template():
    return infer(model=model(template(None)))


@named("attn_implementation")
def model_attention_from_the_hub():
    return infer(model=model(config(attn_implementation="a/b")))


@named("no system role")
def model_chat_template_raises():
    return infer(model=model(template("{{ raise_exception('no system role') }}")))


@named("chat template")
def model_chat_template_not_jinja():
    return infer(model=model(template("{% for %}")))


@named("nobody/nothing", "pass a model folder")
def model_hub_not_reachable():
    return infer(model="nobody/nothing")


@named("adapter_config.json")
def adapter_config_not_json():
    return infer(model=adapter({"adapter_config.json": "{"}))


@named("adapter_config.json", "base")
def adapter_names_no_base():
    return infer(model=adapter(base=None))


@named("adapter_config.json", "base")
def adapter_base_is_a_number():
    return infer(model=adapter(base=5))


@named("./none")
def adapter_base_missing():
    return infer(model=adapter(base="./none"))


@named("adapter", "base")
def adapter_base_is_itself():
    return infer(model=adapter(base="adapter"))


@named("adapter_model.safetensors")
def adapter_no_weights():
    return infer(model=adapter({"adapter_model.safetensors": None}))


@named("adapter_model.safetensors")
def adapter_pickled_weights_alone():
    return infer(model=adapter({"adapter_model.safetensors": None, "adapter_model.bin": b""}))


@named("--model-id adapter")
def adapter_weights_cut():
    return infer(model=adapter({"adapter_model.safetensors": b"\x40"}))


@named("--model-id adapter", "q_proj")
def adapter_rank_that_does_not_fit():
    return infer(model=adapter(r=8))


@named("adapter_model.safetensors", "v_proj")
def adapter_weights_of_other_layers():
    return infer(model=adapter(target_modules=["v_proj"]))


@named("--model-id adapter", "nope")
def adapter_layers_that_are_not_there():
    return infer(model=adapter(target_modules=["nope"]))


@named("--model-id adapter", "MAGIC")
def adapter_kind_unknown():
    return infer(model=adapter(peft_type="MAGIC"))


GOOD = json.dumps(QUESTION) + "\n"


@named("--dataset ./none")
def data_folder_missing():
    return infer(dataset="./none")


@named("--dataset f")
def data_dataset_is_a_file():
    return infer(dataset=write("f", ""))


@named("validation.jsonl")
def data_split_missing():
    return infer("--split", "validation", dataset=dataset(GOOD))


@named("train.jsonl")
def data_train_split_missing():
    return infer("--mode", "few_shot", dataset=dataset(GOOD))


@named("test.jsonl", "no questions")
def data_empty():
    return infer(dataset=dataset(""))


@named("test.jsonl", "no questions")
def data_blank():
    return infer(dataset=dataset("\n \n"))


@named("test.jsonl:2")
def data_a_line_not_json():
    return infer(dataset=dataset(GOOD + "{\n"))


@named("test.jsonl:2")
def data_a_line_not_an_object():
    return infer(dataset=dataset(GOOD + "[]\n"))


@named("test.jsonl:2")
def data_a_line_not_utf_8():
    return infer(dataset=dataset(GOOD.encode() + b'{"question": "\xff"}\n'))


@named("test.jsonl:2", "'answer'")
def data_no_answer():
    return infer(dataset=dataset(GOOD + '{"question": "?"}\n'))


@named("test.jsonl:1", "'question'")
def data_question_a_number():
    return infer(dataset=dataset([QUESTION | {"question": 7}]))


@named("test.jsonl:1", "'question'")
def data_question_null():
    return infer(dataset=dataset([QUESTION | {"question": None}]))


@named("test.jsonl:1", "'answer'")
def data_answer_a_list():
    return infer(dataset=dataset([QUESTION | {"answer": []}]))


@named("test.jsonl:1", "'question'")
def data_half_a_surrogate_pair():
    return infer(dataset=dataset([QUESTION | {"question": "\ud800"}]))


@named("none.jsonl", "cannot be read")
def data_completions_missing():
    return score("none.jsonl")


@named("d:", "not a plain file")
def data_completions_in_a_folder():
    os.mkdir("d")
    return score("d")


@named("x.jsonl", "no line")
def data_completions_empty():
    return score(write("x.jsonl", ""))


@named("x.jsonl:2")
def data_completions_not_json():
    return score(write("x.jsonl", json.dumps(ROW) + "\n{"))


@named("x.jsonl:1", "'model_output'")
def data_completions_without_output():
    return score(write("x.jsonl", [{"id": 0, "question": "", "ground_truth_answer": ""}]))


@named("x.jsonl:1", "'model_output'")
def data_completion_null():
    return score(write("x.jsonl", [ROW | {"model_output": None}]))


@named("x.jsonl:1", "'id'")
def data_id_a_list():
    return score(write("x.jsonl", [ROW | {"id": [1]}]))


@named("x.jsonl:1", "####")
def data_no_number_to_hold_against():
    return score(write("x.jsonl", [ROW | {"ground_truth_answer": "two"}]))


@named("x.jsonl:1", "'doc' lacks the key 'question'", "'Body'", "--question-column")
def data_harness_document_with_other_keys():
    return score(write("x.jsonl", [{"doc_id": 0, "doc": {"Body": "1 + 1?"}, "target": "2", "resps": [["#### 2"]]}]))


@named("--few-shot-file x.txt", "ends in .jsonl")
def data_worked_examples_of_another_kind():
    return infer("--mode", "few_shot", "--few-shot-file", write("x.txt", "?"))


@named("--few-shot-file x.jsonl", "question 1", "'because'")
def data_worked_example_without_a_number():
    return infer(
        "--mode", "few_shot", "--few-shot-file", write("x.jsonl", [QUESTION, QUESTION | {"answer": "because"}])
    )


@named("data", "train question 2", "'because'")
def data_worked_example_of_the_train_split_without_a_number():
    return infer(
        "--mode", "few_shot", dataset=dataset([QUESTION], [QUESTION, QUESTION, QUESTION | {"answer": "because"}])
    )


@named("data/test.jsonl:1", "holds no question")
def data_question_blank():
    return infer(dataset=dataset([QUESTION | {"question": " \n"}]))


@named("data/test.jsonl:1", "'topic'", "--keep-columns")
def data_kept_column_missing():
    return infer("--keep-columns", "topic", dataset=dataset([QUESTION]))


@named("data/test.jsonl:1", "--keep-columns", "JSON")
def data_kept_value_that_is_no_json():
    return infer("--keep-columns", "share", dataset=dataset([QUESTION | {"share": float("nan")}]))


@named("x.jsonl", "repeat")
def data_completion_twice():
    return score(write("x.jsonl", [ROW, ROW]))


@named("--compare", "x.jsonl")
def data_other_questions_compared():
    return score(write("x.jsonl", [ROW]), write("y.jsonl", [ROW | {"question": "another?"}]), "--compare")


AS_PROCESSES = (
    "flags_mode_unknown",
    "flags_benchmark_compares_one",
    "model_weights_that_lack_a_key",
    "adapter_weights_of_other_layers",
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
