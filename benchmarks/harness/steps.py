"""Training steps for the timer: forward, loss and backward of any model, and ways to run them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.timing import Step
from fastdfa.ops import products as gemm


class AutogradStep:
    """Makes forward, loss and backward, into fresh gradients."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor):
        self.model, self.parameters = model, list(model.parameters())
        self.forward, self.x, self.y = forward, x, y

    def __call__(self) -> None:
        self.clear()
        F.cross_entropy(self.forward(self.x), self.y).backward()

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def autocast(forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Runs the forward pass under autocast; gives its result in float32, as torch's own losses take
    it."""

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return forward(x).float()

    return under_autocast


def graphed(step: Step) -> Step:
    """Captures the step whole in a CUDA graph, which a call then replays.

    Captured when first called: a step that cannot be captured must fail as it runs.
    """
    graph = torch.cuda.CUDAGraph()
    captured = False

    def replay() -> None:
        nonlocal captured
        if not captured:
            _warm_up_beside(step)
            with torch.cuda.graph(graph):
                step()
            captured = True
        graph.replay()

    return replay


def _warm_up_beside(step: Step) -> None:
    """Runs the step a few times on another stream, as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def by_torch_mm(step: Step) -> Step:
    """Makes the same step by the matrix products that backprop has, to tell apart the two gains."""

    def with_torch_mm() -> None:
        library, gemm.library = gemm.library, lambda: "torch"
        try:
            step()
        finally:
            gemm.library = library

    return with_torch_mm
