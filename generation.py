"""Generation: requests, choosing tokens, and a rolling, left-padded batch.

Rows of like length come in together, as a cohort: they share one buffer of key/value columns a
layer, and the newest token of every row stands in the same column, so that one slice assignment
writes a step in place. A row that ends leaves at once: the cohort's last row moves into its slot.
When enough slots and memory are free, waiting prompts are prefilled as the next cohort; where
there are too many, two that waste the least merge. A cohort whose columns are used up is copied into new
ones, without the columns in which no row stands. All cohorts take a step in one forward pass,
and attend one after the other. The beginning that all prompts share is computed once and kept
apart: every row attends to it, none holds a copy. On CUDA a step whose cohorts are those of the
last one is captured as a graph and replayed: what changes between such steps is in tensors.
"""

import contextlib
import math
from dataclasses import dataclass

import torch

from common import Decoding, UserError, first_line, log
from model import free_memory, is_out_of_memory

SAMPLED_LOGITS = 2**26  # at once, for ranking and noise take some 50 bytes for each


def choose_tokens(logits, rows, decoding):
    """The next token of each row, as a list; the lowest id among equals."""
    with torch.inference_mode():
        highest = logits.max(dim=-1)  # NaN where a row holds one
        if highest.values.isnan().any():
            row = rows[highest.values.isnan().int().argmax()]
            raise UserError(
                f"question {row.request.id}: the model's logits are not numbers (NaN) after {len(row.tokens)} tokens; "
                "its weights are damaged or overflow: try --dtype fp32"
            )
        if not decoding.do_sample:
            return highest.indices.tolist()
        counters = [(row.request.id, row.request.sample, len(row.tokens)) for row in rows]
        counters = torch.tensor(counters, device=logits.device)
        some = max(1, SAMPLED_LOGITS // logits.shape[1])
        parts = zip(logits.split(some), counters.split(some), strict=True)
        return torch.cat([sample_tokens(*part, decoding) for part in parts]).tolist()


def sample_tokens(logits, counters, decoding):
    """Draw one token a row, (rows,), from logits (rows, vocabulary) and counters (rows, 3).

    Temperature, top-k and top-p as transformers applies them, in this order; of equal logits the
    lower token id ranks first (bf16 logits tie often). Among the kept tokens the largest of
    log-probability plus Gumbel noise wins, which draws from their softmax (Gumbel-max). The noise
    is a hash of (seed, question id, sample, step, token id), so that a draw depends on nothing else.
    """
    scores = logits.float() + 0.0  # -0.0 becomes 0.0, so that equal numbers have equal bits
    size = scores.shape[-1]
    if decoding.top_k or decoding.top_p < 1:
        tokens = highest_tokens(scores, min(decoding.top_k or size, size))
    else:  # all are kept, in whatever order
        tokens = torch.arange(size, device=logits.device).expand(len(logits), -1)
    scaled = scores.gather(-1, tokens).double() / decoding.temperature
    if decoding.top_p < 1:
        probabilities = scaled.softmax(dim=-1)
        dropped = probabilities.cumsum(dim=-1) - probabilities >= decoding.top_p
        most = tokens.shape[-1] - int(dropped.sum(dim=-1).min())
        tokens, scaled = tokens[:, :most], scaled.masked_fill(dropped, -math.inf)[:, :most]
    seed = torch.tensor(decoding.seed, device=logits.device)
    random_bits = counter_hash(seed, *counters[:, :, None].unbind(dim=1), tokens)
    # 52 bits and a half: exact in fp64, never 0 and never 1.
    uniform = (logical_shift(random_bits, 12).double() + 0.5) * 2.0**-52
    best = (scaled - torch.log(-torch.log(uniform))).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0]


def highest_tokens(scores, count):
    """The token ids of each row's `count` highest scores, highest first, of equal ones the lower id first."""
    size = scores.shape[-1]
    if count < size:  # all that could be among them, with every token that equals the last
        least = scores.topk(count).values[:, -1:]
        scores, tokens = scores.topk(int((scores >= least).sum(dim=-1).max()))
    else:
        tokens = torch.arange(size, device=scores.device)
    # Floats ordered as integers, the token id below them.
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return size - 1 - ((ordered | (size - 1 - tokens)).topk(count).values & 0xFFFFFFFF)


def counter_hash(*counters):
    """A 64-bit hash of integer tensors that broadcast: SplitMix64's finalizer, chained.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014. int64
    wraps around, so that it serves as uint64.
    """
    state = 0
    for counter in counters:
        state = (counter ^ state) - 0x61C8864680B583EB  # the golden ratio's odd fraction, as int64
        state = (state ^ logical_shift(state, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        state = (state ^ logical_shift(state, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        state = state ^ logical_shift(state, 31)
    return state


def logical_shift(number, bits):
    """Shift right and fill with zeros, which int64's own shift does not."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


MOST_SLOTS = 2048  # what --batch-size auto takes where memory allows more
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}  # of one pass; on a CPU the activations stay in its caches
PREFILL_PAIRS = 2**22  # of one pass, of a token that attends and one that is attended to: their scores take memory
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.8}  # of what is free; activations and logits need the rest
SPARE_COLUMNS = 24  # beyond those in use, and an eighth of these
MOST_COHORTS = 4  # each costs calls in every step
FEW_ROWS = 32  # of which one cohort is made whatever their lengths: further ones would cost more than they save
ROW_STEP = {
    "cpu": 1,
    "cuda": 64,
}  # to which a cohort's rows are rounded up where steps are captured, for one graph to serve many
LIKE = 0.75  # of the length of a cohort's longest row its others have at least so much, as it begins


@dataclass(frozen=True)
class ThinkBudget:
    """A thought still open after `tokens` new tokens is closed: `early_stop` follows, token by token."""

    tokens: int
    early_stop: list  # the ids of EARLY_STOP
    think: int  # the ids of the tags
    close: int
    opened: bool  # whether the prompt ends inside a thought; else the model must open one

    def forced(self, tokens):
        """The token that must follow these new ones, or None where the model chooses."""
        place = len(tokens) - self.tokens
        return self.early_stop[place] if 0 <= place < len(self.early_stop) and self.overruns(tokens) else None

    def overruns(self, tokens):
        """Whether the thought in these new tokens is still open when the budget is spent."""
        thought = tokens[: self.tokens]
        return (self.opened or self.think in thought) and self.close not in thought

    def closed(self, tokens):
        """Whether these new tokens go on behind a thought that the budget closed."""
        return len(tokens) > self.tokens and self.overruns(tokens)


@dataclass(frozen=True)
class Request:
    """One completion to make, named by question id and sample number; `begun` are tokens it has already."""

    id: int
    sample: int
    prompt_ids: list  # or any sequence
    max_new_tokens: int
    budget: ThinkBudget | None = None
    begun: tuple = ()


@dataclass(frozen=True)
class Completion:
    """One finished completion. `token_ids` ends in the end token where there is one."""

    id: int
    sample: int
    token_ids: list
    text: str
    finish_reason: str  # "stop" at an end token, "length" at the request's limit
    prompt_tokens: int
    output_tokens: int
    forced: bool = False  # the thought was closed because its budget was spent


@dataclass(eq=False)
class Row:
    """A request on its way: its tokens so far."""

    request: Request
    tokens: list

    def __len__(self):
        return len(self.request.prompt_ids) + len(self.tokens)


def generate(model, tokenizer, requests, decoding=Decoding(), batch_size="auto", note=log):
    """Complete every request; yield each Completion as it ends, in the order they end.

    Up to rounding, greedy text depends on the prompt alone and sampled text on the prompt and
    (seed, id, sample): not on batch size, order, refill or a restart. The model's attention is
    replaced while the generator lives: do not call the model between two completions.

    batch_size: "auto" or the most rows at once. note: gets a line for each automatic choice.
    Raises UserError for a model whose attention cannot be replaced, for NaN logits, and where
    memory is too small for one row.
    """
    if not requests:
        return
    stop_ids, hidden_ids = stop_token_ids(model, tokenizer), hidden_token_ids(tokenizer)
    cache = RollingCache()
    with borrowed(model, cache), named_out_of_memory():
        for row in RollingBatch(model, cache, requests, decoding, stop_ids, batch_size, note).run():
            yield Completion(
                id=row.request.id,
                sample=row.request.sample,
                token_ids=row.tokens,
                text=tokenizer.decode([token for token in row.tokens if token not in hidden_ids]),
                finish_reason="stop" if row.tokens[-1] in stop_ids else "length",
                prompt_tokens=len(row.request.prompt_ids),
                output_tokens=len(row.tokens),
                forced=row.request.budget is not None and row.request.budget.closed(row.tokens),
            )


def stop_token_ids(model, tokenizer):
    """Every end id of the model's generation config and of the tokenizer, and ChatML's end of turn."""
    configured = model.generation_config.eos_token_id
    ids = set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return (ids | {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}) - {None}


def hidden_token_ids(tokenizer):
    """Special tokens, which are no part of the text. The think tags always are."""
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if token.special and token.content not in ("<think>", "</think>")}


@contextlib.contextmanager
def named_out_of_memory():
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory, and one row at a time is the least: {first_line(error)}; free some, or ask for fewer new tokens"
        ) from error


@contextlib.contextmanager
def borrowed(model, cache):
    """The model in evaluation mode with the cache's attention; both are put back at the end."""
    from transformers import AttentionInterface

    training, attention, name = model.training, model.config._attn_implementation, f"rolling_{id(model)}"
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


@dataclass(eq=False)
class Cohort:
    """Rows in slots 0, 1, … of one buffer a layer, the newest token of each in column `width - 1`."""

    rows: list
    slots: int
    columns: int
    width: int
    buffers: dict  # layer → [keys, values], each (slots, groups, columns, dim)


class RollingBatch:
    """The live rows, cohort by cohort, and the waiting ones."""

    def __init__(self, model, cache, requests, decoding, stop_ids, batch_size, note):
        self.model, self.cache, self.decoding = model, cache, decoding
        self.stop_ids, self.note = stop_ids, note
        self.kind = "cuda" if model.device.type == "cuda" else "cpu"
        self.captured_parts, self.unchecked = None, 2
        self.cohorts, self.waiting, self.ended = [], [], []
        self.finished = self.produced = 0
        self.longest_answer = max(request.max_new_tokens for request in requests)
        self.read_prefix(shared_beginning([request.prompt_ids for request in requests]))
        check_fit(model, cache, max(len(request.prompt_ids) + request.max_new_tokens for request in requests))
        self.open = {Row(request, [*request.begun]) for request in requests}  # live or waiting
        self.wait(self.open)
        self.choose_slots(batch_size)

    def run(self):
        """Yield the rows that end, until none is left."""
        while self.open:
            try:
                if not self.admit():
                    self.step()
            except RuntimeError as error:
                if self.slots == 1 or not is_out_of_memory(error):
                    raise
                self.restart_with_half()
            self.let_go([cohort for cohort in self.cohorts if not cohort.rows])
            ended, self.ended = self.ended, []
            yield from ended

    def read_prefix(self, ids):
        """Compute the tokens that all prompts share, once. Without any, one is read all the same: it shows the cache's sizes."""
        self.prefix = 0
        try:
            self.forward([[*ids] or [0]], [max(1, len(ids))], [(None, slice(1), slice(1))])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise unfit(self.model, error) from error
        self.prefix, self.token_bytes = len(ids), self.cache.end_prefix(len(ids))

    def wait(self, rows):
        """Rows wait longest first, taken from the list's end: those that come together are of like length."""
        self.waiting = sorted([*self.waiting, *rows], key=lambda row: (len(row), -row.request.id, -row.request.sample))

    def choose_slots(self, batch_size):
        free = free_memory(self.model.device)
        self.budget = int(free * MEMORY_SHARE[self.kind] / self.token_bytes)  # in columns of one row
        self.slots = min(MOST_SLOTS if batch_size == "auto" else batch_size, len(self.waiting))
        fits = max(1, self.budget // self.typical())
        reason = "one for each request" if self.slots == len(self.waiting) else "the most that pays"
        if fits < self.slots:
            reason = f"what fits into memory at first, and up to {self.slots} where answers turn out short"
        memory = (
            f"about {self.typical()} columns of {self.token_bytes / 1024:.1f} KiB a row, {free / 2**30:.1f} GiB free"
        )
        if batch_size == "auto" or fits < self.slots:
            self.note(f"batch size {min(fits, self.slots)}: {reason} ({memory})")

    def own(self, row):
        """The columns that a row takes: its tokens behind the shared beginning."""
        return len(row) - self.prefix

    def typical(self):
        """The columns that the longest waiting row takes halfway through its answer.

        How long answers are is not known before: their limit stands for it until 32 have ended, then
        all tokens by the number of ended answers, which counts those that go on as well.
        """
        answer = self.longest_answer
        if self.finished >= 32:
            answer = min(answer, self.produced // self.finished)
        own = self.own(self.waiting[-1])
        return own + spare(own) + answer // 2

    def room(self):
        """How many rows to admit now: none, unless they are an eighth of the batch, for few prompts read at a time cost more."""
        if not self.waiting:
            return 0
        live = sum(len(cohort.rows) for cohort in self.cohorts)
        # Rows grow: with half as much again for the older ones few are ever sent back to wait.
        typical = self.typical()
        taken = sum(max(c.slots * c.columns, len(c.rows) * max(c.columns * 3 // 2, typical)) for c in self.cohorts)
        room = min(self.slots - live, (self.budget - taken) // typical, len(self.waiting))
        return room if room >= min(len(self.waiting), (live + room) // 8 + 1) else int(not live)

    def admit(self):
        """Where there is room prefill the longest waiting rows of about one length as a new cohort, some at a time; else False."""
        if len(self.cohorts) >= MOST_COHORTS and self.room():
            self.merge()
        room = self.room()
        if not room:
            return False
        self.captured_parts = self.graph = None
        width = self.own(self.waiting[-1])
        alike = sum(self.own(row) >= LIKE * width for row in self.waiting[-room:])
        rows = [self.waiting.pop() for _ in range(max(alike, min(room, FEW_ROWS)))]
        cohort = self.cache.pack([], len(rows), spare(width) + width, width)
        self.cohorts.append(cohort)
        while rows:
            width = self.own(rows[0])
            most = max(1, min(PREFILL_TOKENS[self.kind] // width, PREFILL_PAIRS // (width * (self.prefix + width))))
            new, rows, begin = rows[:most], rows[most:], len(cohort.rows)
            cohort.rows += new
            tokens = [[*row.request.prompt_ids[self.prefix :], *row.tokens] for row in new]
            part = cohort, slice(begin, begin + len(new)), slice(len(new))
            self.extend(new, self.forward(tokens, [self.own(row) for row in new], [part]))
        return True

    def step(self):
        """One more token for every live row."""
        full = [cohort for cohort in self.cohorts if cohort.width == cohort.columns]
        few = len(self.open) - len(self.waiting) <= FEW_ROWS
        for cohorts in [self.cohorts] if full and few else [[cohort] for cohort in full]:
            self.repack(cohorts)
        rows, parts, live, row_step = [], [], [], ROW_STEP[self.kind]
        for cohort in self.cohorts:
            cohort.width += 1
            count = min(cohort.slots, math.ceil(len(cohort.rows) / row_step) * row_step)
            parts.append((cohort, slice(count), slice(len(rows), len(rows) + count)))
            live += range(len(rows), len(rows) + len(cohort.rows))
            rows += cohort.rows + cohort.rows[-1:] * (
                count - len(cohort.rows)
            )  # the last again, in slots that nobody reads
        logits = self.forward([row.tokens[-1:] for row in rows], [self.own(row) for row in rows], parts, step=True)
        if len(live) < len(rows):
            rows, logits = [rows[i] for i in live], logits[live]
        self.extend(rows, logits)

    def forward(self, tokens, own, parts, step=False):
        """Logits (rows, vocabulary) after each row's new `tokens`, with which it takes `own` columns; parts: see RollingCache.aim."""
        device, width = self.model.device, max(map(len, tokens))
        ids = [[0] * (width - len(row)) + row for row in tokens]
        positions = [[*range(self.prefix + columns - width, self.prefix + columns)] for columns in own]
        newest = [cohort.width - 1 if cohort else 0 for cohort, *_ in parts]
        with torch.inference_mode():
            inputs = torch.tensor([ids, positions], device=device)
            if step and ROW_STEP[self.kind] > 1:
                return self.replay(parts, inputs, torch.tensor(newest, device=device))
            return self.read(parts, inputs, newest, step)

    def read(self, parts, inputs, newest, step):
        ids, positions = inputs
        return self.model(
            input_ids=ids,
            attention_mask=self.cache.aim(parts, newest, positions, self.prefix, over_buffers=step),
            position_ids=positions.clamp(min=self.prefix),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def replay(self, parts, *inputs):
        """A step on CUDA: captured where the last one had the same parts, then launched at once instead of kernel by kernel."""
        if parts != self.captured_parts:
            self.captured_parts, self.inputs, self.graph = parts, inputs, None
            return self.read(parts, *inputs, step=True)
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        try:
            self.graph = self.graph or capture(lambda: self.read(parts, *self.inputs, step=True), self.model.device)
            logits = self.graph()
            if self.unchecked:  # a second time, with other inputs than it was captured with
                self.unchecked -= 1
                refuse_other_logits(logits, self.read(parts, *inputs, step=True))
            return logits
        except RuntimeError as error:
            self.note(f"steps are not captured as CUDA graphs, which is slower: {first_line(error)}")
            ROW_STEP[self.kind], self.captured_parts, self.graph = 1, None, None  # not tried again by this process
        return self.read(parts, *inputs, step=True)

    def extend(self, rows, logits):
        """Append the chosen token to each row; rows that end with it leave."""
        for row, token in zip(rows, choose_tokens(logits, rows, self.decoding), strict=True):
            forced = row.request.budget and row.request.budget.forced(row.tokens)
            row.tokens.append(token if forced is None else forced)
        ended = {
            row for row in rows if row.tokens[-1] in self.stop_ids or len(row.tokens) >= row.request.max_new_tokens
        }
        self.ended += [row for row in rows if row in ended]
        self.open -= ended
        self.produced += len(rows)
        self.finished += len(ended)
        for cohort in self.cohorts if ended else ():
            self.remove(cohort, ended)

    def remove(self, cohort, leaving):
        """Free the slots of rows that leave: rows from the end move into them."""
        keep = [slot for slot, row in enumerate(cohort.rows) if row not in leaving]
        holes = [slot for slot, row in enumerate(cohort.rows[: len(keep)]) if row in leaving]
        moved = keep[len(keep) - len(holes) :]
        self.cache.copy_slots(cohort, moved, holes)
        for source, hole in zip(moved, holes, strict=True):
            cohort.rows[hole] = cohort.rows[source]
        del cohort.rows[len(keep) :]

    def merge(self):
        """Of the cohorts that stand side by side by width, the two whose union has the fewest dead columns become one."""
        self.cohorts.sort(key=lambda cohort: cohort.width)
        pairs = zip(self.cohorts, self.cohorts[1:], strict=False)
        self.repack(min(pairs, key=lambda pair: len(pair[0].rows) * (pair[1].width - pair[0].width)))

    def repack(self, cohorts):
        """Into one cohort, without dead columns and with some to spare. Rows that memory cannot hold wait again, the shortest first."""
        self.captured_parts = self.graph = None
        rows = sorted((row for cohort in cohorts for row in cohort.rows), key=self.own)
        width = self.own(rows[-1]) - 1  # the newest token is not stored yet
        columns = width + spare(width)
        others = [cohort for cohort in self.cohorts if cohort not in cohorts]
        fitting = (self.budget - sum(cohort.slots * cohort.columns for cohort in others)) // columns
        short = rows[: max(0, len(rows) - max(1, fitting))]
        for cohort in cohorts if short else ():
            self.remove(cohort, set(short))
        self.cohorts = [*others, self.cache.pack(cohorts, len(rows) - len(short), columns, width)]
        self.wait(short)

    def restart_with_half(self):
        """Out of memory: half the rows that were tried. All that are not done wait again and keep their tokens."""
        self.slots = max(1, min(self.slots, len(self.open) - len(self.waiting)) // 2)
        self.let_go(self.cohorts)
        self.waiting = []
        self.wait(self.open)
        self.note(f"out of memory: going on with batch size {self.slots}, nothing lost")

    def let_go(self, cohorts):
        self.cohorts = [cohort for cohort in self.cohorts if cohort not in cohorts]
        for cohort in cohorts:
            cohort.buffers.clear()  # others may hold on to the cohort


class RollingCache:
    """Keys and values of all cohorts, and the attention over them.

    Serves as the model's cache and as its attention function. Until `end_prefix`, what the model
    writes is the prefix; afterwards it goes into the cohorts that `aim` names.
    """

    def __init__(self):
        self.prefix, self.attended, self.windows = {}, set(), set()

    def aim(self, parts, newest, positions, prefix, over_buffers):
        """Before a forward pass: where its rows stand, as parts (cohort, slice of its slots, slice of the rows).

        newest: the column of the last new token, a number for each part, or one tensor in a step that is
        captured. positions: of the new tokens, (rows, new). over_buffers: whether these attend to what
        the cohorts hold, or to one another alone. Returns what to give the model as its mask.
        """
        self.parts, self.newest = parts, newest if isinstance(newest, list) else newest.split(1)
        self.positions, self.shared, self.over_buffers, self.masks = positions, prefix, over_buffers, {}
        rows, new = positions.shape
        self.given = torch.zeros(
            (rows, 1, new, new), device=positions.device
        )  # so that it makes none; attend has its own
        return self.given

    def update(self, keys, values, layer, *args, **kwargs):
        """Called by each layer: store the new tokens."""
        self.updated = keys, values
        for (cohort, slots, own), newest in zip(self.parts, self.newest, strict=True):
            if cohort is None:
                self.prefix[layer] = keys[0], values[0]
                continue
            columns = slice(newest + 1 - keys.shape[2], newest + 1) if isinstance(newest, int) else newest
            for buffer, new in zip(cohort.buffers[layer], (keys, values), strict=True):
                buffer[slots, :, columns] = new[own]
        return keys, values

    def attend(
        self, module, query, keys, values, attention_mask, scaling=None, sliding_window=None, softcap=None, **kwargs
    ):
        """Attention of queries (rows, heads, new, dim) over prefix and cohorts, as (rows, new, heads, dim).

        The heads of a group are folded into the query length, so that keys and values are never
        repeated; over the prefix, all rows are one matrix product.
        """
        refuse_other_attention(self, module, keys, values, attention_mask, kwargs)
        self.windows.add(sliding_window)
        layer, shared = module.layer_idx, self.shared
        self.attended.add(layer)
        rows, heads, new, dim = query.shape
        groups = keys.shape[1]
        folded = heads // groups * new
        query = (query * (dim**-0.5 if scaling is None else scaling)).reshape(rows, groups, folded, dim)
        result = query.new_empty(rows, groups, folded, values.shape[3])
        if shared:
            shared_keys, shared_values = self.prefix[layer]
            by_group = scores_of(query.transpose(0, 1).reshape(1, groups, rows * folded, dim), shared_keys[None])[0]
            over_prefix = by_group.view(groups, rows, folded, shared).transpose(0, 1)
        for number, (cohort, slots, own) in enumerate(self.parts):
            window = [buffer[slots] for buffer in cohort.buffers[layer]] if self.over_buffers else (keys, values)
            scores = scores_of(query[own], window[0])
            if shared:
                scores = torch.cat([over_prefix[own], scores], dim=-1)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores.unflatten(2, (-1, new)).add_(self.mask(number, sliding_window, scores.dtype))
            precision = torch.promote_types(scores.dtype, torch.float32)
            weights = torch.softmax(scores, dim=-1, dtype=precision).to(query.dtype)
            result[own] = weights[..., shared:] @ window[1]
            if shared:
                over_prefix[own] = weights[..., :shared]
        if shared:
            from_prefix = by_group.to(query.dtype) @ shared_values
            result += from_prefix.view(groups, rows, folded, -1).transpose(0, 1)
        return result.reshape(rows, heads, new, -1).transpose(1, 2).contiguous(), None

    def mask(self, number, sliding_window, dtype):
        """0 where a new token sees a key, -inf where not: (rows, 1, 1, new, keys), made once a pass for all layers."""
        key = number, sliding_window
        if key not in self.masks:
            cohort, _, own = self.parts[number]
            keys = new = self.positions[own]
            if self.over_buffers:
                keys = new[:, -1:] + torch.arange(cohort.columns, device=new.device) - self.newest[number]
            keys = keys.masked_fill(keys < self.shared, 2**40)  # padding, further on than any token looks
            keys = torch.cat([torch.arange(self.shared, device=new.device).expand(len(new), -1), keys], dim=1)
            # A padding token counts as the row's first: it sees something, and so never turns into NaN.
            distance = new.clamp(min=self.shared)[:, :, None] - keys[:, None]
            visible = distance >= 0
            if sliding_window is not None:
                visible &= distance < sliding_window
            mask = torch.zeros(visible.shape, dtype=dtype, device=new.device).masked_fill_(~visible, -math.inf)
            self.masks[key] = mask[:, None, None]
        return self.masks[key]

    def end_prefix(self, length):
        """Keep so many tokens of what was read; returns the bytes that one takes in all layers."""
        self.prefix = {layer: (k[:, :length], v[:, :length]) for layer, (k, v) in self.prefix.items()}
        return sum(t.shape[0] * t.shape[2] * t.element_size() for pair in self.prefix.values() for t in pair)

    def pack(self, cohorts, slots, columns, width):
        """A cohort with the live columns of others, taken over a layer at a time, so that little memory is held twice."""
        new = Cohort([row for cohort in cohorts for row in cohort.rows], slots, columns, width, {})
        for layer, pair in self.prefix.items():
            # Zeros and not uninitialized memory: a weight of 0 times a stray NaN would be NaN.
            new.buffers[layer] = [t.new_zeros(slots, t.shape[0], columns, t.shape[2]) for t in pair]
            begin = 0
            for cohort in cohorts:
                rows, live = len(cohort.rows), min(width, cohort.width)
                for target, source in zip(new.buffers[layer], cohort.buffers.pop(layer), strict=True):
                    target[begin : begin + rows, :, width - live : width] = source[
                        :rows, :, cohort.width - live : cohort.width
                    ]
                begin += rows
        return new

    def copy_slots(self, cohort, sources, targets):
        if targets:
            device = self.positions.device
            sources, targets = (
                torch.tensor(slots, device=device) for slots in (sources, targets)
            )  # once for all buffers
            for pair in cohort.buffers.values():
                for buffer in pair:
                    buffer[targets, :, : cohort.width] = buffer[sources, :, : cohort.width]

    def get_seq_length(self, layer=0):
        return 0  # positions are always given

    def clear(self):
        vars(self).clear()


def capture(work, device):
    """A function that launches all kernels of `work` at once, as a CUDA graph; each call overwrites the result of the last."""
    graph = torch.cuda.CUDAGraph()
    here = torch.cuda.stream(
        torch.cuda.current_stream(device)
    )  # put back at the end, which a failed capture does not do
    with torch.cuda.device(device), here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()

    def replay():
        graph.replay()
        return result

    return replay


def refuse_other_logits(logits, expected):
    if not torch.allclose(logits, expected, rtol=2**-5, atol=2**-3):  # far beyond rounding, far below another token's
        raise RuntimeError("a replayed step gives other logits")


def spare(width):
    """Columns beyond those in use: each costs a little in every step, and when they are used up all rows are copied."""
    return SPARE_COLUMNS + width // 8


def scores_of(query, keys):
    """query (a, b, m, dim) times keys (a, b, n, dim), as (a, b, m, n); of 16-bit numbers in fp32 on CUDA.

    Rounded to 16 bits before the softmax, scores lose what fused attention keeps.
    """
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cuda"):
        return query @ keys.transpose(2, 3)
    products = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), out_dtype=torch.float32)
    return products.unflatten(0, query.shape[:2])


def check_fit(model, cache, longest):
    """UserError for a model whose next token depends on more than keys, values and the positions given."""
    import inspect

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


def refuse_other_attention(cache, module, keys, values, attention_mask, options):
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


def unfit(model, error=None):
    reason = f" ({first_line(error)})" if error else ""
    return UserError(
        f"{type(model).__name__}: cannot be run here: its layers do not all attend over keys and values, at the positions "
        f"given, through transformers' AttentionInterface{reason}; pass a model of another architecture"
    )


def shared_beginning(prompts):
    """The token ids that all prompts begin with; every prompt keeps at least one token of its own."""
    first, last = min(prompts), max(prompts)  # what these two share, all between them share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(same, *(len(prompt) - 1 for prompt in prompts))]
