"""A multilayer perceptron, and every way to make a training step of it.

The sides of step.py, growth.py and one_core.py are backprop by torch; fused backprop, by the layers
of fastdfa with no cut; DFA by hand; BioTorch (arXiv 2108.13446); fastdfa; and the limit, which is
what no DFA step can avoid: the matrix products of the forward pass and of the weight gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdfa
from benchmarks.harness.command import console
from benchmarks.harness.steps import AutogradStep, autocast, by_torch_mm, graphed
from benchmarks.harness.timing import FUSED, Step

INPUTS, CLASSES = 784, 10

GRAPHED = ["backprop", "backprop compiled", FUSED, "fastdfa", "fastdfa compiled", "limit"]
MODES = ["reduce-overhead", "max-autotune"]  # of torch.compile, on CUDA
BIOTORCH = "BioTorch"
COLOURS = {
    BIOTORCH: "#b86b4b",
    "backprop compiled": "#9aa5b1",
    FUSED: "#6f7d8a",
    "backprop, reduce-overhead": "#b3bcc6",
    "backprop, max-autotune": "#d6dbe0",
    "backprop, graph": "#c9ced6",
    "backprop compiled, graph": "#e3e6ea",
    f"{FUSED}, graph": "#ccd2d8",
    "PyTorch DFA loop": "#e0b050",
    "limit": "#333333",
    "fastdfa, torch.mm": "#a8d5e2",
    "fastdfa compiled": "#63b0c9",
    "fastdfa, reduce-overhead": "#4a9cb8",
    "fastdfa, max-autotune": "#2f86a5",
    "fastdfa": "#1f6f8b",
    "fastdfa, graph": "#0d3c4c",
}


class Case(NamedTuple):
    """A multilayer perceptron INPUTS-width x depth-classes, tanh, and a batch.

    `autocast`: float32 weights and inputs, whose products are made in `dtype`.
    """

    depth: int
    width: int
    batch: int
    dtype: str = "float32"
    autocast: bool = False
    classes: int = CLASSES

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        autocast = " autocast" if self.autocast else ""
        return f"{self.depth}x{self.width} / {self.batch}{dtype}{autocast}"

    @property
    def widths(self) -> list[int]:
        return [INPUTS, *[self.width] * self.depth, self.classes]

    @property
    def limit_flop(self) -> int:
        products = zip(self.widths[:-1], self.widths[1:], strict=True)
        return 2 * sum(2 * self.batch * k * n for k, n in products)


def network(case: Case, linear: type[nn.Linear]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(case.widths[:-1], case.widths[1:], strict=True):
        layers.append(linear(inputs, outputs))
        layers.append(nn.Tanh())
    return nn.Sequential(*layers[:-1])


def fused_network(case: Case, **options: Any) -> fastdfa.DFA:
    *hidden, (inputs, outputs) = zip(case.widths[:-1], case.widths[1:], strict=True)
    layers = [fastdfa.Linear(k, n, activation="tanh") for k, n in hidden]
    return fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(inputs, outputs)), **options)


class Loop:
    """Makes DFA as one writes it by hand in PyTorch, without autograd and with nothing to spare.

    Args:
        layers: of the network, all hidden ones of one width and followed by tanh.
        feedback: B [classes, width], of all layers.
        dtype: of products and activations, where that is not the dtype of the weights.
    """

    def __init__(self, layers: list[nn.Linear], feedback: Tensor, dtype: torch.dtype):
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = [layer.bias.detach() for layer in layers]
        self.feedback, self.dtype = feedback.to(dtype), dtype

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Returns the loss of inputs x [batch, features] and labels y, and the gradients as the
        parameters."""
        *weights, head = cast(self.weights, self.dtype)
        *biases, head_bias = cast(self.biases, self.dtype)
        hidden = list(cast([x], self.dtype))
        for weight, bias in zip(weights, biases, strict=True):
            hidden.append(torch.tanh(torch.addmm(bias, hidden[-1], weight.t())))
        (y_hat,) = cast([torch.addmm(head_bias, hidden[-1], head.t())], x.dtype)
        loss = F.cross_entropy(y_hat.requires_grad_(), y)
        (error,) = cast(torch.autograd.grad(loss, y_hat), self.dtype)
        projection = error @ self.feedback  # once: all layers share B and have one width
        grads = []
        for h, below in zip(hidden[1:], hidden[:-1], strict=True):
            delta = torch.ops.aten.tanh_backward(projection, h)
            grads += [delta.t() @ below, delta.sum(0)]
        grads += [error.t() @ hidden[-1], error.sum(0)]
        return loss.detach(), cast(grads, x.dtype)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Casts tensors of one dtype to another. Where they are in it, not one call is made."""
    return tensors if tensors[0].dtype == dtype else [tensor.to(dtype) for tensor in tensors]


def loop_step(case: Case, x: Tensor, y: Tensor) -> Step:
    layers = [m for m in network(case, nn.Linear).to(x) if isinstance(m, nn.Linear)]
    feedback = torch.randn(case.classes, case.width) * (case.width * case.classes) ** -0.5
    loop = Loop(layers, feedback.to(x.device), getattr(torch, case.dtype))
    return lambda: loop(x, y)


@cache
def biotorch() -> Callable[..., nn.Module] | None:
    """Imports BioTorch's wrapper of a network; prints one line and returns None where it cannot."""
    try:
        from biotorch.module.biomodule import BioModule
    except ImportError as error:
        console.print(
            f"{BIOTORCH} is left out: {error}. To measure it: pip install --no-deps biotorch",
            style="yellow",
            markup=False,
        )
        return None
    return BioModule


def biotorch_step(case: Case, x: Tensor, y: Tensor, wrapper: Callable[..., nn.Module]) -> Step:
    """BioTorch takes targets and loss in the forward pass, and the loss is taken once more."""
    with contextlib.redirect_stdout(None):  # it prints what it converts
        model = wrapper(network(case, nn.Linear), mode="dfa", output_dim=case.classes).to(x)
    return AutogradStep(model, lambda x: model(x, y, F.cross_entropy), x, y)


def limit_step(case: Case, x: Tensor) -> Step:
    """Makes the matrix products of forward and weight gradients, each into a fresh output."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=x.dtype, device=x.device)

    weights = [randn(n, k) for k, n in zip(case.widths[:-1], case.widths[1:], strict=True)]
    inputs = [x, *[randn(case.batch, n) for n in case.widths[1:-1]]]
    deltas = [randn(case.batch, n) for n in case.widths[1:]]

    def step() -> list[Tensor]:
        forward = [h @ w.t() for h, w in zip(inputs, weights, strict=True)]
        del forward
        return [d.t() @ h for d, h in zip(deltas, inputs, strict=True)]

    return step


def steps_of(
    case: Case, compiled: bool = True, device: str = "cpu", published: bool = True
) -> dict[str, Step]:
    """Makes every way to make a step of this size, by name; `published`: those of other libraries
    too."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.batch, INPUTS).to(device, torch.float32 if case.autocast else dtype)
    y = torch.randint(case.classes, (case.batch,)).to(device)
    plain, dfa = network(case, nn.Linear).to(x), fused_network(case).to(x)
    uncut = fused_network(case, cut=()).to(x)

    def step_of(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Step:
        return AutogradStep(model, autocast(forward, dtype) if case.autocast else forward, x, y)

    steps: dict[str, Step] = {
        "backprop": step_of(plain, plain),
        FUSED: step_of(uncut, uncut),
        "PyTorch DFA loop": loop_step(case, x, y),
        "fastdfa": step_of(dfa, dfa),
    }
    # Under autocast its backward pass multiplies two dtypes, an error.
    if published and not case.autocast and (wrapper := biotorch()):
        steps[BIOTORCH] = biotorch_step(case, x, y, wrapper)
    if device == "cpu":
        steps["fastdfa, torch.mm"] = by_torch_mm(step_of(dfa, dfa))
    steps["limit"] = limit_step(case, x.to(dtype))
    if compiled:
        torch._dynamo.reset()
        steps["backprop compiled"] = step_of(plain, torch.compile(plain))
        steps["fastdfa compiled"] = step_of(dfa, torch.compile(dfa))
    if compiled and device != "cpu":
        for mode in MODES:
            steps[f"backprop, {mode}"] = step_of(plain, torch.compile(plain, mode=mode))
            steps[f"fastdfa, {mode}"] = step_of(dfa, torch.compile(dfa, mode=mode))
    if device != "cpu":
        steps |= {f"{name}, graph": graphed(steps[name]) for name in GRAPHED if name in steps}
    return steps
