"""The linear layers of a model on a CPU: whichever of torch's two matrix products is faster there.

torch multiplies fp32 matrices with Intel's MKL. On processors of other makers MKL can stay at half the
rate of oneDNN, which torch carries too and uses for 16-bit numbers. Either way torch hands it the weights as they
are, and oneDNN lays them out anew in every product. Where the weights do not change, that can be done once.
"""

import contextlib
import functools
import time
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from model import free_memory

LARGE = 2**16  # elements of a weight, and …
WIDE = 512  # … inputs of a layer; in smaller ones the call counts for more than the product
WORTHWHILE = 1.2  # times as fast, and oneDNN is taken; below that a measured gain may be chance
PACKED_FOR = 64  # rows of inputs that a packed weight is laid out for; it serves any number
PACKED_SHARE = 0.25  # of the free memory is the most that packed weights may take


def onednn_linear(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """inputs (…, in) times weight (out, in), plus bias: (…, out), as torch.nn.functional.linear gives it, up to rounding.

    The weight may be packed.
    """
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def packed(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight (out, in) in the layout that oneDNN multiplies by. Otherwise it makes one in every product."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)


@functools.cache
def onednn_gain(dtype: torch.dtype = torch.float32, pack: bool = False) -> float:
    """How many times as fast as torch's own choice oneDNN multiplies here; 0 where it fails or errs.

    pack: with a packed weight and 16 rows of inputs, as in a decode step; else with the weight as it is and 64.
    Measured by turns, the best of five each, in some 20 ms.
    """
    draw = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 1024, generator=draw).to(dtype) for rows in (1024, 16 if pack else 64))
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 0.5}
    try:
        with torch.inference_mode():
            laid_out = packed(weight) if pack else weight
            ways = {
                "torch": lambda: torch.nn.functional.linear(inputs, weight),
                "onednn": lambda: onednn_linear(laid_out, None, inputs),
            }
            if not torch.allclose(ways["torch"](), ways["onednn"](), **close):
                return 0.0
            seconds = fastest(ways)
    except (RuntimeError, AttributeError):  # a torch without oneDNN, or with another name for it
        return 0.0
    return seconds["torch"] / seconds["onednn"]


def fastest(ways: dict[str, Callable]) -> dict[str, float]:
    """Seconds that each way takes, by turns, the best of five."""
    seconds = {name: [] for name in ways}
    for _ in range(5):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begun)
    return {name: min(times) for name, times in seconds.items()}


class OnednnLinear(torch.autograd.Function):
    """`onednn_linear` that can be trained: its gradients are products by oneDNN too."""

    @staticmethod
    def forward(ctx, weight, bias, inputs):
        of_weight, _, of_inputs = ctx.needs_input_grad
        ctx.save_for_backward(weight if of_inputs else None, inputs if of_weight else None)
        return onednn_linear(weight, bias, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        weight, inputs = ctx.saved_tensors
        of_weight = of_bias = of_inputs = None
        rows = gradient.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            of_weight = onednn_linear(inputs.flatten(0, -2).t(), None, rows.t())
        if ctx.needs_input_grad[1]:
            of_bias = rows.sum(0)
        if ctx.needs_input_grad[2]:
            of_inputs = onednn_linear(weight.t(), None, gradient)
        return of_weight, of_bias, of_inputs


def large_layers(model, dtype: torch.dtype = torch.float32) -> list[torch.nn.Linear]:
    """The model's layers of a precision that oneDNN may be faster for."""
    return [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == dtype
        and module.weight.numel() >= LARGE
        and module.in_features >= WIDE
        and ("forward" not in vars(module) or is_trained(module))  # another library's stays
    ]


@contextlib.contextmanager
def replaced(forwards: dict[torch.nn.Linear, Callable]):
    """While it lasts, each layer computes with the function given for it."""
    before = {module: vars(module).get("forward") for module in forwards}  # a training's, around an evaluation's
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward:
                module.forward = forward


def trained_product(module: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    return OnednnLinear.apply(module.weight, module.bias, inputs)


def is_trained(module: torch.nn.Linear) -> bool:
    """Whether a training has given the layer its product, see `products_by`."""
    return getattr(module.forward, "func", None) is trained_product


def onednn_pays(model) -> bool:
    """Whether large fp32 layers are there, and oneDNN is the faster one for them."""
    return not torch.is_autocast_enabled("cpu") and bool(large_layers(model)) and onednn_gain() >= WORTHWHILE


@contextlib.contextmanager
def faster_linear(model, note: Callable[[str], None]):
    """While it lasts, the model's large layers multiply with oneDNN, where that is faster. For inference alone.

    The weights must not change meanwhile: where memory allows it, packed copies of them are used.
    """
    layers = large_layers(model, model.dtype) if model.dtype in (torch.float32, torch.bfloat16) else []
    size = sum(module.weight.nbytes for module in layers)
    pack = bool(layers) and size <= PACKED_SHARE * free_memory(model.device)
    gain = onednn_gain(model.dtype, pack) if layers and not torch.is_autocast_enabled("cpu") else 0.0
    if gain < WORTHWHILE:
        yield
        return
    how = f" with {size / 2**30:.1f} GiB of packed weights" if pack else ""
    note(f"linear layers: oneDNN{how}, {gain:.1f} times as fast on this processor as torch's default")
    weights = [packed(module.weight) if pack else module.weight for module in layers]
    products = [
        functools.partial(onednn_linear, weight, layer.bias) for weight, layer in zip(weights, layers, strict=True)
    ]
    with replaced(dict(zip(layers, products, strict=True))):
        yield


@contextlib.contextmanager
def products_by(library: str | None, model):
    """While it lasts, the model's large layers multiply with "oneDNN", forward and backward, or as they do anyway."""
    layers = large_layers(model) if library == "oneDNN" else []
    with replaced({module: functools.partial(trained_product, module) for module in layers}):
        yield
