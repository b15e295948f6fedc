"""The tape of one forward pass: where the network is cut, and what the fused path needs.

A `DFA` puts its tape into `state` for the time of its forward; the layers below find it there,
so they hold no reference to a root, and several threads and roots do not meet.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from .activations import Gate


class State(threading.local):
    """Of each thread: the tape being written, and the roots inside a `backprop()` context."""

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.true_gradients: tuple[nn.Module, ...] = ()


state = State()


class LayerRecord(NamedTuple):
    """An activated layer whose input is cut: all that its weight gradient takes besides d_l."""

    output: Tensor  # the differentiable h_l [*rows, n_l]; the next layer is known by reading it
    saved: Tensor  # what the gate reads [*rows, n_l]
    input: Tensor  # h_{l-1} [*rows, n_{l-1}]
    weight: Tensor
    bias: Tensor | None
    gate: Gate
    versions: tuple[int, int] | None  # of `saved` and `input`; None where the layer is compiled
    previous: LayerRecord | None

    @property
    def modified(self) -> bool:
        """Whether what the backward needs was changed in place since."""
        return self.versions not in (None, (self.saved._version, self.input._version))


class Point(NamedTuple):
    """A feedback point: the tensor that `layer` reads, and what receives the feedback for it."""

    layer: nn.Module
    tensor: Tensor
    target: LayerRecord | Tensor  # a layer whose gate is fused, or the token of `tensor`
    rows: int | None  # leading dimensions that are rows, where the layer says so
    previous: Point | None


class Token(torch.autograd.Function):
    """Holds the place of x in the graph at this moment, without holding its memory.

    The feedback arrives at the token and goes on to x. (x itself would do, but for a later
    modification in place, which moves x to another place in the graph.)
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, feedback: Tensor) -> Tensor:
        return feedback


class Tape:
    """The points and layers of one forward pass of one root, newest first.

    Linked lists, of which a layer looks at the newest only: where layers are compiled one by one,
    a Python list would be guarded by its length, and recompile each of them.
    """

    def __init__(self, root: nn.Module, inputs: list[Tensor], tap: nn.Module | None) -> None:
        self.root = root
        self.inputs = inputs  # tensors given to the root that require grad: never points
        self.points: Point | None = None
        self.layers: LayerRecord | None = None
        self.readers: list[tuple[Tensor, Node]] = []  # a cut tensor, and what a layer made of it
        self.skipped: nn.Module | None = None  # a layer that was called with gradients disabled
        self.tap = tap  # the module at whose output the error is taken, and
        self.tapped: Tensor | None = None  # that output: nothing is cut after it

    def cut(self, layer: nn.Module, x: Tensor, rows: int | None) -> Tensor:
        """Records x as a point and returns it without its history."""
        for given in self.inputs:
            if x is given:
                return x
        if self.points is None or self.points.tensor is not x:
            newest = self.layers
            fused = newest is not None and newest.output is x and rows is None
            target = newest if fused else Token.apply(x)
            self.points = Point(layer, x, target, rows, self.points)
        return x.detach()

    def in_order(self) -> list[Point]:
        """The points from the input up; of several that read one tensor, the first."""
        points = []
        newest = self.points
        while newest is not None:
            points.append(newest)
            newest = newest.previous
        by_tensor: dict[int, Point] = {}
        for point in reversed(points):
            by_tensor.setdefault(id(point.tensor), point)
        return list(by_tensor.values())


def cut(layer: nn.Module, x: Tensor, rows: int | None = None) -> Tensor:
    """Makes the input x of `layer` a feedback point, where a tape is being written."""
    tape = state.tape
    if tape is None or tape.tapped is not None:
        return x
    if not torch.is_grad_enabled():
        tape.skipped = layer
        return x
    return tape.cut(layer, x, rows) if x.requires_grad else x


def note_reader(x: Tensor, output: Tensor) -> None:
    """Notes that `output` was computed from x behind its cut, for the search for bypasses."""
    tape = state.tape
    if tape is None or torch.compiler.is_compiling() or output.grad_fn is None:
        return
    tape.readers.append((x, output.grad_fn))
