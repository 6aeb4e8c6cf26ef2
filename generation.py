"""Generation: many sequences at once, each token as one prompt at a time would give it.

Who runs. `generate` turns requests into completions. The Engine holds the live sequences and takes the
steps. The Scheduler keeps the waiting ones and decides how many may join. The KVCache holds keys and
values and is the model's attention. sampling.choose_tokens picks the next token from logits. On CUDA,
graphs.CapturedSteps replays decode steps.

Where memory is. Sequences of similar length form a cohort, which has one pair of buffers for each layer:
keys and values, (slots, kv_heads, columns, head_dim). A token has a column. Sequences that were read together,
and whose tokens are the same so far, are a branch, such as the samples of a question at first. A branch has one
slot: what its sequences have in common is computed once. Sequences are aligned right: the newest token of every
sequence stands in the same column, so that one assignment stores a step for all. The beginning that all prompts
share is computed once and kept apart. Every sequence attends to it, none holds a copy.

How a step goes (Engine.run):
1. Prefill. Where slots and memory are free, waiting prompts are read and become a new cohort.
2. Otherwise decode. All cohorts take one step in one forward pass, and attend one after the other.
3. Choose. Each sequence gets its next token.
4. Settle. A branch whose sequences were given different tokens becomes several, each with a slot of its own.
   A slot whose sequences have ended is free at once, and the last branch of the cohort moves into it.

A cohort without a free column is copied into new buffers, without the columns that no sequence uses any
more. Where there are too many cohorts, two are merged. Sequences that memory cannot hold are preempted:
they wait again, keep their tokens, and are prefilled anew.
"""

import contextlib
import functools
import inspect
import itertools
import math
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from common import Decoding, UserError, first_line, log
from graphs import CapturedSteps
from head import greedy_head
from linear import faster_linear
from model import free_memory, is_out_of_memory, keep_freed_memory, large_blocks_kept
from sampling import choose_tokens
from threads import following_load

# ------------------------------------------------------------------------------------------
# What is asked, and what comes back
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ThinkBudget:
    """A thought still open after `tokens` new tokens is closed: `early_stop` follows, token by token."""

    tokens: int
    early_stop: list[int]  # the ids of EARLY_STOP
    think: int  # the ids of the tags
    close: int
    opened: bool  # whether the prompt ends inside a thought; else the model must open one

    def forced(self, tokens: list[int]) -> int | None:
        """The token that must follow these new ones, or None where the model chooses."""
        place = len(tokens) - self.tokens
        return self.early_stop[place] if 0 <= place < len(self.early_stop) and self.overruns(tokens) else None

    def overruns(self, tokens: list[int]) -> bool:
        """Whether the thought in these new tokens is still open when the budget is spent."""
        thought = tokens[: self.tokens]
        return (self.opened or self.think in thought) and self.close not in thought

    def closed(self, tokens: list[int]) -> bool:
        """Whether these new tokens continue after a thought that the budget closed."""
        return len(tokens) > self.tokens and self.overruns(tokens)


@dataclass(frozen=True)
class Request:
    """One completion to make, named by question id and sample number. `begun` are new tokens that it already has."""

    id: int
    sample: int
    prompt_ids: list[int]  # or an array of ints
    max_new_tokens: int
    budget: ThinkBudget | None = None
    begun: tuple = ()


@dataclass(frozen=True)
class Completion:
    """One finished completion. `token_ids` ends in the end token where there is one."""

    id: int
    sample: int
    token_ids: list[int]
    text: str
    finish_reason: str  # "stop" at an end token or a stop text, "length" at the request's limit
    prompt_tokens: int
    output_tokens: int
    forced: bool = False  # the thought was closed because its budget was spent


@dataclass(frozen=True)
class Limits:
    """What bounds a batch. The defaults are for CPUs and for every device without figures of its own."""

    max_sequences: int = 2048  # live at once with batch size "auto"; more gained nothing
    max_prefill_tokens: int = 1024  # of one forward pass; on a CPU the activations then stay in its caches
    max_prefill_scores: int = 2**22  # attention scores a head of one prefill pass: they take memory
    memory_share: float = 0.5  # of the free memory is for keys and values; activations and logits need the rest
    kv_cache_bytes: int | None = None  # memory for keys and values; None takes memory_share of what is free
    spare_columns: int = 24  # that a new cohort has beyond those in use, and an eighth of these
    max_cohorts: int = 4  # each one costs calls in every step
    small_cohort: int = 32  # so few sequences share a cohort whatever their lengths: a further one costs more
    similar_length: float = 0.75  # a new cohort's shortest sequence has at least this share of the longest's columns
    answer_share: float = 0.5  # of its expected answer that a sequence is given memory for when it is admitted
    captured_slots: int = 1  # above 1: capture CUDA graphs, and round each cohort's batch up to a multiple
    check_every: int = 256  # replays of CUDA graphs, from one comparison with the plain step to the next

    def columns_for(self, width: int) -> int:
        """The columns of a cohort that begins with `width` in use.

        Each spare column costs a little in every step. When all are used the whole cohort is copied.
        """
        return width + self.spare_columns + width // 8


LIMITS = {"cuda": Limits(max_prefill_tokens=16384, memory_share=0.8, captured_slots=64)}


def generate(
    model,
    tokenizer,
    requests: Collection[Request],
    decoding: Decoding = Decoding(),
    batch_size: int | str = "auto",
    note: Callable[[str], None] = log,
    limits: Limits | None = None,
    stop_texts: Collection[str] = (),
) -> Iterator[Completion]:
    """Complete every request; yield each Completion as it ends, in the order they end.

    Up to rounding, greedy text depends on the prompt alone and sampled text on the prompt and
    (seed, id, sample): not on batch size, order, refill or a restart. The model's attention is
    replaced while the generator lives: do not call the model between two completions.

    batch_size: "auto" or the most sequences at once. note: gets a line for each automatic choice.
    limits: by default those of the model's kind of device. stop_texts: a completion ends before the first of them.
    Raises UserError for a model whose attention cannot be replaced, for NaN logits, and where
    memory is too small for one sequence.
    """
    if not requests:
        return
    limits = limits or LIMITS.get(model.device.type, Limits())
    keep_freed_memory()
    stop_ids, hidden_ids = stop_token_ids(model, tokenizer), hidden_token_ids(tokenizer)
    has_stop_text = stop_text_finder(tokenizer, hidden_ids, stop_texts)
    cache = KVCache(choose_product(model.device, model.dtype, note))
    with (
        following_load(model.device) as follow_load,  # first, for the next ones measure
        contextlib.nullcontext() if decoding.do_sample else greedy_head(model, note),
        attention_replaced(model, cache),
        faster_linear(model, note),
        named_out_of_memory(),
    ):
        engine = Engine(model, cache, requests, decoding, stop_ids, has_stop_text, batch_size, limits, note)
        for sequence in engine.run(follow_load):
            tokens, request = sequence.tokens, sequence.request
            text = tokenizer.decode([token for token in tokens if token not in hidden_ids])
            end = min((text.index(stop) for stop in stop_texts if stop in text), default=None)
            yield Completion(
                id=request.id,
                sample=request.sample,
                token_ids=tokens,
                text=text[:end],
                finish_reason="length" if end is None and tokens[-1] not in stop_ids else "stop",
                prompt_tokens=len(request.prompt_ids),
                output_tokens=len(tokens),
                forced=request.budget is not None and request.budget.closed(tokens),
            )


def stop_token_ids(model, tokenizer) -> set[int]:
    """Every end id of the model's generation config and of the tokenizer, and ChatML's end of turn."""
    configured = model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return (ids | {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}) - {None}


def hidden_token_ids(tokenizer) -> set[int]:
    """Special tokens, which are no part of the text. The think tags always are."""
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if token.special and token.content not in ("<think>", "</think>")}


def stop_text_finder(
    tokenizer, hidden_ids: Collection[int], stop_texts: Collection[str]
) -> Callable[[list[int]], bool]:
    """A function of an answer's tokens: whether the last one completes a stop text.

    It decodes only after a token that holds the last character of a stop text, and then no more tokens than
    the longest has bytes, and one.
    """
    last_characters = {text[-1] for text in stop_texts}
    most = 1 + max((len(text.encode()) for text in stop_texts), default=0)

    @functools.cache
    def may_complete(token: int) -> bool:
        text = tokenizer.decode([token])
        return not last_characters.isdisjoint(text) or "\ufffd" in text  # the latter: a part of a character

    def has_stop_text(tokens: list[int]) -> bool:
        if not stop_texts or not may_complete(tokens[-1]):
            return False
        text = tokenizer.decode([token for token in tokens if token not in hidden_ids][-most:])
        return any(stop in text for stop in stop_texts)

    return has_stop_text


@contextlib.contextmanager
def named_out_of_memory():
    """Raise a UserError where one sequence at a time is too much for the memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory, though one sequence at a time is the least: {first_line(error)}; "
            "free some memory, or ask for fewer new tokens"
        ) from error


@contextlib.contextmanager
def attention_replaced(model, cache: "KVCache"):
    """Put the model into evaluation mode, with the cache's attention. At the end it is as it was before."""
    from transformers import AttentionInterface

    training, attention, name = model.training, model.config._attn_implementation, f"kv_cache_{id(model)}"
    AttentionInterface.register(name, cache.attend)
    try:
        model.eval()
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise unfit(model)
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)
        cache.clear()


# ------------------------------------------------------------------------------------------
# Sequences and cohorts
# ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Sequence:
    """A request on its way, with its new tokens so far. Its length counts the prompt as well."""

    request: Request
    tokens: list[int]

    def __len__(self):
        return len(self.request.prompt_ids) + len(self.tokens)


@dataclass(eq=False)
class Cohort:
    """Branches in slots 0, 1, … of the same buffers, the newest stored token of each in column `width - 1`."""

    branches: list[list[Sequence]]  # each of sequences with the same tokens
    slots: int  # as many as there may be branches: one for each sequence
    columns: int
    width: int
    buffers: dict = field(default_factory=dict)  # layer → [keys, values], each (slots, kv_heads, columns, head_dim)

    @property
    def sequences(self) -> list[Sequence]:
        return list(itertools.chain.from_iterable(self.branches))


class Span(NamedTuple):
    """A forward pass's batch rows `rows` stand in these slots of the cohort. Without a cohort they are the prefix."""

    cohort: Cohort | None
    slots: slice
    rows: slice


class Scheduler:
    """Holds the waiting sequences, and decides how many may join. It knows lengths alone: no tensor, no model.

    prefix: how many tokens all prompts share. budget: how many columns fit into memory, each of one sequence.
    max_sequences: how many may be live at once.
    """

    def __init__(self, sequences: Collection[Sequence], prefix: int, budget: int, max_sequences: int, limits: Limits):
        self.prefix, self.budget, self.limits = prefix, budget, limits
        self.max_sequences = min(max_sequences, len(sequences))
        self.longest_answer = max(sequence.request.max_new_tokens for sequence in sequences)
        self.finished = self.produced = 0
        self.waiting = []
        self.enqueue(sequences)

    def enqueue(self, sequences: Collection[Sequence]):
        """Add to the waiting sequences, which are sorted by length: those taken together are of similar length."""
        self.waiting = sorted(
            [*self.waiting, *sequences], key=lambda one: (len(one), -one.request.id, -one.request.sample)
        )

    def own_columns(self, sequence: Sequence) -> int:
        """The columns that a sequence needs: its tokens after the shared prefix."""
        return len(sequence) - self.prefix

    def expected_columns(self) -> int:
        """The columns that the longest waiting sequence takes when it has half of its answer (see answer_share).

        Nobody knows how long answers will be. Until 32 have ended it is the highest limit of a request. Later
        it is the number of all new tokens, those of live sequences too, divided by the number of ended answers.
        """
        answer = self.longest_answer
        if self.finished >= 32:
            answer = min(answer, self.produced // self.finished)
        return self.limits.columns_for(self.own_columns(self.waiting[-1])) + int(answer * self.limits.answer_share)

    def num_to_admit(self, cohorts: list[Cohort]) -> int:
        """How many waiting sequences to admit now.

        None where they would be less than an eighth of the batch, because few prompts at a time are slow to
        read. At least one where no sequence is live.
        """
        if not self.waiting:
            return 0
        live = sum(len(cohort.sequences) for cohort in cohorts)
        # Sequences grow. With half as much again for the older ones few are ever preempted.
        expected = self.expected_columns()
        taken = sum(max(c.slots * c.columns, len(c.sequences) * max(c.columns * 3 // 2, expected)) for c in cohorts)
        count = min(self.max_sequences - live, (self.budget - taken) // expected, len(self.waiting))
        return count if count >= min(len(self.waiting), (live + count) // 8 + 1) else int(not live)

    def take(self, count: int) -> list[Sequence]:
        """Remove up to `count` waiting sequences of similar length, the longest first."""
        longest = self.own_columns(self.waiting[-1])
        similar = sum(self.own_columns(one) >= self.limits.similar_length * longest for one in self.waiting[-count:])
        return [self.waiting.pop() for _ in range(max(similar, min(count, self.limits.small_cohort)))]


def first_branches(sequences: list[Sequence], prefix: int, most: int) -> dict[tuple, list[Sequence]]:
    """The sequences at the front in at most `most` branches: their tokens after the prefix, and who has them."""
    branches = {}
    for one in sequences:
        own = (*one.request.prompt_ids[prefix:], *one.tokens)
        if own not in branches and len(branches) == most:
            break
        branches.setdefault(own, []).append(one)
    return branches


# ------------------------------------------------------------------------------------------
# The engine
# ------------------------------------------------------------------------------------------


class Engine:
    """The live sequences, in cohorts, and the steps that they take."""

    def __init__(
        self,
        model,
        cache: "KVCache",
        requests: Collection[Request],
        decoding: Decoding,
        stop_ids: Collection[int],
        has_stop_text: Callable[[list[int]], bool],
        batch_size: int | str,
        limits: Limits,
        note: Callable[[str], None],
    ):
        self.model, self.cache, self.decoding, self.limits = model, cache, decoding, limits
        self.stop_ids, self.has_stop_text, self.note = stop_ids, has_stop_text, note
        self.captured = None
        if limits.captured_slots > 1:
            self.captured = CapturedSteps(
                self.decode_pass, model.device, limits.captured_slots, limits.check_every, note
            )
        self.cohorts, self.ended = [], []
        prefix = common_prefix([request.prompt_ids for request in requests])
        column_bytes = self.read_prefix(prefix)
        check_fit(model, cache, max(len(request.prompt_ids) + request.max_new_tokens for request in requests))
        self.open = {Sequence(request, [*request.begun]) for request in requests}  # live or waiting
        memory = limits.kv_cache_bytes or int(free_memory(model.device) * limits.memory_share)
        most = limits.max_sequences if batch_size == "auto" else batch_size
        self.scheduler = Scheduler(self.open, len(prefix), memory // column_bytes, most, limits)
        self.note_batch_size(batch_size, memory, column_bytes)

    def run(self, between_steps: Callable[[], None]) -> Iterator[Sequence]:
        """Yield the sequences that end, until none is left."""
        while self.open:
            between_steps()
            try:
                if not self.prefill():
                    self.decode()
            except RuntimeError as error:
                if self.scheduler.max_sequences == 1 or not is_out_of_memory(error):
                    raise
                self.restart_with_half()
            self.free([cohort for cohort in self.cohorts if not cohort.branches])
            ended, self.ended = self.ended, []
            yield from ended

    def read_prefix(self, ids: list[int]) -> int:
        """Compute the tokens that all prompts share, once; returns the bytes that one column takes in all layers.

        Where they share none a token is read all the same: it shows the sizes of keys and values.
        """
        try:
            read = [*ids] or [0]
            positions = torch.arange(len(read), device=self.model.device)[None]
            self.forward([Span(None, slice(1), slice(1))], self.tensor([read]), positions, [0], over_buffers=False)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise unfit(self.model, error) from error
        return self.cache.end_prefix(len(ids))

    def note_batch_size(self, batch_size: int | str, memory: int, column_bytes: int):
        """Say how many sequences will be live at once, and why, where it was chosen here or is less than asked for."""
        most, expected = self.scheduler.max_sequences, self.scheduler.expected_columns()
        fits = max(1, self.scheduler.budget // expected)
        reason = "one for each request" if most == len(self.open) else "the most that pays"
        if fits < most:
            reason = f"what fits into memory at first, and up to {most} where answers turn out short"
        if batch_size == "auto" or fits < most:
            self.note(
                f"batch size {min(fits, most)}: {reason} (about {expected} columns of {column_bytes / 1024:.1f} KiB "
                f"a sequence, {memory / 2**30:.1f} GiB for keys and values)"
            )

    def prefill(self) -> bool:
        """Prefill waiting sequences of similar length, in chunks; return False if none fit."""
        if len(self.cohorts) >= self.limits.max_cohorts and self.scheduler.num_to_admit(self.cohorts):
            self.merge()
        count = self.scheduler.num_to_admit(self.cohorts)
        if not count:
            return False
        sequences, own_columns, prefix = self.scheduler.take(count), self.scheduler.own_columns, self.scheduler.prefix
        cohort = self.allocate([], len(sequences), own_columns(sequences[0]))
        self.cohorts.append(cohort)
        while sequences:
            new = own_columns(sequences[0])
            most = min(self.limits.max_prefill_tokens // new, self.limits.max_prefill_scores // (new * (prefix + new)))
            chunk = first_branches(sequences, prefix, max(1, most))
            rows, branches = [[*own] for own in chunk], [*chunk.values()]
            sequences = sequences[sum(map(len, branches)) :]
            slots = slice(len(cohort.branches), len(cohort.branches) + len(branches))
            cohort.branches += branches
            ids = self.tensor([[0] * (new - len(own)) + own for own in rows])  # padded left
            ends = self.tensor([prefix + len(own) for own in rows])
            positions = ends[:, None] + torch.arange(-new, 0, device=ends.device)
            span = Span(cohort, slots, slice(len(rows)))
            logits = self.forward([span], ids, positions, [cohort.width - 1], over_buffers=False)
            self.append_tokens(branches, logits)
        return True

    def decode(self):
        """One more token for every live sequence."""
        self.make_columns()
        multiple = self.captured.slots if self.captured else 1
        rows, spans, live = [], [], []
        for cohort in self.cohorts:
            cohort.width += 1
            own = [branch[0] for branch in cohort.branches]  # which stands for all of its branch
            count = min(cohort.slots, -(-len(own) // multiple) * multiple)
            spans.append(Span(cohort, slice(count), slice(len(rows), len(rows) + count)))
            live += range(len(rows), len(rows) + len(own))
            rows += own + own[-1:] * (count - len(own))  # the last once more, in slots that nobody reads
        inputs = self.tensor([[one.tokens[-1] for one in rows], [len(one) - 1 for one in rows]])
        step = self.captured or self.decode_pass
        logits = step(spans, inputs, [cohort.width - 1 for cohort in self.cohorts])
        branches = [branch for cohort in self.cohorts for branch in cohort.branches]
        self.append_tokens(branches, logits if len(live) == len(rows) else logits[live])

    def decode_pass(self, spans: list[Span], inputs: torch.Tensor, newest) -> torch.Tensor:
        """Logits (batch, vocabulary) of a decode step; inputs (2, batch): tokens and positions."""
        ids, positions = inputs[..., None]
        return self.forward(spans, ids, positions, newest, over_buffers=True)

    def forward(
        self, spans: list[Span], ids: torch.Tensor, positions: torch.Tensor, newest, over_buffers: bool
    ) -> torch.Tensor:
        """Logits (batch, vocabulary) after the new tokens `ids`, (batch, new), at `positions`, (batch, new).

        newest, over_buffers: see KVCache.begin_pass. Only the last token's logits are computed.
        """
        with torch.inference_mode(), large_blocks_kept():
            return self.model(
                input_ids=ids,
                attention_mask=self.cache.begin_pass(spans, newest, positions, over_buffers),
                position_ids=positions.clamp(min=self.cache.prefix_length),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]

    def tensor(self, numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, device=self.model.device)

    def append_tokens(self, branches: list[list[Sequence]], logits: torch.Tensor):
        """Append the chosen token to each sequence; those that end with it leave. logits: (branches, vocabulary)."""
        sequences = [*itertools.chain.from_iterable(branches)]
        ended = set()
        for sequence, token in zip(sequences, choose_tokens(logits, branches, self.decoding), strict=True):
            request, tokens = sequence.request, sequence.tokens
            if request.budget:
                forced = request.budget.forced(tokens)
                token = token if forced is None else forced
            tokens.append(token)
            if token in self.stop_ids or len(tokens) >= request.max_new_tokens or self.has_stop_text(tokens):
                ended.add(sequence)
                self.ended.append(sequence)
        self.open -= ended
        self.scheduler.produced += len(sequences)
        self.scheduler.finished += len(ended)
        for cohort in self.cohorts if ended or len(branches) < len(sequences) else ():
            self.settle(cohort, ended)

    def settle(self, cohort: Cohort, leaving: set[Sequence]):
        """Remove sequences from a cohort, and divide the branches whose sequences were given different newest tokens.

        The first branch that comes of one stays in its slot, and the others get copies of what is there. A slot
        without a branch is a hole. New branches, and those of the last slots, move into the holes.
        """
        kept, moved = [], []
        for slot, branch in enumerate(cohort.branches):
            if len(branch) == 1:
                kept.append([] if branch[0] in leaving else branch)
                continue
            by_token = {}
            for one in branch:
                if one not in leaving:
                    by_token.setdefault(one.tokens[-1], []).append(one)
            stays, *others = by_token.values() or [[]]
            kept.append(stays)
            moved += [(slot, new) for new in others]
        count = len(moved) + sum(map(bool, kept))
        moved += [(slot, kept[slot]) for slot in range(count, len(kept)) if kept[slot]]
        kept = kept[:count] + [[]] * (count - len(kept))
        holes = [slot for slot, branch in enumerate(kept) if not branch]
        self.cache.copy_slots(cohort, [source for source, _ in moved], holes)
        for hole, (_, branch) in zip(holes, moved, strict=True):
            kept[hole] = branch
        cohort.branches = kept

    def make_columns(self):
        """Give new buffers to the cohorts that have no free column, to all in one where few sequences are live."""
        full = [cohort for cohort in self.cohorts if cohort.width == cohort.columns]
        few = len(self.open) - len(self.scheduler.waiting) <= self.limits.small_cohort
        for cohorts in [self.cohorts] if full and few else [[cohort] for cohort in full]:
            self.repack(cohorts)

    def merge(self):
        """Merge two cohorts that are next to one another in width: the pair that wastes the fewest columns."""
        self.cohorts.sort(key=lambda cohort: cohort.width)
        pairs = zip(self.cohorts, self.cohorts[1:], strict=False)
        self.repack(min(pairs, key=lambda pair: len(pair[0].sequences) * (pair[1].width - pair[0].width)))

    def repack(self, cohorts: Collection[Cohort]):
        """Copy cohorts into one that has spare columns again, without columns that no sequence uses.

        Sequences for which memory is too small are preempted, the shortest first.
        """
        sequences = sorted((one for cohort in cohorts for one in cohort.sequences), key=self.scheduler.own_columns)
        width = self.scheduler.own_columns(sequences[-1]) - 1  # the newest token is not stored yet
        others = [cohort for cohort in self.cohorts if cohort not in cohorts]
        free = self.scheduler.budget - sum(cohort.slots * cohort.columns for cohort in others)
        fitting = max(1, free // self.limits.columns_for(width))
        preempted = sequences[: max(0, len(sequences) - fitting)]
        for cohort in cohorts if preempted else ():
            self.settle(cohort, set(preempted))
        self.cohorts = [*others, self.allocate(cohorts, len(sequences) - len(preempted), width)]
        self.scheduler.enqueue(preempted)

    def allocate(self, cohorts: Collection[Cohort], slots: int, width: int) -> Cohort:
        """A cohort with new buffers that takes over the sequences of others."""
        if self.captured:
            self.captured.forget()  # it holds memory, and will not be replayed with these buffers
        return self.cache.pack(cohorts, slots, self.limits.columns_for(width), width)

    def restart_with_half(self):
        """After an out-of-memory error: halve the batch. All sequences that are not done wait again and keep their tokens."""
        tried = len(self.open) - len(self.scheduler.waiting)
        self.scheduler.max_sequences = max(1, min(self.scheduler.max_sequences, tried) // 2)
        self.free(self.cohorts)
        self.scheduler.waiting = []
        self.scheduler.enqueue(self.open)
        self.note(f"out of memory: going on with batch size {self.scheduler.max_sequences}, nothing lost")

    def free(self, cohorts: list[Cohort]):
        """Drop cohorts and their buffers."""
        self.cohorts = [cohort for cohort in self.cohorts if cohort not in cohorts]
        for cohort in cohorts:
            cohort.buffers.clear()  # the cohort may live on in a captured step


# ------------------------------------------------------------------------------------------
# Keys, values and attention
# ------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of all cohorts, and the attention over them.

    It serves as the model's cache and as its attention function. Until `end_prefix` what the model
    writes is the shared prefix. Later it goes into the cohorts that `begin_pass` names.

    product: computes attention scores, see choose_product.
    """

    def __init__(self, product: Callable):
        self.product = product
        self.prefix, self.prefix_length = {}, 0  # layer → (keys, values), each (kv_heads, prefix_length, head_dim)
        self.attended, self.windows = set(), set()

    def begin_pass(self, spans: list[Span], newest, positions: torch.Tensor, over_buffers: bool) -> torch.Tensor:
        """Before a forward pass: say where its rows stand. Returns the mask to give to the model.

        newest: the column of the last new token, an int for each span, or one int64 tensor (spans,) in a step
        that is captured. positions: of the new tokens, (batch, new). over_buffers: whether they attend to what
        the cohorts hold, as in decoding, or only to one another, as in prefill.
        """
        self.spans, self.newest = spans, newest if isinstance(newest, list) else newest.split(1)
        self.positions, self.over_buffers, self.masks = positions, over_buffers, {}
        batch, new = positions.shape
        # With this the model makes no mask of its own. `attend` has its own too.
        self.given = torch.zeros((batch, 1, new, new), device=positions.device)
        return self.given

    def update(self, keys, values, layer, *args, **kwargs):
        """Called by each layer: store the new tokens; keys and values are (batch, kv_heads, new, head_dim)."""
        self.updated = keys, values
        for (cohort, slots, rows), newest in zip(self.spans, self.newest, strict=True):
            if cohort is None:
                self.prefix[layer] = keys[0], values[0]
                continue
            columns = slice(newest + 1 - keys.shape[2], newest + 1) if isinstance(newest, int) else newest
            for buffer, new in zip(cohort.buffers[layer], (keys, values), strict=True):
                buffer[slots, :, columns] = new[rows]
        return keys, values

    def attend(
        self, module, query, keys, values, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs
    ):
        """Attention of queries (batch, heads, new, head_dim) over prefix and cohorts, as (batch, new, heads, head_dim).

        The heads that share keys are folded into the query length, so that keys and values are never
        repeated. Over the prefix, all rows of the batch are one matrix product.
        """
        refuse_other_attention(self, module, keys, values, attention_mask, kwargs)
        self.windows.add(sliding_window)
        layer, shared = module.layer_idx, self.prefix_length
        self.attended.add(layer)
        batch, heads, new, head_dim = query.shape
        kv_heads = keys.shape[1]
        folded = heads // kv_heads * new
        query = (query * (head_dim**-0.5 if scaling is None else scaling)).reshape(batch, kv_heads, folded, head_dim)
        result = query.new_empty(batch, kv_heads, folded, values.shape[3])
        if shared:
            prefix_keys, prefix_values = self.prefix[layer]
            queries = query.transpose(0, 1).reshape(1, kv_heads, batch * folded, head_dim)
            by_head = self.product(queries, prefix_keys[None])[0]
            over_prefix = by_head.view(kv_heads, batch, folded, shared).transpose(0, 1)
        for number, (cohort, slots, rows) in enumerate(self.spans):
            own = [buffer[slots] for buffer in cohort.buffers[layer]] if self.over_buffers else (keys, values)
            scores = self.product(query[rows], own[0])
            scores = torch.cat([over_prefix[rows], scores], dim=-1) if shared else scores.contiguous()
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores.unflatten(2, (-1, new)).add_(self.mask(number, sliding_window, scores.dtype))
            precision = torch.promote_types(scores.dtype, torch.float32)
            weights = torch.softmax(scores, dim=-1, dtype=precision).to(query.dtype)
            result[rows] = weights[..., shared:] @ own[1]
            if shared:
                over_prefix[rows] = weights[..., :shared]
        if shared:
            from_prefix = by_head.to(query.dtype) @ prefix_values
            result += from_prefix.view(kv_heads, batch, folded, -1).transpose(0, 1)
        return result.reshape(batch, heads, new, -1).transpose(1, 2).contiguous(), None

    def mask(self, number: int, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """0 where a new token of span `number` sees a key, -inf where not: (rows, 1, 1, new, keys).

        It is made once in a pass and serves all layers with the same window.
        """
        made = number, sliding_window
        if made not in self.masks:
            cohort, _, rows = self.spans[number]
            keys = new = self.positions[rows]
            if self.over_buffers:
                keys = new[:, -1:] + torch.arange(cohort.columns, device=new.device) - self.newest[number]
            keys = keys.masked_fill(keys < self.prefix_length, 2**40)  # padding: further than any token looks
            prefix = torch.arange(self.prefix_length, device=new.device).expand(len(new), -1)
            keys = torch.cat([prefix, keys], dim=1)
            # A padding token counts as the row's first token. So it sees something, and never becomes NaN.
            distance = new.clamp(min=self.prefix_length)[:, :, None] - keys[:, None]
            visible = distance >= 0
            if sliding_window is not None:
                visible &= distance < sliding_window
            mask = torch.zeros(visible.shape, dtype=dtype, device=new.device).masked_fill_(~visible, -math.inf)
            self.masks[made] = mask[:, None, None]
        return self.masks[made]

    def end_prefix(self, length: int) -> int:
        """Keep `length` tokens of what was read; returns the bytes that one token takes in all layers."""
        self.prefix = {layer: (k[:, :length], v[:, :length]) for layer, (k, v) in self.prefix.items()}
        self.prefix_length = length
        return sum(t.shape[0] * t.shape[2] * t.element_size() for pair in self.prefix.values() for t in pair)

    def pack(self, cohorts: Collection[Cohort], slots: int, columns: int, width: int) -> Cohort:
        """A new cohort with the branches and used columns of others.

        Each layer's old buffers are freed before the next layer's are copied: little memory is held twice.
        """
        new = Cohort([branch for cohort in cohorts for branch in cohort.branches], slots, columns, width)
        for layer, pair in self.prefix.items():
            # Zeros and not uninitialized memory: a weight of 0 times a stray NaN would be NaN.
            new.buffers[layer] = [t.new_zeros(slots, t.shape[0], columns, t.shape[2]) for t in pair]
            begin = 0
            for cohort in cohorts:
                end, used = begin + len(cohort.branches), min(width, cohort.width)
                for target, source in zip(new.buffers[layer], cohort.buffers.pop(layer), strict=True):
                    kept = source[: end - begin, :, cohort.width - used : cohort.width]
                    target[begin:end, :, width - used : width] = kept
                begin = end
        return new

    def copy_slots(self, cohort: Cohort, sources: list[int], targets: list[int]):
        """Copy the keys and values of some slots into others, in all layers."""
        if not targets:
            return
        device = self.positions.device
        sources, targets = (torch.tensor(slots, device=device) for slots in (sources, targets))  # once for all buffers
        for pair in cohort.buffers.values():
            for buffer in pair:
                buffer[targets, :, : cohort.width] = buffer[sources, :, : cohort.width]

    def get_seq_length(self, layer=0):
        return 0  # positions are always given

    def clear(self):
        vars(self).clear()


FEW_QUERIES = 8  # for so few, as in decoding, MKL computes keys times queries up to twice as fast as queries times keys


def choose_product(device: torch.device, dtype: torch.dtype, note: Callable[[str], None]) -> Callable:
    """A function of query (a, b, m, dim) and keys (a, b, n, dim): all their dot products, (a, b, m, n).

    Rounded to 16 bits before the softmax, scores lose what fused attention keeps. On a GPU they are
    computed in fp32: at once where torch.bmm can, which is tried here, else from converted numbers.
    """
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    if device.type == "cpu" or autocast or dtype not in (torch.float16, torch.bfloat16):
        return plain_product
    fault = fp32_bmm_fault(device, dtype)
    if fault:
        note(f"attention scores are computed from keys converted to fp32, which is slower: {fault}")
    return converted_product if fault else fp32_product


@functools.cache
def fp32_bmm_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch.bmm cannot multiply 16-bit numbers into fp32 on this device; None where it can."""
    numbers = torch.arange(32, device=device).view(2, 4, 4).to(dtype)  # exact in 16 bits, and so are the products
    try:
        found = fp32_product(numbers[None], numbers[None])
        if found.dtype == torch.float32 and torch.equal(found, converted_product(numbers[None], numbers[None])):
            return None
        return "torch.bmm(out_dtype=…) gives other numbers here"
    except (RuntimeError, TypeError) as error:
        return f"torch.bmm(out_dtype=…) fails here: {first_line(error)}"


def plain_product(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    if query.shape[2] <= FEW_QUERIES and query.dtype == torch.float32:
        return (keys @ query.transpose(2, 3)).transpose(2, 3)
    return query @ keys.transpose(2, 3)


def converted_product(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return query.float() @ keys.float().transpose(2, 3)


def fp32_product(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    products = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
    return products.unflatten(0, query.shape[:2])


def check_fit(model, cache: KVCache, longest: int):
    """UserError for a model whose next token depends on more than keys, values and the positions given."""
    config = model.config.get_text_config()
    sliding = getattr(config, "sliding_window", None)
    if (
        cache.attended != set(range(config.num_hidden_layers))  # other layers carry a state of their own
        or cache.attended != set(cache.prefix)
        or "position_ids" not in inspect.signature(type(model).forward).parameters
        or getattr(config, "attention_chunk_size", None)
        or (sliding and sliding < longest and cache.windows == {None})  # it is in a mask that we do not see
    ):
        raise unfit(model)


def refuse_other_attention(cache: KVCache, module, keys, values, attention_mask, options: dict):
    """UserError for a layer that does more than attend over what it stored, with the mask it was given."""
    unknown = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if keys is not cache.updated[0] or values is not cache.updated[1]:
        unknown.append("keys and values other than the stored ones")
    if attention_mask is not cache.given:
        unknown.append("a mask of its own")
    if not getattr(module, "is_causal", True):
        unknown.append("a look ahead")
    if unknown:
        raise UserError(f"{type(module).__name__}: attention with {unknown[0]} is not supported; pass another model")


def unfit(model, error: Exception | None = None) -> UserError:
    reason = f" ({first_line(error)})" if error else ""
    return UserError(
        f"{type(model).__name__}: cannot be run here: its layers do not all attend over keys and values, at the positions "
        f"given, through transformers' AttentionInterface{reason}; pass a model of another architecture"
    )


def common_prefix(prompts: list) -> list[int]:
    """The token ids that all prompts begin with; every prompt keeps at least one token of its own."""
    ends = [*min(prompts)], [*max(prompts)]  # what these two share, all between them share
    return os.path.commonprefix(ends)[: min(map(len, prompts)) - 1]
