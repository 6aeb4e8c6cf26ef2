"""The head of a model for greedy decoding on a CPU: logits in bf16, whose highest is that of the logits in fp32.

The head multiplies by a row of weights for each of 50,000 to 150,000 tokens, up to a quarter of a model's work, and
greedy decoding wants no more than the highest logit. Processors with instructions for bf16 multiply twice as fast in
it, and it is half as much to read. So the logits are computed in bf16. How far each may be from its value in fp32 is
bounded, and those that may be the highest are computed again in fp32.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from linear import LARGE, PACKED_SHARE, WIDE, WORTHWHILE, fastest, onednn_linear, packed, replaced
from model import free_memory
from sampling import highest_logits, split_into_parts

MOST_TOKENS, MOST_PARTS = 128, 32  # of a row that may be the highest; with more, all its logits are computed in fp32
BF16_ROUNDING = 2**-8  # the largest relative error of a number rounded to bf16, whose mantissa has 8 bits
FP32_ROUNDING = 2**-24


class Weights(NamedTuple):
    """The head's weights (vocabulary, hidden) in fp32 and, packed, in bf16; and of each row the norm, and that of its
    rounding to bf16, both (vocabulary,)."""

    exact: torch.Tensor
    rounded: torch.Tensor
    norms: torch.Tensor
    rounding_norms: torch.Tensor


def round_weights(exact: torch.Tensor) -> Weights:
    rounded = exact.detach().bfloat16()
    errors = [(e - r.float()).norm(dim=-1) for e, r in zip(exact.split(4096), rounded.split(4096), strict=True)]
    return Weights(exact.detach(), packed(rounded), exact.detach().norm(dim=-1), torch.cat(errors).detach())


def highest_right(weights: Weights, inputs: torch.Tensor) -> torch.Tensor:
    """Logits (…, vocabulary) in bf16 for inputs (…, hidden) in fp32. The highest of each row is that of the fp32 logits.

    It takes the highest value of those in doubt, the others of them -inf. A row with NaN keeps it.
    """
    logits = onednn_linear(weights.rounded, None, inputs.bfloat16())
    rows, hidden = logits.view(-1, logits.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    row, token, crowded = find_doubtful(weights, rows, hidden)
    if len(crowded):
        _, highest = highest_logits(hidden[crowded] @ weights.exact.T)
        rows[crowded] = -math.inf
        rows[crowded, highest] = 0.0

    def best_of_row(values, start, reduce):
        return values.new_full((len(rows),), start).scatter_reduce(0, row, values, reduce)[row]

    exact = (weights.exact[token] * hidden[row]).sum(dim=-1)
    among_equals = torch.where(exact == best_of_row(exact, -math.inf, "amax"), token, rows.shape[-1])
    wins = token == best_of_row(among_equals, rows.shape[-1], "amin")  # of equals the lowest id
    top = best_of_row(rows[row, token], -math.inf, "amax")
    rows[row, token] = top.where(wins, -math.inf)
    return logits


def find_doubtful(weights: Weights, rows: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(row, token) of each logit that may be the highest of its row in fp32, and the rows that have too many of them.

    rows: (n, vocabulary) in bf16. hidden: (n, hidden) in fp32, what they were computed from.
    The sum over the products of x and w is off by dx·w + x·dw, where dx and dw are what rounding took away. It is
    bounded by the norms of all four (Cauchy-Schwarz). Adding up in fp32, and rounding the sum to bf16, come on top.
    """
    rounded = hidden.bfloat16().float()
    length = rounded.norm(dim=-1)
    per_norm = (hidden - rounded).norm(dim=-1) + hidden.shape[-1] * FP32_ROUNDING * length

    def error(row, norms, rounding_norms):
        return per_norm[row] * norms + length[row] * rounding_norms

    def rounded_off(logits):
        return logits.abs() * (BF16_ROUNDING * (1 + 2 * BF16_ROUNDING))

    every = torch.arange(len(rows))
    parts = split_into_parts(rows)  # (n, parts, size)
    tops = parts.amax(dim=-1).float()
    top, part = tops.max(dim=-1)
    token = part * parts.shape[-1] + parts[every, part].argmax(dim=-1)
    least = top - rounded_off(top) - error(every, weights.norms[token], weights.rounding_norms[token])
    widest = error(every, weights.norms.max(), weights.rounding_norms.max())[:, None]
    doubtful = tops + rounded_off(tops) + widest >= least[:, None]
    crowded = doubtful.sum(dim=-1) > MOST_PARTS
    row, part = (doubtful & ~crowded[:, None]).nonzero(as_tuple=True)
    inside = parts[row, part].float()
    which, place = (inside + rounded_off(inside) + widest[row] >= least[row, None]).nonzero(as_tuple=True)
    row, token, logit = row[which], part[which] * parts.shape[-1] + place, inside[which, place]
    most = logit + rounded_off(logit) + error(row, weights.norms[token], weights.rounding_norms[token])
    row, token = row[most >= least[row]], token[most >= least[row]]
    crowded |= row.bincount(minlength=len(rows)) > MOST_TOKENS
    return row[~crowded[row]], token[~crowded[row]], crowded.nonzero()[:, 0]


@functools.cache
def bf16_gain() -> float:
    """How many times as fast packed weights multiply in bf16 here as in fp32 by the faster library; 0 where that fails."""
    draw = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 1024, generator=draw) for rows in (1024, 16))
    try:
        with torch.inference_mode():
            exact, rounded = packed(weight), packed(weight.bfloat16())
            seconds = fastest(
                {
                    "torch": lambda: torch.nn.functional.linear(inputs, weight),
                    "fp32": lambda: onednn_linear(exact, None, inputs),
                    "bf16": lambda: onednn_linear(rounded, None, inputs.bfloat16()),
                }
            )
    except (RuntimeError, AttributeError):  # a torch without oneDNN, or with another name for it
        return 0.0
    return min(seconds["torch"], seconds["fp32"]) / seconds["bf16"]


def returns_logits_unchanged(model, layer: torch.nn.Linear) -> bool:
    """Whether what the head computes is what the model returns: some models scale it, or bend it towards a limit."""
    told = torch.linspace(-50, 50, layer.out_features)
    try:
        with replaced({layer: lambda inputs: told.expand(*inputs.shape[:-1], -1)}), torch.inference_mode():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):  # no model to generate with: told later
        return False
    return torch.equal(logits[0, -1].float(), told)


@contextlib.contextmanager
def greedy_head(model, note: Callable[[str], None]):
    """While it lasts, the model's head gives logits for greedy decoding alone, where that is faster."""
    layer = model.get_output_embeddings()
    fits = (
        type(layer) is torch.nn.Linear
        and layer.bias is None
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= LARGE
        and layer.in_features >= WIDE
        and layer.out_features % 128 == 0  # so that the highest logit is found by parts
        and layer.weight.nbytes // 2 <= PACKED_SHARE * free_memory(layer.weight.device)
        and not torch.is_autocast_enabled("cpu")
    )
    if not fits or bf16_gain() < WORTHWHILE or not returns_logits_unchanged(model, layer):
        yield
        return
    note(f"logits: in bf16, {bf16_gain():.1f} times as fast on this processor; in fp32 those that may be the highest")
    with torch.inference_mode():
        weights = round_weights(layer.weight)
    with replaced({layer: functools.partial(highest_right, weights)}):
        yield
