"""Greedy decoding takes its logits from bf16 where that is faster, and the highest of them is that of fp32."""

import dataclasses

import pytest
import torch
from test_generation import one_at_a_time, random_model, random_requests, tokens_of

import head
from common import Decoding
from model import find_model, load_tokenizer
from sampling import highest_logits

needs_bf16 = pytest.mark.skipif(not head.bf16_gain(), reason="oneDNN has no bf16 products on this processor")
WIDE = {"hidden_size": 512, "intermediate_size": 768, "head_dim": 64, "vocab_size": 1024}


def highest(exact: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return highest_logits(head.highest_right(head.round_weights(exact), inputs)[:, -1])[1]


@needs_bf16
@pytest.mark.parametrize("scale", [0.02, 1.0, 50.0])
@pytest.mark.parametrize("vocabulary, hidden", [(128, 512), (4096, 640)])
def test_the_highest_logit_is_that_of_fp32(vocabulary, hidden, scale):
    torch.manual_seed(0)
    exact = torch.nn.functional.normalize(torch.randn(vocabulary, hidden)) * hidden**0.5
    inputs = scale * torch.randn(60, 1, hidden)
    for row in range(30):  # two tokens have logits that differ by a thousandth
        inputs[row] = scale * (exact[row] + 1.002 * exact[row + 31])
    logits = inputs[:, -1].double() @ exact.double().T
    found = logits.gather(-1, highest(exact, inputs)[:, None])
    tolerance = 1e-6 * inputs.norm(dim=-1) * exact.norm(dim=-1).max()
    assert (found >= logits.amax(dim=-1, keepdim=True) - tolerance).all()
    in_bf16 = (inputs[:, -1].bfloat16() @ exact.bfloat16().T).argmax(dim=-1)
    assert (in_bf16 != logits.argmax(dim=-1)).any()  # it alone would not do


@needs_bf16
def test_a_logit_is_found_though_all_its_weights_are_rounded_down_and_anothers_up():
    half = 2**-8  # of the distance between 1 and the next number in bf16
    exact = torch.full((128, 512), 0.5)
    exact[3], exact[90] = 1 + 0.99 * half, 1 + 1.01 * half
    exact[90, 0] -= 0.1
    inputs = torch.ones(1, 1, 512)
    assert (inputs[0].bfloat16() @ exact.bfloat16().T).argmax() == 90
    assert highest(exact, inputs).item() == 3


@needs_bf16
def test_a_logit_is_found_below_others_that_are_out_of_the_question():
    half = 2**-8
    exact = torch.full((128, 512), -0.25)
    exact[[3, 90], 256:] = -1
    exact[3, :256], exact[90, :256] = 1 + 0.99 * half, 1 + 1.01 * half
    exact[90, 0] -= 0.1
    exact[50] = torch.eye(512)[0] * 0.3
    inputs = torch.ones(1, 1, 512)
    assert (inputs[0] @ exact.T)[0, [3, 90, 50]].tolist() == pytest.approx([0.99, 0.91, 0.3], abs=1e-3)
    assert (inputs[0].bfloat16() @ exact.bfloat16().T)[0, [3, 90, 50]].tolist() == pytest.approx(
        [0, 1.9, 0.3], abs=0.01
    )
    assert highest(exact, inputs).item() == 3


@needs_bf16
def test_of_equal_logits_the_lowest_id_wins_and_nan_stays():
    torch.manual_seed(0)
    exact = torch.randn(1024, 512)
    exact[20] = exact[700] = exact[5]
    exact[40:600] = exact[30].clone()  # more than are looked at one by one
    inputs = torch.stack([exact[5], exact[30], torch.zeros(512), torch.full((512,), torch.nan)])[:, None]
    assert highest(exact, inputs)[:3].tolist() == [5, 30, 0]
    with torch.inference_mode():
        assert head.highest_right(head.round_weights(exact), inputs)[3].isnan().any()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_model("demo/model"))


@needs_bf16
def test_greedy_tokens_are_those_of_one_prompt_at_a_time(tokenizer, monkeypatch):
    model = random_model(**WIDE).float()
    requests = [dataclasses.replace(request, max_new_tokens=12) for request in random_requests(6)]
    monkeypatch.setattr(head, "bf16_gain", lambda: 2.0)
    notes = []
    assert tokens_of(model, tokenizer, requests, note=notes.append) == one_at_a_time(model, requests)
    assert any(note.startswith("logits: in bf16, 2.0 times as fast") for note in notes)
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("case", ["sampled", "slow", "in fp64", "small", "odd vocabulary", "autocast"])
def test_elsewhere_the_head_stays_as_it_is(case, tokenizer, monkeypatch):
    monkeypatch.setattr(head, "bf16_gain", lambda: 1.1 if case == "slow" else 2.0)
    shape = {} if case == "small" else WIDE | ({"vocab_size": 1000} if case == "odd vocabulary" else {})
    model = random_model(**shape)
    model = model if case == "in fp64" else model.float()
    notes, decoding = [], Decoding(do_sample=case == "sampled", temperature=1.0, top_p=1.0, top_k=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        tokens_of(model, tokenizer, random_requests(1), note=notes.append, decoding=decoding)
    assert not any(note.startswith("logits:") for note in notes)


@pytest.mark.parametrize(
    "architecture, changes, unchanged",
    [
        ("Qwen3", {}, True),
        ("Llama", {}, True),
        ("Gemma2", {"final_logit_softcapping": 30.0}, False),
        ("Granite", {"logits_scaling": 8.0}, False),
        ("Cohere", {"logit_scale": 0.0625}, False),
    ],
)
def test_a_model_that_changes_its_logits_afterwards_is_recognized(architecture, changes, unchanged):
    model = random_model(architecture, **changes)
    assert head.returns_logits_unchanged(model, model.lm_head) == unchanged
    assert "forward" not in vars(model.lm_head)
