"""The rolling batch gives the tokens that one prompt at a time gives, and samples as stated."""

import contextlib
import dataclasses
import functools
import math
import os
import random

import pytest
import scipy.stats
import torch
import transformers
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import data
import generation
import linear
import sampling
from common import MODES, Decoding, UserError, build_prompt
from generation import Cohort, Limits, Request, Scheduler, Sequence, generate
from sampling import choose_tokens, counter_hash, has_fp64, highest_logits, highest_tokens, sample_tokens

VOCABULARY = 211  # below the demo tokenizer's end tokens, so that random models run to their limit
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 108,
    "intermediate_size": 133,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "initializer_range": 0.14,  # at the default of 0.02 random models echo one token
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
COLUMN_BYTES = 2 * SHAPE["head_dim"] * SHAPE["num_key_value_heads"] * SHAPE["num_hidden_layers"] * 8  # one token, fp64
CAPTURED = Limits(captured_slots=4)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "demo/model")


def random_model(architecture="Qwen3", **changes):
    torch.manual_seed(7)
    config = getattr(transformers, f"{architecture}Config")(**(SHAPE | changes))
    attention = "eager" if architecture == "Gemma2" else "sdpa"  # softcapping exists in eager alone
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    model.generation_config.eos_token_id = None
    return model


def random_requests(count=17, beginning=17, seed=5):
    """Prompts that share a beginning, of uneven lengths, with uneven limits."""
    draw = random.Random(seed)

    def tokens(least, most):
        return [draw.randrange(2, VOCABULARY) for _ in range(draw.randint(least, most))]

    shared = tokens(beginning, beginning)
    return [Request(i, 0, shared + tokens(1, 40), draw.randint(45, 80)) for i in range(count)]


def tokens_of(model, tokenizer, requests, note=lambda line: None, **options):
    done = list(generate(model, tokenizer, requests, note=note, **options))
    assert sorted((c.id, c.sample) for c in done) == sorted((r.id, r.sample) for r in requests)
    return {(c.id, c.sample): c.token_ids for c in done}


@functools.cache
def random_case(architecture="Qwen3", **changes):
    """(model, requests, the tokens of one prompt at a time). Tests share what takes long to compute."""
    model, requests = random_model(architecture, **changes), random_requests()
    return model, requests, one_at_a_time(model, requests)


def one_at_a_time(model, requests, stop_ids=None):
    """What transformers' own generate gives for each prompt alone."""
    result = {}
    for request in requests:
        ids = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False,
                eos_token_id=stop_ids, pad_token_id=0, temperature=None, top_k=None, top_p=None,
            )  # fmt: skip
        result[request.id, request.sample] = out[0, len(request.prompt_ids) :].tolist()
    return result


ARCHITECTURES = {
    "Qwen3": {},
    "Llama": {"num_key_value_heads": 3},
    "Mistral": {"sliding_window": 13},
    "Gemma2": {"sliding_window": 11, "query_pre_attn_scalar": 18, "tie_word_embeddings": False},
    "GPT2": {"n_embd": 108, "n_layer": 2, "n_head": 3, "n_positions": 256, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_does_not_depend_on_batch_size_order_or_refill(architecture, tokenizer):
    model, requests, alone = random_case(architecture, **ARCHITECTURES[architecture])
    assert min(len(set(tokens)) for tokens in alone.values()) >= 20
    for batch_size in (5, "auto"):
        assert tokens_of(model, tokenizer, requests, batch_size=batch_size) == alone
    for batch_size, some in ((1, requests[:4]), (4, requests[::-2])):
        assert tokens_of(model, tokenizer, some, batch_size=batch_size) == {(r.id, 0): alone[r.id, 0] for r in some}


class Counted(generation.Engine):
    """Counts what happens to cohorts, and how many sequences are preempted."""

    merged = packed = preempted = 0

    def merge(self):
        Counted.merged += 1
        super().merge()

    def repack(self, cohorts):
        Counted.packed += 1
        waiting = len(self.scheduler.waiting)
        super().repack(cohorts)
        Counted.preempted += len(self.scheduler.waiting) - waiting


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(generation, "Engine", Counted)
    Counted.merged = Counted.packed = Counted.preempted = 0


@functools.cache
def moving_case():
    model = random_model("Mistral", sliding_window=50)
    requests = [dataclasses.replace(r, max_new_tokens=10 + 19 * r.id % 120) for r in random_requests(40, beginning=9)]
    return model, requests, one_at_a_time(model, requests)


@pytest.mark.parametrize("captured", [False, True])
def test_greedy_does_not_depend_on_how_cohorts_grow_merge_and_give_way(captured, counted, tokenizer, request):
    """Little to spare, few cohorts, and memory for a third of the sequences: everything that moves keys and values happens."""
    if captured:
        request.getfixturevalue("recorded")
    limits = Limits(
        spare_columns=3, max_cohorts=3, small_cohort=1, similar_length=0.9, captured_slots=4 if captured else 1
    )
    model, requests, alone = moving_case()
    assert min(len(set(tokens)) for tokens in alone.values() if len(tokens) > 40) >= 20
    assert tokens_of(model, tokenizer, requests, batch_size=12, limits=limits) == alone
    assert Counted.merged > 3 and Counted.packed > 10 and not Counted.preempted
    limits = dataclasses.replace(limits, kv_cache_bytes=12 * 100 * COLUMN_BYTES)
    notes = []
    assert tokens_of(model, tokenizer, requests, batch_size=30, limits=limits, note=notes.append) == alone
    assert "what fits into memory at first, and up to 30 where" in notes[0]  # a number is an upper bound
    limits = dataclasses.replace(limits, answer_share=0)  # admits more than can stay
    assert tokens_of(model, tokenizer, requests, limits=limits) == alone
    assert Counted.preempted > 3
    assert not captured or Recorded.replays > Recorded.graphs > 10


class Recorded(TorchDispatchMode):
    """What a torch.cuda.CUDAGraph does, without CUDA: the same kernels again, on the same memory, with the same numbers.

    Whatever of a step is not in a tensor stays as it was when the step was captured. What a capture
    forbids, for it waits for the device or copies from the host, is refused.
    """

    graphs = replays = 0
    FORBIDDEN = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.calls, self.patches, Recorded.graphs = [], pytest.MonkeyPatch(), Recorded.graphs + 1

    def __enter__(self):
        for name in ("tolist", "numpy", "cpu"):
            self.patches.setattr(torch.Tensor, name, self.refused, raising=False)
        return super().__enter__()

    def refused(self, *arguments):
        raise AssertionError("waits for the device")

    def __exit__(self, *error):
        self.patches.undo()
        super().__exit__(*error)
        for _, args, _, result in self.calls:  # a capture computes nothing: its results come with the first replay
            for old in self.made(args, result):
                old.fill_(float("nan") if old.is_floating_point() else 1)

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        name = kernel.overloadpacket.__name__
        assert name not in self.FORBIDDEN
        if "index" in name:  # by a mask it waits to know how many
            assert all(item.dtype != torch.bool for item in tree_leaves(args[1]) if isinstance(item, torch.Tensor))
        result = kernel(*args, **kwargs or {})
        self.calls.append((kernel, args, kwargs or {}, result))
        return result

    def made(self, args, result):
        """The tensors of a result that are no views of what it was made from."""
        memory = {item.untyped_storage().data_ptr() for item in tree_leaves(args) if isinstance(item, torch.Tensor)}
        tensors = [item for item in tree_leaves(result) if isinstance(item, torch.Tensor)]
        return [item for item in tensors if item.untyped_storage().data_ptr() not in memory]

    def replay(self):
        Recorded.replays += 1
        for kernel, args, kwargs, result in self.calls:
            again = kernel(*args, **kwargs)
            for old, new in zip(self.made(args, result), self.made(args, again), strict=True):
                old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """torch.cuda as the captured steps use it, with Recorded for its graphs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: graph)
    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    Recorded.graphs = Recorded.replays = 0
    return Recorded


@pytest.mark.parametrize("architecture", ["Qwen3", "Gemma2"])
def test_captured_steps_give_the_tokens_of_one_prompt_at_a_time(architecture, recorded, tokenizer):
    model, requests, alone = random_case(architecture, **ARCHITECTURES[architecture])
    notes = []
    for batch_size in (9, "auto"):
        options = {"batch_size": batch_size, "limits": CAPTURED, "note": notes.append}
        assert tokens_of(model, tokenizer, requests, **options) == alone
    assert not [note for note in notes if "captured" in note], notes
    assert recorded.graphs > 10 and recorded.replays > 3 * recorded.graphs
    assert not [note for note in notes if "captured" in note]


def test_captured_steps_sample_the_same_tokens(recorded, tokenizer):
    model, requests, decoding = random_model(), random_requests(), Decoding(True, 0.8, 0.9, 20, seed=3)
    sampled = tokens_of(model, tokenizer, requests, decoding=decoding, batch_size=9, limits=CAPTURED)
    assert recorded.replays > 100
    assert tokens_of(model, tokenizer, requests, decoding=decoding, batch_size=4) == sampled


class Impossible(Recorded):
    def __enter__(self):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class Stale(Recorded):
    """Its replays leave the numbers of the step that was captured."""

    def __exit__(self, *error):
        self.patches.undo()
        TorchDispatchMode.__exit__(self, *error)

    def replay(self):
        Recorded.replays += 1


class TooLarge(Recorded):
    def __enter__(self):
        if Recorded.graphs >= 3:
            raise torch.OutOfMemoryError("out of memory")
        return super().__enter__()


class WrongLater(Recorded):
    """Its replays are right up to the 40th, then give other logits."""

    def replay(self):
        super().replay()
        if Recorded.replays > 40:
            self.calls[-1][3].add_(1)


@pytest.mark.parametrize(
    ("graph", "graphs", "told"),
    [
        (Impossible, 1, "operation not permitted when stream is capturing"),
        (Stale, 1, "a replayed step gives other logits"),
        (TooLarge, 3, "out of memory"),
    ],
)
def test_steps_that_cannot_be_captured_or_replay_wrongly_are_run_as_they_are(
    graph, graphs, told, recorded, tokenizer, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    model, requests, alone = random_case()
    notes = []
    assert tokens_of(model, tokenizer, requests, limits=CAPTURED, note=notes.append) == alone
    assert notes[1:] == [f"decode steps are not captured as CUDA graphs, which is slower: {told}"]
    assert recorded.graphs == graphs  # it is not tried again


def test_replays_that_become_wrong_are_noticed_later(recorded, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", WrongLater)
    model, requests, _ = random_case()
    notes, limits = [], dataclasses.replace(CAPTURED, check_every=20)
    tokens_of(model, tokenizer, requests, limits=limits, note=notes.append)
    assert len(notes) == 2 and recorded.replays <= 61
    assert "a replayed step gives other logits, and 19 replays before it were not compared" in notes[1]


def test_prompts_without_a_shared_beginning_are_answered_alike(tokenizer):
    model, requests = random_model(), random_requests(beginning=0)
    assert tokens_of(model, tokenizer, requests, batch_size=6) == one_at_a_time(model, requests)


@pytest.mark.parametrize("all_alike", [True, False])
def test_answers_of_one_token_end_as_they_are_read(all_alike, tokenizer):
    model = random_model()
    requests = [
        dataclasses.replace(r, max_new_tokens=1 + (r.id % 9 == 5) * (not all_alike)) for r in random_requests(60)
    ]
    limits = Limits(max_prefill_tokens=100)
    assert tokens_of(model, tokenizer, requests, limits=limits) == one_at_a_time(model, requests)


def test_a_wrong_position_id_is_noticed(tokenizer, monkeypatch):
    model, requests = random_model(), random_requests(6)
    right = tokens_of(model, tokenizer, requests)
    forward = model.forward

    def off_by_one(position_ids, **inputs):
        return forward(position_ids=position_ids + (position_ids.shape[1] == 1), **inputs)

    monkeypatch.setattr(model, "forward", off_by_one)
    wrong = tokens_of(model, tokenizer, requests)
    assert all(wrong[key] != right[key] for key in right)


@pytest.mark.parametrize("mode", MODES)
def test_the_demo_model_answers_alike_in_any_batch(mode, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", dtype=torch.float32)
    requests = demo_requests(mode, tokenizer, 24)
    alone = one_at_a_time(model, requests, sorted(generation.stop_token_ids(model, tokenizer)))
    assert tokens_of(model, tokenizer, requests, batch_size=7) == alone
    assert tokens_of(model, tokenizer, requests) == alone


def demo_requests(mode, tokenizer, count, samples=1, most=300):
    train, test = (data.load_questions(str(ROOT / "demo/problems"), split) for split in ("train", "test"))
    examples = [(item.question, item.answer) for item in train[:3]]
    prompts = [build_prompt(mode, item.question, tokenizer, examples) for item in test[:count]]
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return [Request(i, sample, ids[i], most) for i in range(count) for sample in range(samples)]


def test_draws_are_the_same_however_many_are_made_at_once(monkeypatch):
    logits = torch.randn(9, 97, generator=torch.Generator().manual_seed(4)) * 3
    branches = [[Sequence(Request(i, k, [1], 9), [4]) for k in range(1 + i % 4)] for i in range(9)]
    for decoding in (Decoding(True, 1.0, 0.9, 20, seed=5), Decoding(True, 1.0, 1.0, 0)):
        expected = choose_tokens(logits, branches, decoding)
        assert len(expected) == sum(map(len, branches)) and len(set(expected)) > 5
        for at_once in (1, 2, 5):
            with monkeypatch.context() as patch:
                patch.setattr(sampling, "MOST_NOISE_ON_CPU", at_once * (decoding.top_k or 97) + 1)
                assert choose_tokens(logits, branches, decoding) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("equal", [1, 2, 9, 300])
def test_of_equal_logits_the_lower_token_ranks_first(dtype, equal):
    draw = torch.Generator().manual_seed(equal)
    logits = torch.randint(-150, 150, (40, 300), generator=draw) // equal * 0.25
    logits[::2] = torch.stack([torch.randperm(300, generator=draw) for _ in range(20)]) - 150.0  # rows without equals
    logits[::3, ::2] = -math.inf
    logits[logits == 0] *= torch.randint(2, (int((logits == 0).sum()),), generator=draw) * 2.0 - 1  # -0.0 among them
    logits = logits.to(dtype)
    ranked = [sorted(range(300), key=lambda token: (-row[token], token)) for row in logits.tolist()]
    for count in (1, 7, 20, 299, 300):
        assert highest_tokens(logits, count).tolist() == [tokens[:count] for tokens in ranked]
    unequal = logits[::6, 1::2]  # where nothing is equal
    assert (unequal.sort(dim=-1).values.diff(dim=-1) > 0).all()
    assert highest_tokens(unequal, 20).tolist() == unequal.argsort(dim=-1, descending=True)[:, :20].tolist()


def test_what_samples_of_a_question_have_in_common_is_computed_once(tokenizer, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", dtype=torch.float32)
    requests = demo_requests("thinking", tokenizer, 5, samples=6, most=60)
    decoding, read, decoded = Decoding(True, 0.8, seed=1), [], []
    expected = tokens_of(model, tokenizer, requests, decoding=decoding, batch_size=1)
    forward = generation.Engine.forward

    def counted(engine, spans, ids, *rest, **more):
        (decoded if more["over_buffers"] else read).append(len(ids))
        return forward(engine, spans, ids, *rest, **more)

    monkeypatch.setattr(generation.Engine, "forward", counted)
    assert tokens_of(model, tokenizer, requests, decoding=decoding) == expected
    assert sum(read) == 1 + 5  # the beginning that all prompts share, and the rest of each
    begun = {(i, tuple(tokens[:end])) for (i, _), tokens in expected.items() for end in range(1, len(tokens))}
    assert sum(decoded) == len(begun) < sum(map(len, expected.values())) * 3 / 4
    few = Limits(max_prefill_tokens=1, max_sequences=7)  # one prompt at a time, and samples of one in different cohorts
    assert tokens_of(model, tokenizer, requests, decoding=decoding, limits=few) == expected


@pytest.mark.parametrize("captured", [False, True])
def test_samples_part_in_cohorts_that_grow_merge_and_give_way(captured, counted, tokenizer, request):
    if captured:
        request.getfixturevalue("recorded")
    model, decoding = random_model("Mistral", sliding_window=50), Decoding(True, 0.1, 1.0, 0, seed=3)
    requests = [
        dataclasses.replace(one, sample=sample, max_new_tokens=10 + (19 * one.id + 7 * sample) % 90)
        for one in random_requests(12, beginning=9)
        for sample in range(4)
    ]
    expected = tokens_of(model, tokenizer, requests, decoding=decoding, batch_size=1)
    limits = Limits(spare_columns=3, max_cohorts=3, small_cohort=1, similar_length=0.9, answer_share=0,
                    kv_cache_bytes=12 * 100 * COLUMN_BYTES, captured_slots=4 if captured else 1)  # fmt: skip
    assert tokens_of(model, tokenizer, requests, decoding=decoding, limits=limits) == expected
    together = [os.path.commonprefix([expected[i, 0], expected[i, 1]]) for i in range(12)]
    assert sum(map(len, together)) > 24 and any(expected[i, 0] != expected[i, 1] for i in range(12))
    assert Counted.merged > 3 and Counted.packed > 10 and Counted.preempted
    assert not captured or Recorded.replays > Recorded.graphs > 10


def test_sampled_text_is_a_function_of_seed_question_sample_and_step(tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "demo/model", dtype=torch.float32)
    requests = demo_requests("thinking", tokenizer, 10, samples=3)
    decoding = Decoding(do_sample=True, temperature=1.0, top_p=0.95, top_k=20, seed=1)
    expected = tokens_of(model, tokenizer, requests, decoding=decoding)
    assert tokens_of(model, tokenizer, requests[::-1], decoding=decoding, batch_size=4) == expected
    alone = requests[4]
    assert tokens_of(model, tokenizer, [alone], decoding=decoding) == {(1, 1): expected[1, 1]}
    assert len({tuple(expected[i, sample]) for i in range(10) for sample in range(3)}) > 10
    other = Decoding(do_sample=True, temperature=1.0, top_p=0.95, top_k=20, seed=2)
    assert tokens_of(model, tokenizer, requests, decoding=other) != expected


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 20, 0.95), (1.7, 7, 1.0), (0.8, 0, 0.5), (1.0, 500, 0.9)]
)
def test_draws_follow_the_softmax_that_transformers_filters(temperature, top_k, top_p):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    draws = 20_000
    counters = torch.stack([torch.arange(draws) // 100, torch.arange(draws) % 10, torch.arange(draws)], dim=1)
    row_of, decoding = torch.zeros(draws, dtype=torch.int64), Decoding(True, temperature, top_p, top_k, seed=11)
    drawn = sample_tokens(logits[None], row_of, counters, decoding).bincount(minlength=40)
    filtered = transformers.TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        filtered = transformers.TopKLogitsWarper(top_k)(None, filtered)
    filtered = transformers.TopPLogitsWarper(top_p)(None, filtered)
    expected = filtered[0].double().softmax(-1) * draws
    assert (drawn[expected == 0] == 0).all()
    kept = expected > 0
    assert scipy.stats.chisquare(drawn[kept], expected[kept]).pvalue > 1e-3


def test_a_thought_open_when_its_budget_is_spent_is_closed_in_any_batch(tokenizer):
    (model, _, free), stop, think, close = random_case(), [3, 4, 5], 7, 8
    budgets = [
        generation.ThinkBudget(20, stop, think, close, opened=request.id % 2 == 0) for request in random_requests()
    ]
    requests = [dataclasses.replace(request, budget=budgets[request.id]) for request in random_requests()]
    done = {c.id: c for c in generate(model, tokenizer, requests, batch_size=5, note=lambda line: None)}
    forced = {i for i, budget in enumerate(budgets) if budget.overruns(free[i, 0])}
    assert 0 < len(forced) < len(requests) and {i for i, c in done.items() if c.forced} == forced
    for request in requests:
        tokens = done[request.id].token_ids
        if request.id not in forced:
            assert tokens == free[request.id, 0]
            continue
        begun = (*free[request.id, 0][:20], *stop)
        longer = dataclasses.replace(request, prompt_ids=[*request.prompt_ids, *begun], max_new_tokens=len(tokens) - 23)
        assert tokens == [*begun, *one_at_a_time(model, [longer])[request.id, 0]]
        again = dataclasses.replace(request, begun=begun)
        assert tokens_of(model, tokenizer, [again]) == {(request.id, 0): tokens}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 97, 128, 1000, 151_936])
def test_the_highest_logit_is_found_in_vocabularies_of_every_size(vocabulary, dtype):
    logits = torch.randn(6, 2, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)[:, -1]
    logits[1] = 0.0  # all are equal
    logits[2, -1] = logits[2, vocabulary // 2] = 99.0  # two are
    logits[3, vocabulary // 3] = float("nan")
    logits[4] = -torch.inf
    values, tokens = highest_logits(logits)
    expected = logits.max(dim=-1)
    assert torch.equal(tokens, expected.indices) and torch.equal(values.nan_to_num(7), expected.values.nan_to_num(7))


def test_of_equal_logits_the_lower_token_id_ranks_first():
    logits = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, 3.0]]).expand(500, -1)
    counters = torch.arange(500)[:, None].expand(-1, 3)
    drawn = sample_tokens(logits, torch.arange(500), counters, Decoding(True, 1.0, 1.0, top_k=2))
    assert set(drawn.tolist()) == {1, 2}
    tied = torch.full((1, 300), 2.0, dtype=torch.bfloat16)
    assert choose_tokens(tied, [[None, None]], Decoding()) == [0, 0]


class WithoutFp64(torch.Tensor):
    """A tensor of a pretended Apple GPU: it computes on the CPU, and refuses fp64 as that GPU does."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="mps")

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, kernel, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda item: item.held, (args, kwargs or {}))
        result = kernel(*args, **kwargs)
        if torch.device("cpu") in (*args, kwargs.get("device")):
            return result
        if any(item.dtype == torch.float64 for item in tree_leaves(result) if isinstance(item, torch.Tensor)):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tree_map_only(torch.Tensor, cls, result)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(True, 0.6, 0.95, 20, seed=5), Decoding(True, 1.0, 1.0, 0)])
def test_a_device_without_fp64_draws_what_a_cpu_draws(decoding):
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(2)) * 3
    branches = [[Sequence(Request(i, k, [1], 9), [4] * (i % 7)) for k in range(1 + i % 3)] for i in range(50)]
    with pytest.raises(TypeError, match="float64"):
        WithoutFp64(logits).double()
    assert has_fp64(torch.device("cpu")) and not has_fp64(torch.device("mps"))
    assert choose_tokens(WithoutFp64(logits), branches, decoding) == choose_tokens(logits, branches, decoding)


def fake_bmm(a, b, out_dtype=None, wrong=0):
    return a.to(out_dtype) @ b.to(out_dtype) + wrong


@pytest.mark.parametrize(
    ("bmm", "told"),
    [
        (fake_bmm, None),
        (functools.partial(fake_bmm, wrong=1), "gives other numbers"),
        (torch.bmm, "fails here"),  # the real one, which a CPU does not have
    ],
)
def test_the_fp32_product_of_16_bit_numbers_is_tried_before_it_is_used(bmm, told, monkeypatch):
    monkeypatch.setattr(torch, "bmm", bmm)
    fault = generation.fp32_bmm_fault.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert fault is None if told is None else told in fault


def test_where_the_fp32_product_fails_a_line_says_so():
    notes = []
    product = generation.choose_product(torch.device("meta"), torch.bfloat16, notes.append)
    assert (
        product is generation.converted_product and len(notes) == 1 and "converted to fp32, which is slower" in notes[0]
    )
    for device, dtype in (("cpu", torch.bfloat16), ("meta", torch.float32)):
        assert generation.choose_product(torch.device(device), dtype, notes.append) is generation.plain_product
    assert len(notes) == 1


def test_both_products_for_gpus_give_the_same_tokens(tokenizer, monkeypatch):
    """Scores in fp32 beside 16-bit weights, keys and values, as on a GPU."""
    model, requests, done = random_model().bfloat16(), random_requests(6), []
    monkeypatch.setattr(torch, "bmm", fake_bmm)
    for product in (generation.converted_product, generation.fp32_product):
        monkeypatch.setattr(generation, "choose_product", lambda *device, product=product: product)
        done.append(tokens_of(model, tokenizer, requests))
    assert done[0] == done[1]


def test_large_layers_multiply_with_onednn_where_it_is_faster_and_give_the_same_tokens(tokenizer, monkeypatch):
    wide = {"hidden_size": 512, "intermediate_size": 768, "head_dim": 64}
    model, requests = random_model(**wide).float(), random_requests(6)
    requests = [dataclasses.replace(request, max_new_tokens=12) for request in requests]
    alone, calls, real = one_at_a_time(model, requests), [], linear.onednn_linear

    def counted(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(linear, "onednn_linear", counted)
    for gain, share, used in ((0.0, 1, False), (1.1, 1, False), (2.0, 0, True), (2.0, 1, True)):
        monkeypatch.setattr(linear, "onednn_gain", lambda *way, gain=gain: gain)
        monkeypatch.setattr(linear, "PACKED_SHARE", share)  # of the memory: none, or enough
        notes = []
        assert tokens_of(model, tokenizer, requests, note=notes.append) == alone
        assert bool(calls) == used == any("2.0 times as fast" in note for note in notes)
        assert (used and share) == any("packed weights" in note for note in notes)
    assert not any("forward" in vars(module) for module in model.modules())
    calls.clear()
    for other in (random_model().float(), random_model(**wide)):  # small layers, and fp64
        tokens_of(other, tokenizer, requests[:1])
    with torch.autocast("cpu", torch.bfloat16):
        tokens_of(model, tokenizer, requests[:1])
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["other numbers", "fails", "packs otherwise"])
def test_onednn_is_not_taken_where_it_fails_or_gives_other_numbers(fault, dtype, monkeypatch):
    def faulty(weight, bias, inputs):
        if fault == "fails":
            raise RuntimeError("not built with oneDNN")
        return inputs @ weight.T + 1

    if fault == "packs otherwise":
        monkeypatch.setattr(linear, "packed", lambda weight: weight + 1)
    else:
        monkeypatch.setattr(linear, "onednn_linear", faulty)
    assert linear.onednn_gain.__wrapped__(dtype, pack=True) == 0


def waiting(*lengths, prefix=0, budget=10**6, max_sequences=100, most=80, **limits):
    sequences = [Sequence(Request(i, 0, [0] * length, most), []) for i, length in enumerate(lengths)]
    return Scheduler(sequences, prefix, budget, max_sequences, Limits(**limits))


def test_the_scheduler_takes_sequences_of_similar_length_together_the_longest_first():
    scheduler = waiting(10, 50, 100, 76, 74, 90, small_cohort=1)
    assert [len(one) for one in scheduler.take(6)] == [100, 90, 76]
    assert [len(one) for one in scheduler.take(3)] == [74]
    assert [len(one) for one in waiting(100, 10, 20, small_cohort=32).take(3)] == [100, 20, 10]


def test_the_scheduler_admits_what_memory_holds_with_half_of_an_answer_each():
    limits = {"prefix": 20, "spare_columns": 8, "most": 80}
    columns = 16 + 8 + 16 // 8  # of the prompt, and to spare
    assert waiting(*[36] * 40, budget=660, **limits).num_to_admit([]) == 660 // (columns + 80 // 2)
    assert waiting(*[36] * 40, budget=1, **limits).num_to_admit([]) == 1  # one goes on, whatever it takes
    scheduler = waiting(*[36] * 40, budget=660, **limits)
    scheduler.finished, scheduler.produced = 32, 320  # answers turn out to have 10 tokens
    assert scheduler.num_to_admit([]) == 660 // (columns + 10 // 2)


def test_the_scheduler_lets_few_join_only_where_no_sequence_is_live():
    live = Cohort([[Sequence(Request(100 + i, 0, [0] * 36, 80), [])] for i in range(76)], 76, 40, 36)
    assert waiting(*[36] * 90, max_sequences=80).num_to_admit([live]) == 0
    assert waiting(*[36] * 90, max_sequences=90).num_to_admit([live]) == 14
    assert waiting(*[36] * 4, max_sequences=4).num_to_admit([]) == 4


def test_the_hash_is_splitmix64():
    assert counter_hash(torch.tensor(0)).item() & (2**64 - 1) == 0xE220A8397B1DCDAF
    first = counter_hash(torch.tensor(1), torch.tensor(2))
    assert first != counter_hash(torch.tensor(2), torch.tensor(1))


def test_no_step_is_spent_on_a_finished_row_and_the_shared_beginning_is_read_once(tokenizer):
    model, requests = random_model(), random_requests(40, beginning=50)
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True
    )
    done = tokens_of(model, tokenizer, requests, batch_size=8)
    hook.remove()
    decoded = sum(rows for rows, width in shapes if width == 1)
    short_prompts = sum(len(r.prompt_ids) == 51 for r in requests)  # their prefill is one token wide too
    assert sum(len(tokens) - 1 for tokens in done.values()) <= decoded
    assert decoded <= sum(len(tokens) - 1 for tokens in done.values()) + short_prompts
    prefilled = sum(rows * width for rows, width in shapes if width > 1)
    assert prefilled < 50 + 40 * 41
    assert max(rows for rows, _ in shapes) == 8


def test_out_of_memory_injected_halves_the_batch_and_loses_nothing(tokenizer, monkeypatch):
    model, requests, expected = random_case()
    passes, notes, forward = [], [], model.forward

    def injected(input_ids, **inputs):
        passes.append(1)
        if len(passes) > 30 and input_ids.shape[0] > 3:
            raise torch.OutOfMemoryError("injected by the test")
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", injected)
    assert tokens_of(model, tokenizer, requests, batch_size=16, note=notes.append) == expected
    assert [note for note in notes if "batch size 8" in note or "batch size 4" in note or "batch size 2" in note]


class LittleMemory(TorchDispatchMode):
    """Raises what torch raises without memory: at the `at`-th call of a kernel, or at each one that `refused` names."""

    def __init__(self, kernel, at=None, refused=lambda args: False):
        super().__init__()
        self.kernel, self.at, self.refused, self.calls = kernel, at, refused, None

    def begin(self, note):
        """Memory is enough until the first note, which follows the shared beginning: there one sequence is the least."""
        self.calls = self.calls or 0

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel.overloadpacket.__name__ == self.kernel and self.calls is not None:
            self.calls += 1
            if self.calls == self.at or self.refused(args):
                raise RuntimeError("injected by the test: can't allocate memory")
        return kernel(*args, **kwargs or {})


def test_a_batch_too_large_for_memory_is_halved_before_it_starts(tokenizer):
    model, requests, notes = random_model(), random_requests(9), []
    expected = tokens_of(model, tokenizer, requests)
    with LittleMemory("new_zeros", refused=lambda args: args[1][0] > 2) as memory:
        memory.begin("")
        assert tokens_of(model, tokenizer, requests, batch_size=9, note=notes.append) == expected
    assert [note for note in notes if "out of memory: going on with batch size 2" in note]


@pytest.mark.parametrize("at", [1, 2, 12])
@pytest.mark.parametrize("kernel", ["new_zeros", "copy_", "index_put_", "softmax", "max"])
def test_out_of_memory_injected_anywhere_loses_and_doubles_nothing(kernel, at, tokenizer):
    """New buffers, storing a step, sequences that move, attention, choosing; memory for 200 columns, so that some are preempted."""
    model, requests, expected = small_case()
    limits = Limits(kv_cache_bytes=200 * COLUMN_BYTES)
    with LittleMemory(kernel, at) as memory:
        assert tokens_of(model, tokenizer, requests, limits=limits, note=memory.begin) == expected
    assert memory.calls >= at


@functools.cache
def small_case():
    model, requests = random_model(), random_requests(12)
    requests = [dataclasses.replace(request, max_new_tokens=20 + request.id) for request in requests]
    return model, requests, one_at_a_time(model, requests)


@pytest.mark.parametrize("captured_slots", [1, 4])
def test_every_tensor_is_made_on_the_models_device(captured_slots, recorded, tokenizer, monkeypatch):
    """On the meta device, where a tensor of another device is refused: what a GPU would do, without one."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**SHAPE))
    model.generation_config.eos_token_id = None
    requests, draw = random_requests(12), random.Random(1)

    def chosen(logits, branches, decoding):
        assert logits.device.type == "meta"
        return [draw.randrange(2, 9) for branch in branches for _ in branch]

    monkeypatch.setattr(generation, "choose_tokens", chosen)
    monkeypatch.setattr(torch, "allclose", lambda *logits, **tolerances: True)  # they hold no numbers there
    notes, limits = [], Limits(kv_cache_bytes=2**21, captured_slots=captured_slots)
    assert len(tokens_of(model, tokenizer, requests, limits=limits, note=notes.append)) == 12
    assert len(notes) == 1 and (captured_slots == 1 or recorded.replays > 50)
    named = torch.zeros(5, 4, dtype=torch.int64, device="meta")
    drawn = sample_tokens(torch.zeros(3, 99, device="meta"), named[:, 0], named[:, 1:], Decoding(True))
    assert drawn.device.type == "meta"


def test_it_answers_under_autocast(tokenizer):
    """As training in bf16 scores; there keys and values may be of two dtypes."""
    wide = {"hidden_size": 324, "intermediate_size": 401, "head_dim": 54, "initializer_range": 0.08}
    model, requests = random_model(num_hidden_layers=3, **wide).float(), random_requests(6)
    expected = tokens_of(model, tokenizer, requests)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tokens_of(model, tokenizer, requests)
    assert [tokens[0] for tokens in rounded.values()] == [expected[key][0] for key in rounded]


def test_two_models_can_answer_in_turns(tokenizer):
    models, requests = (random_model(), random_model("Llama")), random_requests(5)
    expected = [tokens_of(model, tokenizer, requests) for model in models]
    both = [generate(model, tokenizer, requests, batch_size=2, note=lambda line: None) for model in models]
    mixed = list(zip(*both, strict=True))
    assert [{(c.id, c.sample): c.token_ids for c in done} for done in zip(*mixed, strict=True)] == expected


def test_nan_logits_name_the_question(tokenizer):
    model = random_model()
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(UserError, match=r"question \d+: .*NaN"):
        tokens_of(model, tokenizer, random_requests(), batch_size=1)


UNFIT = {
    "Bloom": ({}, "cannot be run here"),  # attention of its own
    "Mamba": ({}, "cannot be run here"),  # no attention
    "Bert": ({"num_attention_heads": 4}, "a look ahead"),
    "Bart": ({"decoder_layers": 2, "encoder_layers": 1, "d_model": 32}, "cannot be run here"),  # counts positions by itself
    "RecurrentGemma": ({"lru_width": 32, "num_attention_heads": 4, "num_hidden_layers": 3}, "cannot be run here"),
    "DiffLlama": ({"num_attention_heads": 4, "num_key_value_heads": 2}, "other than the stored ones"),
    "DeepseekV3": (
        {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 2, "intermediate_size": 32},
        "other than the stored ones",
    ),
    "Phimoe": (
        {"sliding_window": 30, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2},
        "cannot be run here",  # its window is in a mask alone
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", UNFIT)
def test_a_model_that_would_be_answered_wrongly_is_refused(architecture, tokenizer):
    """Its next token depends on more than the keys and values stored at the positions given."""
    changes, told = UNFIT[architecture]
    changes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0} | changes
    config = getattr(transformers, f"{architecture}Config")(**changes)
    with pytest.raises(UserError, match=f"{architecture}.*{told}"):
        tokens_of(transformers.AutoModelForCausalLM.from_config(config), tokenizer, random_requests(2))


def test_the_model_comes_back_as_it_was(tokenizer):
    model = random_model().train()
    attention = model.config._attn_implementation
    tokens_of(model, tokenizer, random_requests(3))
    assert model.training and model.config._attn_implementation == attention
