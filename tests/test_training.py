"""train.py and train_lora.py train on what inference asks, on nothing of test, and lose nothing when they stop."""

import contextlib
import datetime
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import checkpoints
import model as model_module
import runs
import train
import train_lora
from common import UserError, build_prompt, hash_file, read_json, strip_annotations, thinking_is_open
from data import Question, load_questions
from generation import Request, generate
from model import find_model, load_model, load_tokenizer
from reading import score_final
from trainer import (
    EVAL_MAX_NEW_TOKENS,
    IGNORED,
    HeldOut,
    ScoredTrainer,
    build_config,
    choose_pad_token,
    epoch_order,
    fused_loss,
    make_savable,
    pad,
    summed_loss,
)

MODEL = str(ROOT / "demo/model")
PROBLEMS = [json.loads(line) for line in (ROOT / "demo/problems/train.jsonl").read_text().splitlines()[:44]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """44 training problems. Whoever reads the test split fails: it is no JSON."""
    folder = tmp_path_factory.mktemp("dataset")
    write_problems(folder, PROBLEMS)
    (folder / "test.jsonl").write_text("the test split must not be read\n")
    return folder


def write_problems(folder, problems):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"question": item["question"], "answer": item["answer"]}) + "\n" for item in problems]
    (folder / "train.jsonl").write_text("".join(lines))


def flags(dataset, output, *more):
    """A run of 2 epochs of 4 steps: 24 examples in batches of 6, 20 held out, 8 of them answered."""
    fixed = [
        "--model-id",
        MODEL,
        "--dataset",
        dataset,
        "--output-dir",
        output,
        "--eval-size",
        20,
        "--eval-questions",
        8,
    ]
    return [str(flag) for flag in [*fixed, "--epochs", 2, "--batch-size", 6, "--learning-rate", 1e-3, *more]]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train.main(flags(dataset, folder)) == 0
    return folder


def prefill_pairs(questions, tokenizer):
    ask = partial(build_prompt, "chatml_think_prefill", tokenizer=tokenizer)
    return train.target_pairs(questions, "chatml_think_prefill", ask, "<|im_end|>")


def parse(dataset, output, *more):
    return train.build_parser("", "", 1e-3, "").parse_args(flags(dataset, output, *more))


def split(args):
    questions = load_questions(args.dataset, "train")
    return train.split_questions(args.dataset, questions, args.eval_size, args.seed)


def history(folder, key):
    return {row["step"]: row[key] for row in read_json(folder / "trainer_state.json")["log_history"] if key in row}


def same_weights(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------
# One template
# ------------------------------------------------------------------------------------------


def test_training_conditions_on_inferences_prompt_on_gsm8k(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "qwen3_tokenizer")
    questions = load_questions(str(shared / "gsm8k"), "train")[::15]
    pairs = prefill_pairs(questions, tokenizer)
    rows = train.encode_examples("training", pairs, tokenizer, 40960, 151936)
    assert len(rows) == len(questions)  # none is dropped: apart and together tokenize alike
    asked = tokenizer([build_prompt("chatml_think_prefill", item.question, tokenizer) for item in questions])[
        "input_ids"
    ]
    for row, prompt, _ in zip(rows, asked, pairs, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
        assert row["input_ids"][-1] == 151645  # <|im_end|>
    assert tokenizer.decode(rows[0]["labels"][len(asked[0]) :]) == pairs[0][1]
    assert (
        max(len(row["input_ids"]) - len(prompt) for row, prompt in zip(rows, asked, strict=True)) < EVAL_MAX_NEW_TOKENS
    )


@pytest.mark.parametrize("name", ["sft-seed1", "lora-r4-seed1"])
def test_a_run_made_before_still_resumes(name, monkeypatch):
    """Its command, given once more, decides all that its record says and nothing else."""
    old = read_json(ROOT / f"results/demo/model/train/{name}.run.json")
    records = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "train_in_folder", lambda args, record, *_: records.append(record))
    script = train_lora if "lora" in name else train
    _, _, *argv = shlex.split(old["segments"][0]["command"])
    script.main([*argv, "--dtype", "fp32"])
    assert runs.find_difference(old, records[0]) is None


def test_completion_is_the_reasoning_and_the_final_line():
    answer = "Half of 8 is 8/2=<<8/2=4>>4.\nSo 4+1=<<4+1=5>>5 are left.\n#### 1,005"
    reasoning = "Half of 8 is 8/2=<<8/2=4>>4.\nSo 4+1=<<4+1=5>>5 are left."
    expected = {
        ("zero_shot", "Why?"): "#### 1,005",
        ("cot", "Why?"): f"{reasoning}\n#### 1,005",
        ("thinking", "Why?"): f"<think>\n{reasoning}\n</think>\n\n#### 1,005",
        ("thinking", "Why?<think>\n"): f"{reasoning}\n</think>\n\n#### 1,005",
        ("cot", "Why?<think>"): f"\n{reasoning}\n</think>\n\n#### 1,005",
        ("cot", "Question: Why?\nAnswer:"): f" {reasoning}\n#### 1,005",
        ("chatml_think_prefill", "<think>\n"): f"{reasoning}\n</think>\n\n#### 1,005",
    }
    for (mode, prompt), completion in expected.items():
        assert train.target_completion(answer, mode, prompt) == completion
        assert score_final(completion, answer, thinking_open="<think>" in prompt) == "right"


@pytest.mark.parametrize("mode", train.TRAINED_MODES)
def test_bare_numbers_can_be_trained_on_in_every_mode(mode, capsys):
    tokenizer = load_tokenizer(find_model(MODEL))
    ask, end = partial(build_prompt, mode, tokenizer=tokenizer), train.end_of_turn(mode, tokenizer).text
    pairs = train.target_pairs([Question(0, "How many?", "1,005")], mode, ask, end)
    (example,) = train.encode_examples("training", pairs, tokenizer, 2048, len(tokenizer))
    completion = tokenizer.decode([token for token in example["labels"] if token >= 0], skip_special_tokens=True)
    assert completion.endswith("#### 1,005") and "dropped" not in capsys.readouterr().out
    assert score_final(completion, "1005", thinking_open=thinking_is_open(pairs[0][0])) == "right"


def test_a_smaller_held_out_part_is_answered_whole(dataset, tmp_path):
    argv = ["--dataset", str(dataset), "--output-dir", str(tmp_path), "--eval-size"]
    for size, questions in ((20, 20), (500, 500), (600, 500)):
        args = train.build_parser("", "", 1e-3, "").parse_args([*argv, str(size)])
        train.check_arguments(args, torch.device("cpu"))
        assert args.eval_questions == questions
    args = train.build_parser("", "", 1e-3, "").parse_args([*argv, "20", "--eval-questions", "500"])
    with pytest.raises(UserError, match="only --eval-size 20 are held out"):
        train.check_arguments(args, torch.device("cpu"))


def test_annotations_can_be_left_out_of_what_is_trained():
    question = load_questions(str(ROOT / "demo/problems"), "train")[0]
    ask = partial(str.strip)
    ((_, completion),) = train.target_pairs([question], "cot", ask, "", strip_annotations)
    assert "<<" in question.answer and "<<" not in completion


LLAMA_TEMPLATE = (
    "{% for m in messages %}<|head|>{{ m.role }}\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)


def test_an_answer_ends_as_the_models_own_template_ends_a_turn():
    tokenizer = load_tokenizer(find_model(MODEL))
    assert train.end_of_turn("cot", tokenizer) == ("<|im_end|>", "<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|head|>", "<|eot|>"], "eos_token": "<|endoftext|>"})
    tokenizer.chat_template = LLAMA_TEMPLATE
    assert train.end_of_turn("cot", tokenizer) == ("<|eot|>", "<|eot|>")
    tokenizer.chat_template = LLAMA_TEMPLATE.replace("<|eot|>", " END\n")  # tags of plain text: no token to stop at
    assert train.end_of_turn("cot", tokenizer) == ("<|endoftext|>", "<|endoftext|>")
    tokenizer.chat_template = None
    assert train.end_of_turn("cot", tokenizer) == ("<|endoftext|>", "<|endoftext|>")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no token that ends an answer"):
        train.end_of_turn("cot", tokenizer)


def test_a_mode_is_trained_and_evaluated_from_the_prompt_that_inference_asks(dataset, tmp_path, capsys, monkeypatch):
    asked = []
    count = ScoredTrainer.count_right

    def noting(trainer, *ranks):
        asked.extend(trainer.held_out.ask(item.question) for item in trainer.held_out.questions)
        return count(trainer, *ranks)

    monkeypatch.setattr(ScoredTrainer, "count_right", noting)
    more = ("--mode", "cot", "--max-steps", 1, "--eval-questions", 2)
    assert train.main(flags(dataset, tmp_path / "run", *more)) == 0
    tokenizer = load_tokenizer(find_model(MODEL))
    _, held_out = split(parse(dataset, "x"))
    assert set(asked) == {build_prompt("cot", item.question, tokenizer) for item in held_out[:2]}
    assert "inference.py --mode cot --model-id" in capsys.readouterr().out
    record = read_json(tmp_path / "run" / runs.RECORD)
    assert record["decides"]["mode"] == "cot" and record["decides"]["completion"].endswith("<|im_end|>")
    assert "</think>" not in record["decides"]["completion"]


def test_the_mode_is_that_of_the_completions_else_the_named_one_else_what_the_tokenizer_can(capsys):
    tokenizer = load_tokenizer(find_model(MODEL))
    assert train.choose_mode(None, [], tokenizer) == ("chatml_think_prefill", None)
    assert train.choose_mode("cot", [], tokenizer) == ("cot", None)
    sampled = [{"mode": "thinking", "system_prompt": "Think."}]
    assert train.choose_mode(None, sampled, tokenizer) == train.choose_mode("thinking", sampled, tokenizer)
    with pytest.raises(UserError, match="--mode cot: --completions holds answers of mode thinking"):
        train.choose_mode("cot", sampled, tokenizer)

    tokenizer.convert_tokens_to_ids = lambda text: None  # as one without ChatML's tokens answers
    assert train.choose_mode(None, [], tokenizer) == ("cot", None)
    assert "the tokenizer has no <|im_start|>" in capsys.readouterr().out


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    """The demo's model as base models come: ends at <|endoftext|> alone, has no template, no pad token."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink()
    # Sampling values beside greedy decoding, as many published models have them: transformers refuses to save these.
    (folder / "generation_config.json").write_text('{"eos_token_id": 995, "temperature": 0.6, "top_p": 0.9}')
    config = read_json(folder / "tokenizer_config.json") | {"eos_token": "<|endoftext|>"}
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_base_model_trained_on_chatml_stops_at_its_end_elsewhere_too(base_model, dataset, tmp_path):
    """transformers' own generate, as other programs run it, and the tokenizer that servers read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    brief = ("--max-steps", 1, "--eval-questions", 0, "--learning-rate", 1e-5, "--model-id", base_model)
    assert train.main(flags(dataset, tmp_path / "full", *brief)) == 0
    assert train_lora.main(flags(dataset, tmp_path / "adapter", *brief)) == 0
    assert train_lora.main(flags(dataset, tmp_path / "merged", *brief, "--merge")) == 0
    prompt = build_prompt("chatml_think_prefill", PROBLEMS[0]["question"], load_tokenizer(find_model(MODEL)))
    for folder, stops in ((base_model, False), (tmp_path / "full", True), (tmp_path / "merged", True)):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=200, do_sample=False)[0, ids.shape[1] :].tolist()
        assert answer.count(997) and (answer.index(997) == len(answer) - 1) == stops
        assert (tokenizer.eos_token == "<|im_end|>") == stops
    adapter = tmp_path / "adapter"
    assert AutoTokenizer.from_pretrained(adapter).eos_token == "<|im_end|>"
    assert read_json(adapter / "generation_config.json")["eos_token_id"] == [997, 995]


def test_a_model_without_a_template_is_trained_on_plain_text(base_model, dataset, tmp_path, capsys):
    brief = ("--mode", "cot", "--max-steps", 1, "--eval-questions", 1, "--model-id", base_model)
    assert train.main(flags(dataset, tmp_path / "run", *brief)) == 0
    decides = read_json(tmp_path / "run" / runs.RECORD)["decides"]
    assert decides["prompt"].endswith("\nAnswer:") and "<|im_start|>" not in decides["prompt"]
    assert decides["completion"].startswith(" ") and decides["completion"].endswith("<|endoftext|>")
    printed = capsys.readouterr().out
    assert f"inference.py --mode cot --few-shot-style completion --model-id {tmp_path / 'run'}" in printed


def test_a_gguf_file_is_trained_and_saved_as_an_ordinary_folder(dataset, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from test_models import SIZES, build, write_gguf

    monkeypatch.chdir(tmp_path)
    write_gguf(build(**SIZES["qwen3"], max_position_embeddings=2048), "small.gguf", form="Q8_0")
    brief = ("--mode", "cot", "--max-steps", 1, "--eval-questions", 0, "--model-id", tmp_path / "small.gguf")
    brief = (*brief, "--learning-rate", 1e-9)
    assert train.main(flags(dataset, tmp_path / "full", *brief)) == 0
    assert train_lora.main(flags(dataset, tmp_path / "adapter", *brief)) == 0
    assert "quantization_config" not in read_json(tmp_path / "full/config.json")
    sources = (tmp_path / "small.gguf", tmp_path / "full", tmp_path / "adapter")
    before, *after = (load_model(find_model(str(path)), "fp32", torch.device("cpu")) for path in sources)
    with torch.inference_mode():
        expected = before(torch.arange(100)[None]).logits
        for model in after:
            assert torch.allclose(model(torch.arange(100)[None]).logits, expected, atol=1e-3)
    assert read_json(tmp_path / "full" / runs.RECORD)["decides"]["sha256 of small.gguf"]


def test_a_generation_config_that_stays_invalid_is_refused_before_the_training():
    from transformers import GenerationConfig

    config = GenerationConfig()
    config.num_return_sequences = 4
    with pytest.raises(UserError, match="generation_config.json of the model: transformers would not save it"):
        make_savable(config)


DATED_TEMPLATE = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_template_with_a_date_keeps_that_of_the_first_start(tmp_path):
    record, before = tmp_path / runs.RECORD, datetime.datetime.now().replace(microsecond=0)
    assert runs.read_first_start([record], None) >= before
    record.write_text(json.dumps({"decides": {}, "segments": [{"template_time": "2026-01-02T03:04:05"}, {}]}))
    assert runs.read_first_start([record], "changed") == datetime.datetime(2026, 1, 2, 3, 4, 5)
    assert runs.read_first_start([record], "always") >= before
    tokenizer = load_tokenizer(find_model(MODEL))
    tokenizer.chat_template = DATED_TEMPLATE
    assert build_prompt("cot", "Why?", tokenizer, now=runs.read_first_start([record], None)).startswith("2026-01-02")


def test_rows_that_do_not_fit_or_would_tokenize_otherwise_are_dropped_and_counted(capsys):
    tokenizer = load_tokenizer(find_model(MODEL))
    pairs = [
        ("<|im_start|>user\n", "4 apples<|im_end|>"),
        ("Yes\n", "\nNo<|im_end|>"),
        ("Why?\n", "4 " * 200 + "<|im_end|>"),
    ]
    assert len(train.encode_examples("training", pairs, tokenizer, 200, 1000)) == 1
    printed = capsys.readouterr().out
    assert "1 of 3 training examples dropped: longer than the model's 200 positions" in printed
    assert "1 of 3 training examples dropped: prompt and completion merge" in printed


def test_the_examples_shown_say_what_is_trained(capsys):
    tokenizer = load_tokenizer(find_model(MODEL))
    rows = train.encode_examples("training", [("Is 1\x1b[2J?\n", "Yes.<|im_end|>")], tokenizer, 200, 1000)
    train.show_examples(rows, tokenizer)
    before, trained = capsys.readouterr().out.split("of completion, trained")
    assert "Is 1\\x1b[2J?" in before and "not trained" in before and trained.strip().startswith("Yes.<|im_end|>")


def scored_trainer(args, model, tokenizer, examples, at_once=3):
    config = build_config(args, len(examples), "<|im_end|>")
    held_out = HeldOut(examples, [], str, 512)
    return ScoredTrainer(
        model=model, args=config, processing_class=tokenizer, examples=examples, held_out=held_out, at_once=at_once
    )


# ------------------------------------------------------------------------------------------
# No leak
# ------------------------------------------------------------------------------------------


def test_held_out_questions_are_train_questions_that_are_not_trained_on(tmp_path):
    write_problems(tmp_path, PROBLEMS + PROBLEMS[:30])  # every third question stands there twice
    splits = [split(parse(tmp_path, "x", "--seed", seed)) for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]
    for training, held_out in splits:
        assert len(held_out) == 20
        assert not {item.question for item in training} & {item.question for item in held_out}
        assert {item.question for item in training + held_out} == {item["question"] for item in PROBLEMS}


# ------------------------------------------------------------------------------------------
# Order, loss and score
# ------------------------------------------------------------------------------------------


def test_a_few_sequences_at_a_time_give_the_gradient_of_the_whole_batch(dataset):
    """Each few are followed by their backward pass; the batch in one go is the reference."""
    args = parse(dataset, "x")
    files = find_model(MODEL)
    tokenizer = load_tokenizer(files)
    training, _ = split(args)
    examples = train.encode_examples("training", prefill_pairs(training[:12], tokenizer), tokenizer, 2048, 1000)
    gradients = {}
    for at_once in (12, 5, 1):
        model = load_model(files, "fp32", torch.device("cpu")).requires_grad_()
        trainer = scored_trainer(args, model, tokenizer, examples, at_once)
        batch = trainer.data_collator(examples)
        tokens = (batch["labels"] != IGNORED).sum()
        loss = trainer.training_step(model, batch, num_items_in_batch=tokens)
        gradients[at_once] = loss, {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    expected = summed_loss(model, *pad(examples, "cpu")) / tokens
    expected.backward()
    for loss, own in gradients.values():
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, weight in model.named_parameters():
            assert torch.allclose(own[name], weight.grad, rtol=1e-3, atol=1e-6), name


def test_padding_needs_an_id_that_the_embedding_has():
    files = find_model(MODEL)
    tokenizer, model = load_tokenizer(files), load_model(files, "fp32", torch.device("cpu"))
    before = tokenizer.pad_token
    choose_pad_token(model, tokenizer, "<|im_end|>")
    assert tokenizer.pad_token == (before or "<|im_end|>")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    choose_pad_token(model, tokenizer, "<|im_end|>")
    assert tokenizer.pad_token == "<|im_end|>"
    with pytest.raises(UserError, match="the token .* has the id 1000, and the model knows 1000"):
        train.encode_examples("training", [("Why?\n", "So.<|pad|>")], tokenizer, 200, 1000)


def test_order_is_by_seed_and_epoch():
    order = epoch_order(1000, 16, 42, 0)
    assert order == epoch_order(1000, 16, 42, 0)
    assert order != epoch_order(1000, 16, 42, 1) and order != epoch_order(1000, 16, 43, 0)
    assert len(order) == len(set(order)) == 992 and max(order) < 1000


def test_loss_is_the_mean_over_trained_tokens_however_the_batch_is_cut(trained, dataset, tmp_path):
    assert train.main(flags(dataset, tmp_path / "parts", "--gradient-accumulation", 2)) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    command = [*launch, str(ROOT / "train.py"), *flags(dataset, tmp_path / "processes")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    for folder in (tmp_path / "parts", tmp_path / "processes"):
        for key in ("loss", "eval_loss"):
            assert history(folder, key) == pytest.approx(history(trained, key), abs=1e-4)
        assert history(folder, "eval_score") == history(trained, "eval_score")
    assert read_json(tmp_path / "processes" / runs.RECORD)["segments"][0]["processes"] == 2

    # The first step's loss by hand: summed over all of the batch's completion tokens, divided by their number.
    args = parse(dataset, "x")
    files = find_model(MODEL)
    tokenizer, model = load_tokenizer(files), load_model(files, "fp32", torch.device("cpu"))
    training, _ = split(args)
    rows = train.encode_examples("training", prefill_pairs(training, tokenizer), tokenizer, 2048, 1000)
    order = epoch_order(len(rows), 6, args.seed, 0)
    total = count = 0
    for row in (rows[i] for i in order[:6]):
        labels = torch.tensor(row["labels"])
        with torch.inference_mode():
            scores = model(torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
        learned = (labels[1:] != IGNORED).nonzero()[:, 0]
        total -= scores[learned, labels[1:][learned]].sum().item()
        count += len(learned)
    assert history(trained, "loss")[1] == pytest.approx(total / count, abs=1e-4)


def test_eval_score_is_what_inference_and_the_scorer_say(trained, dataset):
    args = parse(dataset, "x")
    _, held_out = split(args)
    files = find_model(str(trained))
    tokenizer, model = load_tokenizer(files), load_model(files, "fp32", torch.device("cpu"))
    requests = [
        Request(
            i,
            0,
            tokenizer(build_prompt("chatml_think_prefill", item.question, tokenizer))["input_ids"],
            EVAL_MAX_NEW_TOKENS,
        )
        for i, item in enumerate(held_out[:8])
    ]
    right = sum(
        score_final(done.text, held_out[done.id].answer, thinking_open=True) == "right"
        for done in generate(model, tokenizer, requests, note=lambda line: None)
    )
    result = read_json(trained / runs.RECORD)["result"]
    assert result["eval_score"] == pytest.approx(100 * right / 8)
    assert result["eval_score_stderr"] == pytest.approx(100 * (right / 8 * (1 - right / 8) / 8) ** 0.5)


def test_the_best_score_is_kept_ties_by_loss_and_patience_stops(dataset, tmp_path, monkeypatch):
    """Scores 25, 50, 50, 50, 25 with falling loss: the fourth epoch is best, patience 3 ends after the fifth."""
    scores = iter([0, 4, 8, 8, 8, 4, 16])
    monkeypatch.setattr(ScoredTrainer, "count_right", lambda *_: (next(scores), 16))
    saved = {}
    save = ScoredTrainer._save

    def keep(trainer, *args, **kwargs):
        save(trainer, *args, **kwargs)
        saved[trainer.state.global_step] = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    monkeypatch.setattr(ScoredTrainer, "_save", keep)
    assert train.main(flags(dataset, tmp_path / "run", "--epochs", 8, "--patience", 3)) == 0
    losses = history(tmp_path / "run", "eval_loss")
    assert list(losses) == [0, 4, 8, 12, 16, 20]
    assert losses[8] > losses[12] > losses[16]
    state = read_json(tmp_path / "run" / "trainer_state.json")
    assert (state["best_global_step"], state["best_metric"]) == (16, 50)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(weights[name], saved[16][name]) for name in weights)


# ------------------------------------------------------------------------------------------
# Stop and resume
# ------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from trainer import ScoredTrainer
step = ScoredTrainer.training_step
def deadly(trainer, *args, **kwargs):
    if trainer.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *args, **kwargs)
ScoredTrainer.training_step = deadly
train.main({flags!r})
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(trained, dataset, tmp_path, capsys):
    script = KILLED.format(root=str(ROOT), flags=flags(dataset, tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=400)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "run/checkpoint-4").is_dir() and not (tmp_path / "run/model.safetensors").exists()
    (tmp_path / "run/checkpoint-4-backup").mkdir()  # the user's own: no checkpoint to go on from
    torn = tmp_path / "run/checkpoint-6"  # a checkpoint that was being written when the kill came
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 6')
    assert train.main(flags(dataset, tmp_path / "run", "--resume")) == 0
    assert "going on after step 4" in capsys.readouterr().out
    assert same_weights(tmp_path / "run", trained)
    assert history(tmp_path / "run", "eval_score") == history(trained, "eval_score")
    assert len(read_json(tmp_path / "run" / runs.RECORD)["segments"]) == 2


def interrupt_at(step, script, arguments, monkeypatch):
    """Run a script and send SIGINT while it computes this step."""

    compute = ScoredTrainer.training_step

    def interrupted(trainer, *args, **kwargs):
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return compute(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ScoredTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit) as stopped:
            script.main(arguments)
    assert stopped.value.code == 130


@pytest.fixture(scope="module")
def interrupted(dataset, tmp_path_factory):
    """The folder of a run that was interrupted in step 6; a test works on its own copy."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        interrupt_at(6, train, flags(dataset, folder), patch)
    assert "stopped after step 6 and saved" in printed.getvalue()
    return folder


def test_an_interrupt_stops_after_the_step_saves_and_goes_on(trained, interrupted, dataset, tmp_path, capsys):
    shutil.copytree(interrupted, tmp_path / "run")
    assert (tmp_path / "run/checkpoint-6").is_dir()
    assert train.main(flags(dataset, tmp_path / "run", "--resume")) == 0
    assert "going on after step 6" in capsys.readouterr().out
    assert same_weights(tmp_path / "run", trained)
    assert train.main(flags(dataset, tmp_path / "run", "--resume")) == 0
    assert "finished already" in capsys.readouterr().out


def test_lora_interrupted_in_the_last_step_of_an_epoch_loses_no_evaluation(dataset, tmp_path, monkeypatch):
    """With dropout, so that the generator's state must come back too."""
    lora = ("--rank", 4, "--dropout", 0.1, "--learning-rate", 5e-3)
    assert train_lora.main(flags(dataset, tmp_path / "whole", *lora)) == 0
    interrupt_at(4, train_lora, flags(dataset, tmp_path / "run", *lora), monkeypatch)
    assert (tmp_path / "run/checkpoint-4").is_dir()
    interrupt_at(8, train_lora, flags(dataset, tmp_path / "run", *lora, "--resume"), monkeypatch)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert train_lora.main(flags(dataset, tmp_path / "moved", *lora, "--resume")) == 0
    for key in ("loss", "eval_loss", "eval_score"):
        assert history(tmp_path / "moved", key) == history(tmp_path / "whole", key)
    assert list(history(tmp_path / "moved", "eval_loss")) == [0, 4, 8]
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "moved"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_that_diverges_stops_and_keeps_the_best_there_was(dataset, tmp_path, monkeypatch, capsys):
    sums = ScoredTrainer.sum_losses

    def diverging(trainer, *ranks):
        loss, tokens = sums(trainer, *ranks)
        return (float("nan"), tokens) if trainer.state.global_step >= first_bad else (loss, tokens)

    monkeypatch.setattr(ScoredTrainer, "sum_losses", diverging)
    first_bad = 8
    assert train.main(flags(dataset, tmp_path / "run", "--epochs", 4)) == 0
    assert "the training has diverged and stops" in capsys.readouterr().out
    assert list(history(tmp_path / "run", "eval_loss")) == [0, 4, 8]
    assert read_json(tmp_path / "run/trainer_state.json")["best_global_step"] == 4
    first_bad = 4
    with pytest.raises(SystemExit, match="2"):
        train.main(flags(dataset, tmp_path / "none", "--eval-questions", 0))
    assert "--learning-rate 0.001: the training diverged" in capsys.readouterr().err


def test_a_run_killed_after_its_last_checkpoint_only_finishes(dataset, tmp_path, monkeypatch):
    """--max-steps ends inside an epoch, where transformers alone would train one step too many."""
    more = ("--max-steps", 6, "--eval-questions", 0)
    assert train.main(flags(dataset, tmp_path / "whole", *more)) == 0

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", die)
        with pytest.raises(SystemExit):
            train.main(flags(dataset, tmp_path / "run", *more))
    assert train.main(flags(dataset, tmp_path / "run", *more, "--resume")) == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert list(history(tmp_path / "run", "eval_loss")) == [0, 4, 6]


# ------------------------------------------------------------------------------------------
# Checkpoints
# ------------------------------------------------------------------------------------------

FILES = {"model.safetensors": b"weights", "optimizer.pt": b"moments", "scheduler.pt": b"rate", "rng_state.pth": b"rng"}


def checkpoint(folder, step, best=None):
    """A whole checkpoint, as far as its files and its manifest go."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_global_step": best}))
    checkpoints.write_manifest(path)
    return path


def link_elsewhere(path):
    (path / "optimizer.pt").rename(path.parent / "elsewhere.pt")
    (path / "optimizer.pt").symlink_to(path.parent / "elsewhere.pt")


DAMAGES = {
    "no optimizer": (lambda path: (path / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "no scheduler": (lambda path: (path / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    "no random state": (lambda path: (path / "rng_state.pth").unlink(), "rng_state.pth is missing"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "cut": (lambda path: (path / "optimizer.pt").write_bytes(b"mom"), "optimizer.pt has changed"),
    "empty": (lambda path: (path / "trainer_state.json").write_bytes(b""), "trainer_state.json has changed"),
    "as long": (lambda path: (path / "optimizer.pt").write_bytes(b"MOMENTS"), "optimizer.pt has changed"),
    "added": (lambda path: (path / "pytorch_model.bin").write_bytes(b"trap"), "pytorch_model.bin is not in its"),
    "added folder": (lambda path: (path / "global_step8").mkdir(), "global_step8 is not in its"),
    "link": (link_elsewhere, "optimizer.pt is not a plain file"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "manifest cut": (lambda path: (path / "manifest.json").write_text('{"mo'), "manifest.json: not JSON"),
    "manifest a list": (
        lambda path: (path / "manifest.json").write_text("[]"),
        "manifest.json: must hold a JSON object",
    ),
    "manifest empty": (lambda path: (path / "manifest.json").write_text("{}"), "is not in its manifest.json"),
    "best damaged": (
        lambda path: (path.parent / "checkpoint-6/optimizer.pt").unlink(),
        "the best one so far, checkpoint-6",
    ),
    "best gone": (
        lambda path: shutil.rmtree(path.parent / "checkpoint-6"),
        "checkpoint-6, cannot be used: it is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(damage, tmp_path, capsys):
    older, newest = checkpoint(tmp_path, 4), [checkpoint(tmp_path, 6), checkpoint(tmp_path, 8, best=6)][-1]
    assert checkpoints.last_checkpoint(tmp_path) == newest
    spoil, told = DAMAGES[damage]
    spoil(newest)
    found = checkpoints.last_checkpoint(tmp_path)
    printed = capsys.readouterr().out
    assert f"{newest}: passed over: " in printed and told in printed
    assert found == (older if damage.startswith("best") else tmp_path / "checkpoint-6")


def test_what_is_no_checkpoint_is_left_alone(tmp_path, capsys):
    (tmp_path / "checkpoint-9").write_text("a file")
    (tmp_path / "checkpoint-10").symlink_to(tmp_path)
    (tmp_path / "checkpoint-4-backup").mkdir()
    (tmp_path / "checkpoint-99").mkdir()
    assert checkpoints.last_checkpoint(tmp_path) is None
    assert capsys.readouterr().out.count("passed over") == 1
    checkpoints.drop_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4-backup", "checkpoint-9"]


def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_ends_with_the_same_weights(
    trained, interrupted, dataset, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    (folder / "checkpoint-6/optimizer.pt").unlink()
    (folder / "checkpoint-8").mkdir()  # a wreck where a checkpoint will be saved, with a trap in it
    (folder / "checkpoint-8/pytorch_model.bin").write_text("trap")
    record = read_json(folder / runs.RECORD)
    del record["result"]
    (folder / runs.RECORD).write_text(json.dumps(record))
    saved = []
    monkeypatch.setattr(train, "drop_checkpoints", lambda folder: saved.extend(checkpoints.checkpoints(folder)))
    assert train.main(flags(dataset, folder, "--resume")) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-8: passed over" in printed and "checkpoint-6: passed over: optimizer.pt is missing" in printed
    assert "going on after step 4" in printed
    assert same_weights(folder, trained)
    assert saved and not any(checkpoints.find_fault(path) for path in saved)
    assert not (folder / "checkpoint-8/pytorch_model.bin").exists()


@pytest.mark.parametrize("step", [8, 9])
def test_a_disk_that_is_full_while_saving_keeps_the_last_good_checkpoint(step, dataset, tmp_path, monkeypatch, capfd):
    """From some moment on no file may be larger than 1 MB: in the second checkpoint, or when all steps are done."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin = ScoredTrainer._save_checkpoint if step == 8 else train.finish

    def with_little_room(*args, **kwargs):
        if step == 9 or args[0].state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        return begin(*args, **kwargs)

    monkeypatch.setattr(*((ScoredTrainer, "_save_checkpoint") if step == 8 else (train, "finish")), with_little_room)
    try:
        with pytest.raises(SystemExit) as stopped:
            train.main(flags(dataset, tmp_path / "run", "--eval-questions", 0, "--epochs", 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capfd.readouterr().err
    assert stopped.value.code == 2
    line = error[error.index("train.py: error:") :]
    assert "cannot be saved: " in line and "make room there" in line and line.count("\n") == 1
    kept = checkpoints.last_checkpoint(tmp_path / "run")
    assert kept and kept.name == ("checkpoint-4" if step == 8 else "checkpoint-8")


# ------------------------------------------------------------------------------------------
# What a run leaves behind
# ------------------------------------------------------------------------------------------


def test_the_folder_holds_what_it_should_and_nothing_that_runs_code(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja",
        "trainer_state.json", "train.run.json", "README.md", "training.png", "runs",
    }  # fmt: skip
    assert not [path for path in trained.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    mode = (trained / "config.json").stat().st_mode  # made with the umask alone
    assert (trained / "model.safetensors").stat().st_mode == mode
    assert names <= {path.name for pattern in (runs.RECORD, *runs.TRAINING_FILES) for path in trained.glob(pattern)} | {
        "runs"
    }
    assert find_model(str(trained)).base is None
    original, saved = (json.loads((Path(folder) / "generation_config.json").read_text()) for folder in (MODEL, trained))
    assert saved["eos_token_id"] == original["eos_token_id"]
    score = read_json(trained / runs.RECORD)["result"]["eval_score"]
    card = (trained / "README.md").read_text()
    assert f"{score:.1f} ±" in card and "kept" in card and "the test split was not read" in card


def test_tensorboard_has_loss_rate_norm_and_score(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (trained / "runs").iterdir()
    tags = EventAccumulator(str(log)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/score", "eval/loss"} <= set(tags)


def test_adapter_is_taken_by_inference_and_merged_answers_alike(dataset, tmp_path):
    lora = (
        "--rank",
        4,
        "--dropout",
        0.05,
        "--target-modules",
        "q_proj,v_proj",
        "--learning-rate",
        5e-3,
        "--max-steps",
        3,
        "--eval-questions",
        0,
    )
    assert train_lora.main(flags(dataset, tmp_path / "adapter", *lora)) == 0
    assert train_lora.main(flags(dataset, tmp_path / "merged", *lora, "--merge")) == 0
    adapter, merged = find_model(str(tmp_path / "adapter")), find_model(str(tmp_path / "merged"))
    assert adapter.base.name == MODEL and merged.base is None
    config = read_json(tmp_path / "adapter/adapter_config.json")
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 32, ["q_proj", "v_proj"])
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    one, other = (load_model(files, "fp32", torch.device("cpu")) for files in (adapter, merged))
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-4)


def test_all_weights_of_an_adapter_and_its_base_can_be_trained_on(dataset, tmp_path):
    small = ("--max-steps", 2, "--eval-questions", 0)
    assert train_lora.main(flags(dataset, tmp_path / "adapter", *small)) == 0
    assert train.main([*flags(dataset, tmp_path / "full", *small), "--model-id", str(tmp_path / "adapter")]) == 0
    assert not same_weights(Path(MODEL), tmp_path / "full")


def test_the_loss_on_a_gpu_is_the_loss_on_a_cpu(dataset, tmp_path):
    """TRL's fused head, which only CUDA takes, runs on a CPU as well."""
    args = train_lora.parse_args(flags(dataset, tmp_path, "--dtype", "fp32"))
    files = find_model(MODEL)
    tokenizer = load_tokenizer(files)
    pairs = prefill_pairs(load_questions(str(dataset), "train")[:12], tokenizer)
    examples = train.encode_examples("training", pairs, tokenizer, 2048, 1000)
    for load in (train.load_full_model, train_lora.load_with_adapter):
        model = load(args, files, torch.device("cpu"))
        scored_trainer(args, model, tokenizer, examples)  # TRL's own set-up gives the model its fused head
        ids, labels = pad(examples, "cpu")
        assert fused_loss(model, ids, labels).item() == pytest.approx(summed_loss(model, ids, labels).item(), rel=1e-5)


def test_the_base_of_an_adapter_stays_as_it_is_in_bf16(dataset, tmp_path):
    args = train_lora.parse_args(flags(dataset, tmp_path, "--dtype", "bf16"))
    model = train_lora.load_with_adapter(args, find_model(MODEL), torch.device("cpu"))
    kinds = {(weight.dtype, weight.requires_grad) for weight in model.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    full = train.load_full_model(args, find_model(MODEL), torch.device("cpu"))
    assert {weight.dtype for weight in full.parameters()} == {torch.float32}


def test_bf16_computes_with_fp32_weights(dataset, tmp_path):
    assert train.main(flags(dataset, tmp_path / "run", "--dtype", "bf16", "--max-steps", 2, "--eval-questions", 0)) == 0
    assert {weight.dtype for weight in load_file(tmp_path / "run/model.safetensors").values()} == {torch.float32}


def test_push_to_hub_asks_for_the_repository_first_and_uploads_at_the_end(dataset, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    for method in ("create_repo", "upload_folder"):
        monkeypatch.setattr(
            huggingface_hub.HfApi, method, lambda self, method=method, **named: calls.append((method, named))
        )
    assert (
        train.main(
            flags(dataset, tmp_path / "run", "--max-steps", 1, "--eval-questions", 0, "--push-to-hub", "me/model")
        )
        == 0
    )
    assert [method for method, _ in calls] == ["create_repo", "upload_folder"]
    assert calls[1][1] == {"repo_id": "me/model", "folder_path": tmp_path / "run"}
    assert (
        train.main(
            flags(
                dataset,
                tmp_path / "run",
                "--max-steps",
                1,
                "--eval-questions",
                0,
                "--push-to-hub",
                "me/model",
                "--resume",
            )
        )
        == 0
    )
    assert [method for method, _ in calls] == ["create_repo", "upload_folder"] * 2  # finished, and uploaded once more


# ------------------------------------------------------------------------------------------
# Memory and bad input
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "LoRA with dropout"])
def test_activations_are_estimated_from_what_is_saved(method, dataset, tmp_path):
    if method == "full":
        model = load_model(find_model(MODEL), "fp32", torch.device("cpu"))
    else:
        args = train_lora.parse_args([*flags(dataset, tmp_path), "--dtype", "fp32", "--dropout", "0.1"])
        model = train_lora.load_with_adapter(args, find_model(MODEL), torch.device("cpu"))
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 1000, (8, 200))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten())
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    measured = sum(size for address, size in saved.items() if address not in weights) / ids.numel()
    loss.backward()
    estimated = train.activation_bytes_per_token(model, 4, fused_head=False)
    assert 0.75 < estimated / measured < 1.6


def test_short_memory_takes_fewer_sequences_at_once_or_refuses(dataset, monkeypatch, capsys):
    args = parse(dataset, "x", "--dtype", "fp32")
    model = load_model(find_model(MODEL), "fp32", torch.device("cpu"))
    state = 12 * train.trainable(model)
    sequence = 200 * train.activation_bytes_per_token(model, 4, fused_head=False)
    for room, at_once in ((6, 3), (3, 3), (2, 2), (1, 1)):
        monkeypatch.setattr(model_module, "free_memory", lambda device, free=state + room * sequence: free)
        assert train.fit_into_memory(args, model, torch.device("cpu"), 200, 3) == at_once
    assert "memory is short: 1 sequences at once, not 3" in capsys.readouterr().out
    monkeypatch.setattr(model_module, "free_memory", lambda device: state)
    with pytest.raises(UserError, match="training needs about .* are free"):
        train.fit_into_memory(args, model, torch.device("cpu"), 200, 3)


def no_gold(folder):
    write_problems(folder, PROBLEMS[:40] + [{"question": "Why?", "answer": "Because."}])


def empty(folder):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("")


def few(folder):
    write_problems(folder, PROBLEMS[:25])


BAD_INPUTS = [  # script, what spoils the data set, more flags, what the line names
    (train, empty, (), "train.jsonl: holds no questions"),
    (train, no_gold, (), "train question 40: the reference answer is no number"),
    (train, few, (), "--batch-size 6: more than the 5 examples"),
    (train, None, ("--eval-size", 44), "has 44 train questions"),
    (train, None, ("--eval-questions", 21), "--eval-questions 21: only --eval-size 20"),
    (train, None, ("--gradient-accumulation", 5), "--batch-size 6: cannot be cut into 5 equal parts"),
    (train, None, ("--learning-rate", "0"), "--learning-rate: must be above 0"),
    (train, None, ("--learning-rate", "fast"), "--learning-rate: wants a number"),
    (train, None, ("--warmup", "-1"), "--warmup: must be 0 or more"),
    (train, None, ("--epochs", "0"), "--epochs: must be 1 or more"),
    (train, None, ("--dtype", "int8"), "--dtype: invalid choice"),
    (train, None, ("--model-id", "./nowhere"), "--model-id ./nowhere: not a model"),
    (train, None, ("--dataset", "./nowhere"), "--dataset ./nowhere: no such file or folder"),
    (train, None, ("--output-dir", ROOT / "results"), "and no train.run.json; pass an empty folder"),
    (train, None, ("--output-dir", str(Path(MODEL).parent), "--overwrite"), "demo: holds --model-id"),
    (train, None, ("--output-dir", "/proc/model"), "--output-dir /proc/model: cannot be written"),
    (train, None, ("--push-to-hub", "no/such/name"), "--push-to-hub no/such/name"),
    (
        train_lora,
        None,
        ("--target-modules", "q_porj"),
        "the model has no linear layer 'q_porj'; it has down_proj, gate_proj",
    ),
    (train_lora, None, ("--target-modules", "lm_head"), "the model has no linear layer 'lm_head'"),
    (train_lora, None, ("--rank", "0"), "--rank: must be 1 or more"),
    (train_lora, None, ("--dropout", "1"), "--dropout 1.0: must be below 1"),
]


@pytest.mark.parametrize(("script", "spoil", "more", "named"), BAD_INPUTS, ids=[case[3][:40] for case in BAD_INPUTS])
def test_bad_input_is_one_line_and_exit_code_2(script, spoil, more, named, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = dataset
    if spoil:
        folder = tmp_path / "data"
        spoil(folder)
    with pytest.raises(SystemExit) as stopped:
        script.main(flags(folder, tmp_path / "run", *more))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert named in error and error.startswith(f"{script.__name__}.py: error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_another_run_is_not_overwritten(trained, dataset, capsys):
    cases = [
        ((), "holds a run already; pass --resume"),
        (("--resume", "--seed", 1), "was made with seed = 42, this run has 1"),
    ]
    for more, named in cases:
        with pytest.raises(SystemExit) as stopped:
            train.main(flags(dataset, trained, *more))
        assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_several_gpus_without_a_launcher_are_refused(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(model_module, "choose_device", lambda device: torch.device("cuda"))
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(dataset, tmp_path / "run"))
    assert stopped.value.code == 2 and "start with accelerate launch" in capsys.readouterr().err


def test_help_is_instant_and_names_its_sources():
    for script in ("train", "train_lora"):
        code = f"import sys, {script}; assert not {{'torch', 'transformers', 'trl'}} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        text = subprocess.run(
            [sys.executable, f"{script}.py", "--help"], check=True, cwd=ROOT, capture_output=True, text=True
        )
        assert "Stanford Alpaca" in text.stdout and "QLoRA" in text.stdout


# ------------------------------------------------------------------------------------------
# Own right answers, and redoing
# ------------------------------------------------------------------------------------------


def write_completions(path, problems, mode="thinking", output="<think>\nfour\n</think>\n\n#### 4", **more):
    rows = [{"question": item["question"], "model_output": output, "mode": mode, **more} for item in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_right_answers_are_trained_on_from_the_prompt_that_they_were_sampled_with(dataset, tmp_path, capsys):
    file = write_completions(tmp_path / "own.jsonl", PROBLEMS[:30], system_prompt="Think.")
    tokenizer = load_tokenizer(find_model(MODEL))
    training, held_out = split(parse(dataset, tmp_path / "run"))
    lines = train.read_completions(file, str(dataset), training + held_out)
    mode, system_prompt = train.choose_mode(None, lines, tokenizer)
    ask = partial(build_prompt, mode, tokenizer=tokenizer, system_prompt=system_prompt)
    pairs, held_out_pairs = train.own_pairs(file, lines, ask, "<|im_end|>", training, held_out)
    question = PROBLEMS[0]["question"]
    assert ask(question) == build_prompt("thinking", question, tokenizer, system_prompt="Think.")
    asked = {build_prompt("thinking", item.question, tokenizer, system_prompt="Think.") for item in held_out}
    assert len(pairs) + len(held_out_pairs) == 30
    assert {prompt for prompt, _ in held_out_pairs} < asked and not {prompt for prompt, _ in pairs} & asked
    rows = train.encode_examples("training", pairs, tokenizer, 2048, 1000)
    inference_prompt = tokenizer(pairs[0][0], add_special_tokens=False)["input_ids"]
    learned = [token for token in rows[0]["labels"] if token != IGNORED]
    assert rows[0]["input_ids"] == inference_prompt + learned
    assert tokenizer.decode(learned) == "<think>\nfour\n</think>\n\n#### 4<|im_end|>"


def test_own_right_answers_train_a_model_and_are_named_by_its_card(dataset, tmp_path, capsys):
    file = write_completions(tmp_path / "own.jsonl", PROBLEMS, "cot", "Two and two.\n#### 4")
    assert (
        train.main(flags(dataset, tmp_path / "run", "--max-steps", 2, "--eval-questions", 2, "--completions", file))
        == 0
    )
    printed = capsys.readouterr().out
    assert "44 completions of mode cot: 24 to train on, 20 of held-out questions" in printed
    card = (tmp_path / "run/README.md").read_text()
    assert "on right answers of its own" in card and "<think>\n\n</think>" in card  # cot's prompt closes the thought
    assert read_json(tmp_path / "run/train.run.json")["decides"]["completions"] == hash_file(file)


def other_question(path):
    return write_completions(path, [{"question": "A test question?"}])


def mixed(path):
    first, second = (write_completions(path, PROBLEMS[:1], mode).read_text() for mode in ("cot", "thinking"))
    path.write_text(first + second)
    return path


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (other_question, r"own.jsonl:1: its question is not of the train split"),
        (mixed, r"own.jsonl:2: another mode or system prompt than on line 1"),
        (lambda path: write_completions(path, PROBLEMS[:1], "few_shot"), r"own.jsonl:1: mode 'few_shot'"),
        (
            lambda path: write_completions(path, PROBLEMS[:1], output=["#### 4"]),
            r"own.jsonl:1: 'model_output' must be text",
        ),
        (lambda path: write_completions(path, PROBLEMS[:1]), r"holds none of the \d+ (training|held-out) questions"),
        (lambda path: path.write_text("") and path or path, r"own.jsonl: holds no completion"),
        (lambda path: path, r"own.jsonl: cannot be read"),
    ],
)
def test_completions_that_cannot_be_trained_on_are_refused(make, told, dataset, tmp_path, capsys):
    file = make(tmp_path / "own.jsonl")
    with pytest.raises(SystemExit, match="2"):
        train.main(flags(dataset, tmp_path / "run", "--completions", file))
    error = capsys.readouterr().err
    assert re.search(told, error) and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_folder_that_another_process_trains_in_is_refused(dataset, tmp_path, capsys):
    with runs.locked_folder(tmp_path / "run"), pytest.raises(SystemExit, match="2"):
        train.main(flags(dataset, tmp_path / "run", "--max-steps", 1))
    assert "another process trains in it" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def test_a_run_of_another_command_is_dropped_only_where_overwrite_says_so(dataset, tmp_path, capsys):
    folder = tmp_path / "run"
    small = "--max-steps", 1, "--eval-questions", 0
    train.main(flags(dataset, folder, *small))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    train.main(flags(dataset, folder, *small, "--overwrite", "changed"))
    assert "finished already" in capsys.readouterr().out
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="2"):
        train.main(flags(dataset, folder, *small, "--learning-rate", 2e-3))
    assert "pass --resume to go on with it, --overwrite to drop it, or another --output-dir" in capsys.readouterr().err
    train.main(flags(dataset, folder, *small, "--learning-rate", 2e-3, "--overwrite", "changed"))
    assert "made again" in capsys.readouterr().out
    record = read_json(folder / "train.run.json")
    assert record["decides"]["learning_rate"] == 2e-3 and len(record["segments"]) == 1
    (folder / "train.run.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        train.main(flags(dataset, folder, *small, "--overwrite"))
    assert (folder / "model.safetensors").exists()  # no run record: not a run's folder, so nothing in it is touched
