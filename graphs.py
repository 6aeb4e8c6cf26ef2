"""Decode steps captured as CUDA graphs.

A decode step of a small model launches hundreds of short kernels, and launching them takes longer than
running them. A CUDA graph records the kernels of one step and launches all of them in one call. The
recorded kernels always read and write the same memory, so whatever changes between two steps must be
in tensors: new values are copied into the tensors that the graph was captured with.
"""

from collections.abc import Callable

import torch

from common import first_line

FIRST_CHECKS = 2  # replays that are compared with the plain step when a batch begins


class CapturedSteps:
    """Runs decode steps: captured and replayed where that works, as they are where it does not.

    step: computes the logits, (batch, vocabulary), of one step from `layout`, `inputs` and `newest`.
    layout: which cohorts take part with how many slots. A graph serves steps of one layout.
    inputs: int64 (2, batch), the newest token of every row and its position.
    newest: the column of the newest token in each cohort's buffers.
    slots: the engine rounds a cohort's batch up to a multiple of this, so that one graph serves many
        steps. It becomes 1 once capturing has failed.

    The first replays, and later one in `check_every`, are compared with the plain step. At the first
    difference or error a line goes to `note`, and all further steps run as they are.
    """

    def __init__(self, step: Callable, device: torch.device, slots: int, check_every: int, note: Callable[[str], None]):
        self.step, self.device, self.slots, self.check_every, self.note = step, device, slots, check_every, note
        self.replays = 0
        self.forget()

    @torch.inference_mode()
    def __call__(self, layout: list, inputs: torch.Tensor, newest: list[int]) -> torch.Tensor:
        """Logits (batch, vocabulary) of one step. The next call may overwrite them."""
        if self.slots == 1:
            return self.step(layout, inputs, newest)
        new = inputs, torch.tensor(newest, device=self.device)
        if layout != self.layout:  # it may never come again: run it as it is, which also warms up what capturing needs
            self.forget()
            self.layout, self.held = layout, new
            return self.step(layout, *new)
        try:
            logits = self.replay(new)
            if self.replays < FIRST_CHECKS or self.replays % self.check_every == 0:
                self.refuse_other(logits, self.step(layout, *new))
            self.replays += 1
            return logits
        except RuntimeError as error:  # torch's CUDA errors, out of memory among them, are RuntimeErrors
            self.note(f"decode steps are not captured as CUDA graphs, which is slower: {first_line(error)}")
        self.forget()
        self.slots = 1
        return self.step(layout, inputs, newest)

    def replay(self, new: tuple) -> torch.Tensor:
        for held, value in zip(self.held, new, strict=True):
            held.copy_(value)
        if self.graph is None:
            self.graph, self.logits = capture(lambda: self.step(self.layout, *self.held), self.device)
        self.graph.replay()
        return self.logits

    def refuse_other(self, logits: torch.Tensor, expected: torch.Tensor):
        """RuntimeError where two results of one step differ by far more than rounding."""
        if torch.allclose(logits, expected, rtol=2**-5, atol=2**-3):
            return
        unchecked = self.check_every - 1 if self.replays >= self.check_every else 0
        told = f", and {unchecked} replays before it were not compared" if unchecked else ""
        raise RuntimeError(f"a replayed step gives other logits{told}")

    def forget(self):
        """Drop the graph. Its memory, and the cohorts that it writes to, become free."""
        self.layout = self.held = self.graph = self.logits = None


def capture(work: Callable, device: torch.device) -> tuple:
    """(graph, result): the kernels of `work`, and the tensor into which every replay writes its result."""
    graph = torch.cuda.CUDAGraph()
    # A failed capture leaves its own stream behind as the current one; the outer context puts the stream back.
    stream = torch.cuda.stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), stream, torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph, result
