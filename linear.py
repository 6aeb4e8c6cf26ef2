"""The linear layers of a model on a CPU: whichever of torch's two matrix products is faster there.

torch multiplies fp32 matrices with Intel's MKL. On processors of other makers MKL can stay at half the
rate of oneDNN, which torch carries too and uses for 16-bit numbers.
"""

import contextlib
import functools
import time
from collections.abc import Callable

import torch

LARGE = 2**18  # elements of a weight; in smaller layers the call counts for more than the product
WORTHWHILE = 1.3  # times as fast, and oneDNN is taken; below that a measured gain may be chance


def onednn_linear(weight: torch.Tensor, bias: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """inputs (…, in) times weight (out, in), plus bias: (…, out), as torch.nn.functional.linear gives it, up to rounding."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@functools.cache
def onednn_gain() -> float:
    """How many times as fast as torch's own choice oneDNN multiplies in fp32 here; 0 where it fails or errs.

    Measured by turns on a product of 64 rows, the best of five each, in some 20 ms.
    """
    draw = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(rows, 1024, generator=draw) for rows in (1024, 64))
    ways = {
        "torch": lambda: torch.nn.functional.linear(inputs, weight),
        "onednn": lambda: onednn_linear(weight, None, inputs),
    }
    seconds = {name: [] for name in ways}
    try:
        with torch.inference_mode():
            if not torch.allclose(ways["torch"](), ways["onednn"](), rtol=1e-4, atol=1e-3):
                return 0.0
            for _ in range(5):
                for name, way in ways.items():
                    begun = time.perf_counter()
                    way()
                    seconds[name].append(time.perf_counter() - begun)
    except (RuntimeError, AttributeError):  # a torch without oneDNN, or with another name for it
        return 0.0
    return min(seconds["torch"]) / min(seconds["onednn"])


@contextlib.contextmanager
def faster_linear(model, note: Callable[[str], None]):
    """While it lasts, the model's large fp32 layers multiply with oneDNN, where that is faster. For inference alone."""
    layers = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= LARGE
        and "forward" not in vars(module)  # another library's, which must stay
    ]
    if torch.is_autocast_enabled("cpu") or not layers or onednn_gain() < WORTHWHILE:
        yield
        return
    note(f"linear layers: oneDNN, {onednn_gain():.1f} times as fast on this processor as torch's default")
    try:
        for module in layers:
            module.forward = functools.partial(onednn_linear, module.weight, module.bias)
        yield
    finally:
        for module in layers:
            vars(module).pop("forward", None)
