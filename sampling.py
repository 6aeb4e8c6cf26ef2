"""The next token of each sequence: the highest logit, or a draw that depends on nothing but its name."""

import functools
import math

import torch

from common import Decoding, UserError

MOST_NOISE = 2**26  # numbers that are made at once, one for each token of each draw: they take some 50 bytes each
MOST_NOISE_ON_CPU = 2**20  # these stay in its caches, which is up to six times as fast


def choose_tokens(logits: torch.Tensor, branches: list[list], decoding: Decoding) -> list[int]:
    """The next token of each generation.Sequence, branch after branch, from logits (branches, vocabulary).

    Of equal logits the lowest id is taken. Raises UserError where a logit is NaN. Draws need fp64: without it
    on the device they are made on the CPU.
    """
    with torch.inference_mode():
        if decoding.do_sample:
            highest = logits.amax(dim=-1)
        else:
            highest, tokens = highest_logits(logits)
        if highest.isnan().any():
            sequence = branches[highest.isnan().int().argmax()][0]
            raise UserError(
                f"question {sequence.request.id}: the model's logits are not numbers (NaN) after {len(sequence.tokens)} "
                "tokens; its weights are damaged or overflow: try --dtype fp32"
            )
        if not decoding.do_sample:
            return [token for token, branch in zip(tokens.tolist(), branches, strict=True) for _ in branch]
        if not has_fp64(logits.device):
            logits = logits.cpu()
        draws = [
            (row, one.request.id, one.request.sample, len(one.tokens))
            for row, branch in enumerate(branches)
            for one in branch
        ]
        counters = torch.tensor([*zip(*draws, strict=True)], device=logits.device).T
        kept = min(decoding.top_k or logits.shape[1], logits.shape[1])
        most_noise = MOST_NOISE_ON_CPU if logits.device.type == "cpu" else MOST_NOISE
        at_once = max(1, most_noise // kept)
        tokens = []
        for start in range(0, len(draws), at_once):
            piece = slice(start, start + at_once)
            first, last = draws[piece][0][0], draws[piece][-1][0]
            row_of = counters[piece, 0] - first
            tokens.append(sample_tokens(logits[first : last + 1], row_of, counters[piece, 1:], decoding))
        return torch.cat(tokens).tolist()


def highest_logits(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, token ids) as logits.max(dim=-1) gives them: NaN where a row holds one, the lowest id among equals.

    On a CPU torch finds a maximum with its place number by number, and one without a place several times as fast.
    So the place is sought in the best part of each row alone.
    """
    parts = split_into_parts(logits)
    if logits.device.type != "cpu" or parts.shape[1] == 1:
        return tuple(logits.max(dim=-1))
    values, best = parts.amax(dim=-1).max(dim=-1)
    inside = parts[torch.arange(len(logits)), best].argmax(dim=-1)
    return values, best * parts.shape[-1] + inside


def split_into_parts(logits: torch.Tensor) -> torch.Tensor:
    """Logits (batch, vocabulary) as (batch, parts, size), with up to 128 parts."""
    return logits.unflatten(-1, (math.gcd(logits.shape[-1], 128), -1))


@functools.cache
def has_fp64(device: torch.device) -> bool:
    """Whether the device computes in fp64, which sampling needs. Apple's GPUs and some of Intel's do not."""
    try:
        return bool(torch.ones(1, dtype=torch.float64, device=device).add(1).dtype == torch.float64)
    except (RuntimeError, TypeError):
        return False


def sample_tokens(
    logits: torch.Tensor, row_of: torch.Tensor, counters: torch.Tensor, decoding: Decoding
) -> torch.Tensor:
    """Draw a token for each of (draws, 3) counters from its row of logits (rows, vocabulary); returns (draws,).

    row_of: the row of each draw, (draws,).

    Temperature, top-k and top-p are applied as transformers does, in this order. Of equal logits the
    lower token id ranks first (bf16 logits tie often). Among the kept tokens the largest sum of
    log-probability and Gumbel noise wins, which draws from their softmax (Gumbel-max). The noise
    is a hash of (seed, question id, sample, step, token id), so that a draw depends on nothing else.
    """
    size = logits.shape[-1]
    if decoding.top_k or decoding.top_p < 1:
        tokens = highest_tokens(logits, min(decoding.top_k or size, size))
    else:  # all are kept, in whatever order
        tokens = torch.arange(size, device=logits.device).expand(len(logits), -1)
    scaled = logits.gather(-1, tokens).double() / decoding.temperature
    if decoding.top_p < 1:
        probabilities = scaled.softmax(dim=-1)
        dropped = probabilities.cumsum(dim=-1) - probabilities >= decoding.top_p
        most = tokens.shape[-1] - int(dropped.sum(dim=-1).min())
        tokens, scaled = tokens[:, :most], scaled.masked_fill(dropped, -math.inf)[:, :most]
    tokens, scaled = tokens[row_of], scaled[row_of]
    seed = torch.tensor(decoding.seed, device=logits.device)
    random_bits = counter_hash(seed, *counters[:, :, None].unbind(dim=1), tokens)
    # 52 bits and a half: exact in fp64, never 0 and never 1.
    uniform = (logical_shift(random_bits, 12).double() + 0.5) * 2.0**-52
    best = (scaled - torch.log(-torch.log(uniform))).argmax(dim=-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0]


def highest_tokens(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Of logits (batch, vocabulary) the ids of the `count` highest, (batch, count), highest first.

    Of equal logits the lower id comes first.
    """
    size = logits.shape[-1]
    if count < size:
        taken = count + 1
        highest, tokens = logits.topk(taken)
        while taken < size and (highest[:, -1] == highest[:, count - 1]).any():
            taken = min(2 * taken, size)  # some token that is left out may equal the last one that counts
            highest, tokens = logits.topk(taken)
        if not (highest[:, 1:] == highest[:, :-1]).any():
            return tokens[:, :count]
    else:
        highest, tokens = logits, torch.arange(size, device=logits.device)
    # Floats ordered as integers, the token id below them. -0.0 becomes 0.0: equal numbers need equal bits.
    bits = (highest.float() + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return size - 1 - ((ordered | (size - 1 - tokens)).topk(count).values & 0xFFFFFFFF)


def counter_hash(*counters: torch.Tensor) -> torch.Tensor:
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


def logical_shift(number: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right and fill with zeros, which int64's own shift does not."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
