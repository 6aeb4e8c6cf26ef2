"""The demo's problems, tokenizer and checkpoint hold what demo/README.md says of them."""

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from common import build_messages, build_prompt, chatml_think_prefill
from demo.make import SPLIT_SIZES, completion, draw_row, make_split, problem_lines
from demo.templates import PRONOUNS, TEMPLATES, Problem

DEMO = Path(__file__).parent.parent / "demo"


def read_problems(split):
    rows = [json.loads(line) for line in (DEMO / "problems" / f"{split}.jsonl").read_text().splitlines()]
    return [Problem(row["template"], tuple(row["numbers"]), row["question"], row["answer"]) for row in rows]


@pytest.fixture(scope="module")
def splits():
    return {split: read_problems(split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


def compute(expression):
    """The value of a sum of products, without eval: `3+4*5/2`."""
    total = Fraction(0)
    for sign, term in re.findall(r"([+-]?)([\d*/]+)", expression):
        value = Fraction(1)
        for operator, number in re.findall(r"([*/]?)(\d+)", term):
            value = value / int(number) if operator == "/" else value * int(number)
        total += -value if sign == "-" else value
    return total


def mask_names(text):
    return re.sub(
        r"\b(she|he|her|his|him)\b",
        "_",
        re.sub(rf"\b({'|'.join(PRONOUNS)})\b", "_", text),
        flags=re.IGNORECASE,
    )


def test_there_are_many_templates_of_one_to_five_steps(splits):
    assert len(TEMPLATES) >= 30
    assert {len(template.steps) for template in TEMPLATES} == {1, 2, 3, 4, 5}
    for problems in splits.values():
        assert {problem.template for problem in problems} == {template.name for template in TEMPLATES}


def test_every_annotation_and_answer_is_right(splits):
    for problem in splits["train"] + splits["test"]:
        *steps, last_line = problem.answer.split("\n")
        results = []
        for step in steps:
            # GSM8K's form: the sum, then the annotation, then its result
            written, expression, result, shown = re.search(r"([\d+*/-]+)=\$?<<([^=<>]+)=(\d+)>>(\d+)", step).groups()
            assert written == expression and result == shown and compute(expression) == int(result), step
            # every number of a sum stands in the question, came out before, or is common knowledge
            known = re.findall(r"\d+", problem.question) + results + ["2", "60", "100"]
            assert set(re.findall(r"\d+", expression)) <= set(known), step
            results.append(result)
        assert last_line == f"#### {results[-1]}"


def test_thoughts_only_hold_right_sums(splits):
    for problem in splits["test"]:
        text = completion("thinking", problem)
        assert text.startswith("<think>\n") and text.endswith(problem.answer.split("\n")[-1] + "<|im_end|>")
        for chain in re.findall(r"\d[\d+*/-]*(?:=\$?\d[\d+*/-]*)+", text):
            assert len({compute(part.removeprefix("$")) for part in chain.split("=")}) == 1, chain


def test_nothing_of_train_stands_in_test(splits):
    assert len(splits["test"]) >= 600
    pairs = {split: {(problem.template, problem.numbers) for problem in splits[split]} for split in splits}
    assert not pairs["train"] & pairs["test"]
    texts = {split: {mask_names(problem.question) for problem in splits[split]} for split in splits}
    assert not texts["train"] & texts["test"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_problem_files_follow_from_the_seed(split):
    problems = make_split(split)
    assert len(problems) == SPLIT_SIZES[split]
    assert problem_lines(problems) == (DEMO / "problems" / f"{split}.jsonl").read_text()


def test_any_text_survives_the_tokenizer(tokenizer):
    every_code_point = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000), *range(0x1F000, 0x1FB00)]))
    texts = [
        every_code_point,
        "e\u0301 é 日本語 🎉👩‍👩‍👧 \x00\x07\x1b",
        "  a \n\n\t b  .  , n't <|im_end|><think>\n</think> 's",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_are_those_of_qwen3(tokenizer):
    assert 640 <= len(tokenizer) <= 1000
    assert [tokenizer.decode(token) for token in tokenizer.encode("12 345")] == ["1", "2", " ", "3", "4", "5"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    marked = "<|im_start|>a<|im_end|><|endoftext|><think>\nb\n</think>"
    assert tokenizer.decode(tokenizer.encode(marked), skip_special_tokens=True) == "a<think>\nb\n</think>"
    assert len(tokenizer.encode("<|im_start|><|im_end|><|endoftext|><think></think>")) == 5


def test_chat_template_thinks_unless_told_not_to(tokenizer):
    messages = build_messages("few_shot", "What is 1+1?", [("What is 2+2?", "2+2=<<2+2=4>>4\n#### 4")], "turns")
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)

    def render(**options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert render() == turns
    assert render(add_generation_prompt=True) == turns + "<|im_start|>assistant\n"
    assert render(add_generation_prompt=True, enable_thinking=True) == turns + "<|im_start|>assistant\n"
    without = render(add_generation_prompt=True, enable_thinking=False)
    assert without == turns + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert build_prompt("thinking", "Q", tokenizer) + "<think>\n" == chatml_think_prefill("Q")


def test_training_rows_tokenize_as_inference_does(splits, tokenizer):
    rng, problems = random.Random(0), iter(splits["test"])
    for _ in range(150):
        pieces = draw_row(problems, splits["train"], tokenizer, rng)
        apart = [token for text, _ in pieces for token in tokenizer.encode(text)]
        assert apart == tokenizer.encode("".join(text for text, _ in pieces))


def test_model_is_small_and_fp32(tokenizer):
    config = AutoConfig.from_pretrained(DEMO / "model")
    assert config.model_type == "qwen3" and config.tie_word_embeddings
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == tokenizer.model_max_length == 2048
    weights = DEMO / "model" / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    tensors = list(load_file(weights).values())
    assert {str(tensor.dtype) for tensor in tensors} == {"torch.float32"}
    assert 400_000 <= sum(tensor.numel() for tensor in tensors) <= 950_000
    generation = json.loads((DEMO / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
