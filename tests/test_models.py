"""Models, adapters and GGUF files as people hold them: loaded whole, with the logits and texts of transformers and peft, or refused by name."""

import copy
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import peft
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_bad_input import adapter, assert_error, config, infer, model, own_folder, weights, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import model as product
import train
import train_lora
from common import UserError, collecting_later, read_json
from generation import Request, generate
from model import (
    ADAPTER_TYPES,
    choose_device,
    find_model,
    free_memory,
    load_model,
    load_tokenizer,
)

assert own_folder  # every test here runs in a folder of its own, too

DEMO, CPU = ROOT / "demo/model", torch.device("cpu")
TOKENS = 1000  # the demo tokenizer's
SMALL = {
    "vocab_size": TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "eos_token_id": 997,
    "pad_token_id": 995, "bos_token_id": None,
}  # fmt: skip
IDS = torch.arange(5, 25)[None]


@pytest.fixture(autouse=True)
def quiet():
    product.quiet_transformers()
    torch.manual_seed(0)


def build(kind="qwen3", folder="small", tokenizer=True, **changes):
    """The folder of a small random model, with the demo's tokenizer."""
    settings = SMALL | {"head_dim": 8} | changes
    save(AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **settings)), folder, tokenizer)
    return folder


def save(built, folder, tokenizer=True, **how):
    built.save_pretrained(folder, **how)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja") if tokenizer else ():
        shutil.copy(DEMO / name, folder)


def change_weights(folder, change):
    path = f"{folder}/model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def set_config(folder, name="config.json", **changes):
    write(f"{folder}/{name}", json.dumps(read_json(f"{folder}/{name}") | changes))


def load(folder, dtype="fp32", **base):
    return load_model(find_model(str(folder), **base), dtype, CPU)


def logits(built, ids=IDS):
    with torch.no_grad():
        return built.eval()(ids).logits.float()


def assert_equal(built, reference, tolerance=1e-4):
    assert (logits(built) - logits(reference)).abs().max() < tolerance


def assert_same_texts(built, reference, tokenizer, new=12):
    """Greedy texts of both, from prompts with and without a begin token."""
    prompts = [
        tokenizer(text)["input_ids"] for text in ("2 + 2", "How many eggs", "A farmer has 12 hens. <|im_start|>")
    ]
    requests = [Request(i, 0, prompt, new) for i, prompt in enumerate(prompts)]
    ours = {done.id: done.token_ids for done in generate(built, tokenizer, requests, note=lambda line: None)}
    for i, prompt in enumerate(prompts):
        ends = [997, 995] if 995 in product_ends(built) else [997]
        given = torch.tensor([prompt])
        ids = reference.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=new, eos_token_id=ends,
            pad_token_id=995,
        )  # fmt: skip
        assert ours[i] == ids[0, len(prompt) :].tolist()


def product_ends(built):
    ends = built.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def shard(folder):
    save(AutoModelForCausalLM.from_pretrained(folder), "shards", max_shard_size="50KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 2
    return "shards"


def store_head_twice(folder):
    change_weights(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))


def store_rope(folder):
    change_weights(folder, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))


def in_fp16(folder):
    save(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16), folder)


def with_bos(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer.json")
    data = json.loads(path.read_text())
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    data["post_processor"]["single"].insert(0, begin)
    data["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [995], "tokens": ["<|endoftext|>"]}
    }
    path.write_text(json.dumps(data))
    assert AutoTokenizer.from_pretrained(folder)("2")["input_ids"][0] == 995


def without_template(folder):
    os.unlink(f"{folder}/chat_template.jinja")


# name: (model type, what differs in its config, what is done to its folder)
KINDS = {
    "tied": ("qwen3", {"tie_word_embeddings": True}, None),
    "untied": ("qwen3", {"tie_word_embeddings": False}, None),
    "llama, untied, with a begin token": ("llama", {"tie_word_embeddings": False, "bos_token_id": 995}, with_bos),
    "mistral, a base model without a template": ("mistral", {"sliding_window": None}, without_template),
    "qwen2, with biases": ("qwen2", {"tie_word_embeddings": True}, None),
    "sharded": ("qwen3", {"tie_word_embeddings": False}, shard),
    "weights in fp16": ("qwen3", {"tie_word_embeddings": True}, in_fp16),
    "a tied head stored twice": ("qwen3", {"tie_word_embeddings": True}, store_head_twice),
    "rope's frequencies among the weights": ("llama", {}, store_rope),
    "more rows than tokens": ("qwen3", {"vocab_size": TOKENS + 24, "tie_word_embeddings": True}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_has_the_logits_and_texts_of_transformers(kind):
    name, changes, prepare = KINDS[kind]
    folder = build(name, **changes)
    folder = (prepare and prepare(folder)) or folder
    ours, reference = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_equal(ours, reference)
    assert_same_texts(ours, reference, load_tokenizer(find_model(folder)))


def test_a_model_in_fp16_has_the_logits_of_transformers_in_fp16():
    folder = build()
    assert_equal(load(folder, "fp16"), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16))


def lora(**settings):
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **settings)


ADAPTERS = {
    "ranks and scales by pattern": lora(
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"down_proj": 32},
    ),
    "all linear layers but some": lora(target_modules="all-linear", exclude_modules=["up_proj"]),
    "DoRA": lora(target_modules=["q_proj", "up_proj"], use_dora=True),
    "rsLoRA": lora(target_modules=["v_proj"], use_rslora=True),
    "biases": lora(target_modules=["q_proj"], bias="all"),
    "PiSSA, which changes the base": peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights="pissa"
    ),
    "the head saved whole": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "the embedding saved whole": lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both saved whole": lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "both saved whole and tied": lora(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "on the embedding": lora(target_modules=["embed_tokens"]),
    "on the head": lora(target_modules=["lm_head"]),
    "on both": lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "on both, tied": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "DoRA on the embedding": lora(target_modules=["embed_tokens"], use_dora=True),
    "some tokens": lora(target_modules=["q_proj"], trainable_token_indices=[7, 9]),
}  # fmt: skip


def make_adapter(base, settings, folder="adapter", new_tokens=0):
    """An adapter of random weights, saved; its peft model."""
    adapted = AutoModelForCausalLM.from_pretrained(base)
    if new_tokens:
        adapted.resize_token_embeddings(adapted.config.vocab_size + new_tokens)
    adapted = peft.get_peft_model(adapted, copy.deepcopy(settings))
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.1
    adapted.save_pretrained(folder)
    return adapted


def as_peft_loads(base, folder="adapter"):
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_logits_of_peft(name, tied):
    base = build(tie_word_embeddings=tied)
    make_adapter(base, ADAPTERS[name])
    reference, ours = as_peft_loads(base), load("adapter")
    assert (logits(reference) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    assert_equal(ours, reference)
    save(ours, "merged")  # as train.py saves it, when it has trained on from there
    assert_equal(load("merged"), reference)


TYPES = {
    "ADALORA": {"total_step": 10}, "TRAINABLE_TOKENS": {"token_indices": [7, 9]},
    "C3A": {"block_size": 8}, "FOURIERFT": {"n_frequency": 64}, "WAVEFT": {"n_frequency": 64}, "MISS": {"r": 4},
    "SHIRA": {"r": 4}, "ROAD": {"group_size": 8}, "IA3": {"feedforward_modules": ["down_proj"]}, "LN_TUNING": {},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in ADAPTER_TYPES if kind != "LORA"])
def test_every_type_of_adapter_that_is_taken_has_the_logits_of_peft(kind):
    base = build()
    targets = {"LN_TUNING": ["input_layernorm"], "TRAINABLE_TOKENS": ["embed_tokens"]}
    settings = {"target_modules": targets.get(kind, ["q_proj", "down_proj"])} | TYPES.get(kind, {})
    make_adapter(base, peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **settings))
    reference = as_peft_loads(base)
    assert (logits(reference) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-4
    assert_equal(load("adapter"), reference)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("targets", "tied"),
    [(["q_proj"], True), (["q_proj"], False), (["embed_tokens", "q_proj"], True)],
    ids=["tied", "untied", "on the embedding, tied"],
)
def test_an_adapter_with_new_tokens_has_the_logits_of_peft(targets, tied):
    base = build(tie_word_embeddings=tied)
    reference = make_adapter(base, lora(target_modules=targets), new_tokens=3)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained("adapter")
    ours = load("adapter")
    new = torch.tensor([[5, 1000, 6, 1002]])
    assert ours.get_input_embeddings().weight.shape[0] == 1003
    assert (logits(ours, new) - logits(reference, new)).abs().max() < 1e-4
    assert load_tokenizer(find_model("adapter"))("<c>")["input_ids"] == [1002]


def test_an_adapter_answers_with_another_base_than_its_config_names(capsys):
    base = build()
    make_adapter(base, ADAPTERS["DoRA"])
    reference = logits(load("adapter"))
    os.rename("small", "moved")
    with pytest.raises(UserError, match=r"adapter_config.json: its base model small.*--base-model"):
        find_model("adapter")
    assert torch.equal(logits(load("adapter", base_model="moved")), reference)
    main, flags = infer("--base-model", "moved", "--max-new-tokens", "4", model="adapter")
    assert main(list(map(str, flags))) == 0


def test_a_trained_adapter_names_its_base_by_its_whole_path(monkeypatch):
    args = train_lora.parse_args(["--model-id", build(), "--output-dir", "out"])
    args.dtype = "fp32"
    trained = train_lora.load_with_adapter(args, find_model("small"), CPU)
    trained.save_pretrained("out")
    reference = logits(trained)
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    assert (logits(load("../out")) - reference).abs().max() < 1e-4


# ---- GGUF

SIZES = {"qwen3": {"head_dim": 128}, "llama": {}}  # transformers reads no head size of a qwen3 file: all have 128


def write_gguf(folder, path, kind="qwen3", form="F32", split="qwen2", tensors=(), **fields):
    """The model of a folder as a GGUF file, as llama.cpp's converter writes it."""
    import gguf

    settings, held = read_json(f"{folder}/config.json"), load_file(f"{folder}/model.safetensors")
    vocabulary = json.loads(Path(folder, "tokenizer.json").read_text())
    tokens = vocabulary["model"]["vocab"] | {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    special = {token["content"] for token in vocabulary["added_tokens"] if token["special"]}
    added = {token["content"] for token in vocabulary["added_tokens"]}
    heads, groups = settings["num_attention_heads"], settings["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(settings["head_dim"])
    writer.add_value_length(settings["head_dim"])
    writer.add_rope_freq_base(settings["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_vocab_size(settings["vocab_size"])
    writer.add_file_type({"F32": 0, "Q8_0": 7}[form])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    ordered = sorted(tokens, key=tokens.get)
    writer.add_token_list(ordered)
    writer.add_token_types([3 if token in special else 4 if token in added else 1 for token in ordered])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary["model"]["merges"]])
    writer.add_eos_token_id(997)
    writer.add_pad_token_id(995)
    writer.add_chat_template(Path(folder, "chat_template.jinja").read_text())
    for name, value in fields.items():
        name = name.replace("__", ".")
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], settings["num_hidden_layers"])
    for name, weight in held.items():
        data = weight.float().numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):  # its rotary halves are interleaved
            some = heads if "q_proj" in name else groups
            data = data.reshape(some, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        name = names.get_name(name, try_suffixes=(".weight",))
        if form == "Q8_0" and data.ndim == 2:
            kept = gguf.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, kept, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    for name in tensors:
        writer.add_tensor(name, numpy.ones(4, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_gguf_file_has_the_logits_texts_and_tokens_of_the_model_it_was_made_of(kind, tied):
    folder = build(kind, tie_word_embeddings=tied, **SIZES[kind])
    path = write_gguf(folder, "small.gguf", kind)
    ours, reference = load(path), AutoModelForCausalLM.from_pretrained(folder)
    assert_equal(ours, reference)
    tokenizer, original = load_tokenizer(find_model(path)), AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nTom has 12,345 eggs & 3.5 hens.<|im_end|>\n<think>\n"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.chat_template == original.chat_template
    assert_same_texts(ours, reference, tokenizer)
    assert product.positions(ours) == 256


def test_a_quantized_gguf_file_has_the_logits_of_transformers_and_can_be_saved():
    os.mkdir("gguf")
    write_gguf(build(**SIZES["qwen3"]), "gguf/small.gguf", form="Q8_0")
    reference = AutoModelForCausalLM.from_pretrained("gguf", gguf_file="small.gguf", dtype=torch.float32)
    files = find_model("gguf")
    ours = load_model(files, "fp32", CPU)
    assert product.quantization(files) == "MOSTLY_Q8_0"
    assert list(files.hashes()) == ["small.gguf"]
    assert_equal(ours, reference)
    save(ours, "plain")
    assert_equal(load("plain"), reference)


def test_every_end_token_of_a_gguf_file_ends_an_answer():
    path = write_gguf(build(**SIZES["qwen3"]), "small.gguf", tokenizer__ggml__eot_token_id=995)
    assert load(path).generation_config.eos_token_id == [995, 997]


def test_an_adapter_is_merged_into_a_gguf_file():
    base = build(**SIZES["qwen3"])
    make_adapter(base, ADAPTERS["ranks and scales by pattern"])
    path = write_gguf(base, "small.gguf")
    assert_equal(load("adapter", base_model=path), as_peft_loads(base))


def test_a_gguf_file_answers_and_its_quantization_is_recorded():
    path = write_gguf(build(**SIZES["qwen3"]), "small.gguf", form="Q8_0")
    main, flags = infer("--max-new-tokens", "4", model=path)
    assert main(list(map(str, flags))) == 0
    record = read_json("a.run.json")
    assert record["segments"][0]["quantization"] == "MOSTLY_Q8_0"
    assert "sha256 of small.gguf" in record["decides"]


def test_a_way_to_split_text_that_transformers_does_not_know_is_noted(capsys):
    for split, noted in (("qwen2", False), ("smollm", False), ("default", True)):
        find_model(write_gguf(build(**SIZES["qwen3"]), f"{split}.gguf", split=split))
        assert (f"splits text ({split})" in capsys.readouterr().out) == noted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", [train, train_lora])
def test_a_gguf_file_can_be_trained(script):
    path = write_gguf(build(max_position_embeddings=1024, **SIZES["qwen3"]), "small.gguf", form="Q8_0")
    brief = ["--max-steps", "1", "--warmup", "0", "--batch-size", "4", "--eval-size", "8", "--eval-questions", "0"]
    data = ["--dataset", str(ROOT / "demo/problems")]
    assert script.main(["--model-id", path, "--output-dir", "out", *data, *brief]) == 0
    assert read_json("out/train.run.json")["segments"][0]["quantization"] == "MOSTLY_Q8_0"
    trained = load("out")
    assert (logits(trained) - logits(load(path))).abs().max() > 0
    if script is train:
        assert_equal(trained, AutoModelForCausalLM.from_pretrained("out"))


# ---- Refused by name, in one line


def gguf_with(**how):
    return infer(model=write_gguf(build(**SIZES["qwen3"]), "small.gguf", **how))


def several_gguf_files():
    os.mkdir("gguf")
    for name in ("a", "b"):
        write(f"gguf/{name}.gguf", b"GGUF")
    return infer(model="gguf")


def pipe(name):
    folder = model({name: None})
    os.mkfifo(f"{folder}/{name}")
    return infer(model=folder)


def link(name, target):
    folder = model({name: None})
    os.symlink(target, f"{folder}/{name}")
    return infer(model=folder)


def more_layers(count):
    types = {"layer_types": ["full_attention"] * int(count)} if count < 9 else {}
    return infer(model=model(config(num_hidden_layers=count, **types)))


def experts(count):
    folder = build("mixtral", num_local_experts=2, num_experts_per_tok=1)
    set_config(folder, num_local_experts=count)
    return infer(model=folder)


def adapter_with(extra, **settings):
    """The adapter of test_bad_input with one weight more."""
    folder = adapter(**settings)
    path = f"{folder}/adapter_model.safetensors"
    tensors = load_file(path)
    tensors |= {key: torch.zeros(shape) for key, shape in extra.items()}
    save_file(tensors, path, {"format": "pt"})
    return infer(model=folder)


VALUES = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"


def half_resized():
    """An adapter with new tokens of which peft has saved the embedding and not the head: their rows are lost."""
    base = build(tie_word_embeddings=False)
    make_adapter(base, lora(target_modules=["embed_tokens"]), new_tokens=3)
    return infer(model="adapter")


def activated_lora():
    base = build()
    make_adapter(base, lora(target_modules=["q_proj"], alora_invocation_tokens=[1, 2]))
    return infer(model="adapter")


def prompt_tuning():
    base = build()
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained("adapter")
    return infer(model="adapter")


INDEX = "model.safetensors.index.json"
REFUSED = {
    "a config of another type": (
        lambda: infer(model=model(config(model_type="llama"))), "keys that its config does not know", "k_norm"),
    "a config of fewer layers": (lambda: more_layers(3), "keys that its config does not know", "model.layers.3."),
    "a config of more layers": (lambda: more_layers(5), "missing keys", "model.layers.4."),
    "a config of a thousand million layers": (lambda: more_layers(10**9), "config.json", "num_hidden_layers"),
    "layers as a fraction": (lambda: more_layers(1e9), "config.json", "num_hidden_layers"),
    "a vocabulary of eight million": (
        lambda: infer(model=model(config(vocab_size=8_000_000))), "model.embed_tokens.weight", "8000000"),
    "a width of a thousand million": (lambda: infer(model=model(config(intermediate_size=10**9))), "mlp", "1000000000"),
    "a million experts": (lambda: experts(10**6), "--model-id small", "asks for 12,352,070,304 weights"),
    "weights that the model has no place for": (
        lambda: infer(model=model(weights(lambda held: held.update({"model.extra.weight": torch.ones(2)})))),
        "model.extra.weight"),
    "an index that is null": (lambda: infer(model=model({INDEX: '{"weight_map": null}'})), INDEX, "weight_map"),
    "an index of numbers": (lambda: infer(model=model({INDEX: '{"weight_map": {"a": 1}}'})), INDEX, "weight_map"),
    "weights that are a pipe": (lambda: pipe("model.safetensors"), "model.safetensors", "not a plain file"),
    "a tokenizer that is a pipe": (lambda: pipe("tokenizer.json"), "tokenizer.json", "not a plain file"),
    "weights that are a device": (
        lambda: link("model.safetensors", "/dev/zero"), "model.safetensors", "not a plain file"),
    "end tokens that are an object": (
        lambda: infer(model=model(config(eos_token_id={"a": 1}))), "config.json", "eos_token_id"),
    "end tokens that are text": (
        lambda: infer(model=model({"generation_config.json": '{"eos_token_id": ["x"]}'})),
        "generation_config.json", "eos_token_id"),
    "a pad token beyond the vocabulary": (
        lambda: infer(model=model(config(pad_token_id=1000))), "config.json", "pad_token_id 1000", "vocab_size 1000"),
    "adapter weights for layers that its config does not name": (
        lambda: adapter_with({VALUES.format("A"): (4, 128), VALUES.format("B"): (64, 4)}),
        "adapter_model.safetensors", "keys that its config does not know", "v_proj"),
    "an adapter of an embedding alone, its base untied": (half_resized, "1003 tokens", "1000"),
    "an adapter that waits for a token": (activated_lora, "--model-id adapter", "aLoRA"),
    "prompt tuning": (prompt_tuning, "--model-id adapter", "PROMPT_TUNING", "LORA"),
    "an adapter of adapters": (lambda: infer(model=adapter(peft_type="XLORA", adapters={"a": "b"})), "XLORA"),
    "an adapter type that is a list": (lambda: infer(model=adapter(peft_type=["LORA"])), "peft_type"),
    "an adapter that imports a module": (
        lambda: infer(model=adapter(megatron_config={"a": 1}, megatron_core="trap")), "megatron_config"),
    "a rank pattern that is text": (lambda: infer(model=adapter(rank_pattern="x")), "--model-id adapter"),
    "target modules that are a number": (lambda: infer(model=adapter(target_modules=5)), "--model-id adapter"),
    "a base beside a full model": (lambda: infer("--base-model", str(DEMO)), "--base-model", "--model-id"),
    "a base beside a server": (
        lambda: infer("--base-model", str(DEMO), "--server", "http://localhost:1"), "--base-model", "--server"),
    "a base that is no model": (lambda: infer("--base-model", "./none", model=adapter()), "--base-model ./none"),
    "a base that is not there": (lambda: infer(model=adapter(base="./none")), "its base model ./none", "--base-model"),
    "a GGUF file that is none": (lambda: infer(model=write("x.gguf", b"GGML....")), "x.gguf", "not a GGUF file"),
    "a GGUF file cut in its header": (lambda: infer(model=write("x.gguf", b"GGUF\3\0\0\0")), "x.gguf"),
    "a GGUF file that is a folder": (lambda: (os.mkdir("x.gguf"), infer(model="x.gguf"))[1], "--model-id x.gguf"),
    "a folder of several GGUF files": (several_gguf_files, "--model-id gguf", "gguf/a.gguf"),
    "a GGUF file of a thousand million layers": (lambda: gguf_with(qwen3__block_count=10**9), "1000000000 layers"),
    "a GGUF file of fewer layers": (lambda: gguf_with(qwen3__block_count=1), "of which transformers takes"),
    "a GGUF file with scaled positions": (lambda: gguf_with(qwen3__rope__scaling__type="yarn"), "yarn"),
    "a GGUF file with weights that transformers does not know": (
        lambda: gguf_with(tensors=["rope_freqs.weight"]), "rope_freqs.weight"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_whole_is_refused_in_one_line(case, capfd):
    make, *words = REFUSED[case]
    main, arguments = make()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    assert_error(words, stop.value.code, capfd.readouterr().err)


def test_a_gguf_file_without_the_package_names_it(monkeypatch):
    path = write_gguf(build(**SIZES["qwen3"]), "small.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gguf"):
        find_model(path)


def test_nothing_large_is_allocated_for_a_config_that_does_not_fit(monkeypatch):
    made = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: made.append(1))
    folder = model(config(vocab_size=8_000_000))
    with pytest.raises(UserError, match="8000000"):
        load(folder)
    assert not made


def test_packed_weights_of_a_quantized_model_are_left_to_the_library_that_unpacks_them():
    folder = build(tie_word_embeddings=True)
    change_weights(folder, lambda held: held.update({"model.layers.0.mlp.up_proj.weight": torch.ones(256, 1)}))
    with pytest.raises(UserError, match="up_proj.weight as 64x32"):
        load(folder)
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    product.plan_model(find_model(folder), 4, CPU)


# ---- The hub's cache, and devices


def cached_model(monkeypatch, without=()):
    """The demo model in a hub cache as it is after a download, less some files."""
    from huggingface_hub import constants

    root = Path("hub/models--some--model").absolute()
    commit = "0" * 40
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in DEMO.iterdir():
        if path.name not in without:
            os.symlink(path, snapshot / path.name)
    (root / "refs").mkdir()
    write(root / "refs/main", commit)
    names = {path.name for path in DEMO.iterdir()} | set(without)
    write_tree(root, commit, names)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def write_tree(root, commit, names):
    from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache

    entry = TreeCacheEntry(size=1, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(root), commit, dict.fromkeys(names, entry))


def test_a_hub_cache_without_optional_files_is_taken_as_transformers_takes_it(monkeypatch, capsys):
    cached_model(monkeypatch, without=("merges.txt", "vocab.json"))
    files = find_model("some/model")
    assert_equal(load_model(files, "fp32", CPU), load(DEMO))
    assert load_tokenizer(files)("2")["input_ids"]
    assert "its cache lacks" in capsys.readouterr().out


def test_a_hub_cache_without_weights_is_refused_by_name(monkeypatch):
    cached_model(monkeypatch, without=("model.safetensors",))
    with pytest.raises(UserError, match=r"--model-id some/model: no \*.safetensors"):
        find_model("some/model")


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_accelerator_that_torch_finds_is_chosen(kind, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(product, "device_name", lambda device: f"a {device.type}")
    notes = []
    assert choose_device(None, notes.append).type == kind
    assert notes == [f"device {kind}: a {kind}"]
    assert choose_device("cpu", notes.append) == CPU


def test_one_of_several_processes_that_does_not_know_its_device_is_told(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="LOCAL_RANK is not set.*accelerate launch"):
        choose_device(None)


def test_free_memory_is_the_devices_own_where_it_has_some(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (123, 456))
    assert free_memory(torch.device("cuda")) == free_memory(torch.device("xpu")) == 123
    assert free_memory(CPU) > 1000 and free_memory(torch.device("mps")) > 1000


PAGE_FAULTS = """
import resource, torch
from model import keep_freed_memory, large_blocks_kept

def page_faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size // 4) for _ in range(4)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(min(page_faults(20 * 2**20) for _ in range(5)))
with large_blocks_kept():
    print(min(page_faults(40 * 2**20) for _ in range(5)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_memory_that_a_layer_frees_is_there_for_the_next_one():
    """In a process of its own: where a heap was used before depends on the tests before this one."""
    done = subprocess.run([sys.executable, "-c", PAGE_FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    of_layers, of_logits = map(int, done.stdout.split())
    assert of_layers < 1000 and of_logits < 1000  # of 20,480 and 40,960 pages


def test_imports_put_garbage_collection_off_and_it_comes_back():
    with collecting_later():
        assert not gc.isenabled()
        with collecting_later():
            pass
        assert not gc.isenabled()
    with pytest.raises(ImportError), collecting_later():
        import no_such_package  # noqa: F401
    assert gc.isenabled()
