"""The tape of one forward pass: where the network is cut, and what the fused path needs.

A `DFA` puts its tape into `state` for the time of its forward; the layers below find it there,
so they hold no reference to a root, and several threads and roots do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..activations import Gate

if TYPE_CHECKING:
    from ..layerwise import BackwardWeight, LayerFeedback
    from .broadcast import ChainFeedback


class State(threading.local):
    """Of each thread: the tape being written, or the `LayerFeedback` that runs; the roots inside a
    `backprop()` context; and what some roots run in place of their own forward pass, from their
    args and kwargs."""

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.layer_feedback: LayerFeedback | None = None
        self.instead: dict[nn.Module, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = {}
        self.true_gradients: tuple[nn.Module, ...] = ()


state = State()


# An edge of the graph: a node and which of its outputs.
Edge = tuple[Node, int]

# Holds, when a layer's turn has come, what makes delta and its sums from the matrix of `saved`.
Fed = list[Callable[[Tensor], tuple[Tensor, Tensor]]]


class Affine(Protocol):
    """What a fused layer does before its activation: `layers.LinearMap`, `conv.ConvolutionMap`.

    The kernels work on matrices [rows, columns]; `saved`, what the gate reads, tells the shape and
    the memory format of an output as a tensor.
    """

    def activated(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate
    ) -> tuple[Tensor, Tensor | None]:
        """Returns h = f(a), and a where the gate cannot do with h."""

    def attached(
        self,
        h: Tensor,
        a: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate,
        fed: Fed | None,
        backward: BackwardWeight | None,
    ) -> Tensor:
        """Returns a view of h with the layer's backward behind it."""

    def matrix(self, x: Tensor, saved: Tensor) -> Tensor:
        """A tensor of an output's shape as the kernels read it."""

    def fed_by_rows(self, saved: Tensor, rows: torch.Size) -> bool:
        """Whether the rows of `matrix` are those of an error [*rows, C]."""

    def bias_gradient(self, sums: Tensor, saved: Tensor) -> Tensor:
        """From the sums over the rows of the matrix delta."""

    def weight_gradients(
        self, deltas: list[Tensor], saved: list[Tensor], inputs: list[Tensor]
    ) -> list[Tensor]:
        """Of layers that have this map, from their matrices delta and their inputs."""


# What takes the feedback of a point. Of a layer: saved, input, weight, bias, its output and `fed`;
# else only the token, in the place of the output.
Receiver = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor, Fed | None]


class LayerRecord(NamedTuple):
    """An activated layer whose input is cut: all that its weight gradient takes besides d_l."""

    output: Tensor  # the differentiable h_l; the next layer is known by reading it
    saved: Tensor  # what the gate reads, of the shape of h_l
    input: Tensor  # h_{l-1}
    weight: Tensor
    bias: Tensor | None
    gate: Gate
    affine: Affine
    fed: Fed | None  # where the layer finds what makes its delta; None where it is compiled
    versions: tuple[int, int] | None  # of `saved` and `input`; None where the layer is compiled

    @property
    def receiver(self) -> Receiver:
        return self.saved, self.input, self.weight, self.bias, self.output, self.fed

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
    features: int | None  # the dimension of the features, where others are positions
    previous: Point | Chain | None

    @property
    def shape(self) -> torch.Size:
        """Of the feedback: that of `tensor`, but for its positions."""
        return self.tensor.shape if isinstance(self.target, LayerRecord) else self.target.shape

    @property
    def edge(self) -> GradientEdge:
        """Where the feedback enters the graph of what is before the point."""
        fused = isinstance(self.target, LayerRecord)
        return get_gradient_edge(self.target.output if fused else self.tensor)

    @property
    def modified(self) -> bool:
        """Whether what the layer below needs was changed in place since."""
        return isinstance(self.target, LayerRecord) and self.target.modified

    @property
    def receiver(self) -> Receiver:
        if isinstance(self.target, LayerRecord):
            return self.target.receiver
        return None, None, None, None, self.target, None


class Chain:
    """Layers of an `nn.Sequential` that were computed at once, ahead of their calls; see `chain`.

    On the tape it stands for the points at the outputs that were read so far.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        gates: list[Gate],
        inputs: list[Tensor],
        weights: list[Tensor],
        biases: list[Tensor | None],
        saved: list[Tensor],
        affine: Affine,
    ) -> None:
        self.layers, self.gates, self.affine = layers, gates, affine
        self.inputs, self.weights, self.biases = inputs, weights, biases
        self.saved = saved  # what the gates read
        self.versions = [h._version for h in saved]
        self.input_version = inputs[0]._version
        self.outputs: tuple[Tensor, ...] = ()
        self.token: Tensor | None = None  # announces the feedback of all that were read
        self.fed: list[ChainFeedback] = []  # one, where the chain is fed as one
        self.called = 1  # layers, of which the last is the newest
        self.readers: list[nn.Module] = []  # of the outputs of all of these, or of all but the last
        self.previous: Point | Chain | None = None

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The output of the next layer, where this is it and x the output of the one before."""
        i = self.called
        if i == len(self.layers) or layer is not self.layers[i] or x is not self.outputs[i - 1]:
            return None
        if len(self.readers) == i:  # something else has read x
            return None
        self.readers.append(layer)
        self.called = i + 1
        return self.outputs[i]

    @property
    def tensor(self) -> Tensor | None:
        """What was cut last."""
        return self.outputs[len(self.readers) - 1] if self.readers else None

    @property
    def output(self) -> Tensor:
        """Of the newest layer."""
        return self.outputs[self.called - 1]

    @property
    def modified(self) -> bool:
        """As of a `Point`, of any."""
        if self.inputs[0]._version != self.input_version:
            return True
        return [h._version for h in self.saved] != self.versions

    def points(self) -> list[Point]:
        return [
            Point(reader, self.outputs[i], self._record(i), None, None, None)
            for i, reader in enumerate(self.readers)
        ]

    def _record(self, i: int) -> LayerRecord:
        before = self.versions[i - 1] if i else self.input_version
        return LayerRecord(
            self.outputs[i],
            self.saved[i],
            self.inputs[i],
            self.weights[i],
            self.biases[i],
            self.gates[i],
            self.affine,
            [],
            (self.versions[i], before),
        )


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


class SpreadToken(torch.autograd.Function):
    """A token of shape [*rows, n], whose feedback every position of x receives.

    Positions are the dimensions behind the rows other than `features`, of size n. The feedback is
    divided by the square root of their number, so that a row's is as long as without positions
    (so does TinyDFA, arXiv 2006.12878).
    """

    @staticmethod
    def forward(ctx, x: Tensor, rows: int, features: int) -> Tensor:
        ctx.shape, ctx.rows, ctx.features = x.shape, rows, features
        return x.new_empty(()).expand(*x.shape[:rows], x.shape[features])

    @staticmethod
    @once_differentiable
    def backward(ctx, feedback: Tensor):
        positions = ctx.shape[ctx.rows : ctx.features] + ctx.shape[ctx.features + 1 :]
        one = feedback.div(prod(positions) ** 0.5).view(*feedback.shape, *[1] * len(positions))
        return one.movedim(ctx.rows, ctx.features).expand(ctx.shape), None, None


class Tape:
    """The points and layers of one forward pass of one root, newest first.

    Linked lists, of which a layer looks at the newest only: where layers are compiled one by one,
    a Python list would be guarded by its length, and recompile each of them.
    """

    looks_ahead = True  # whether layers may be computed ahead of their calls
    cuts = True  # whether a layer goes on from its input without the history of that
    gates = True  # whether layers run their activations themselves, where they know them
    saves = True  # whether layers keep what their backward needs; else they return `unsaved`

    def __init__(self, root: nn.Module, inputs: list[Tensor], tap: nn.Module | None) -> None:
        self.root = root
        self.inputs = inputs  # tensors given to the root that require grad: never points
        self.points: Point | Chain | None = None
        self.newest: LayerRecord | Chain | None = None  # the layers, of which one may be read next
        self.chain: Chain | None = None  # the newest
        self.readers: list[tuple[Tensor, Edge]] = []  # a cut tensor, and what a layer made of it
        self.skipped: nn.Module | None = None  # a layer that was called with gradients disabled
        self.in_turn = True  # whether points may be fed one by one; not where hooks replace that
        self.tap = tap  # the module at whose output the error is taken, and
        self.tapped: Tensor | None = None  # that output: nothing is cut after it

    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        """Records x as a point and returns it without its history."""
        for given in self.inputs:
            if x is given:
                return x
        if self.points is None or self.points.tensor is not x:
            if self.newest_is(x, rows, features) and isinstance(self.newest, Chain):
                self.newest.readers.append(layer)
            else:
                self.points = self.point(layer, x, rows, features)
        return x.detach()

    def newest_is(self, x: Tensor, rows: int | None, features: int | None) -> bool:
        """Whether x is the output of the newest layer, which may take its feedback fused."""
        if self.newest is None or rows is not None or features is not None:
            return False
        return self.newest.output is x

    def point(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Point:
        """A new point, of x."""
        if features is not None:
            target = SpreadToken.apply(x, rows, features)
        elif self.newest_is(x, rows, features):
            target = self.newest
        else:
            target = Token.apply(x)
        return Point(layer, x, target, rows, features, self.points)

    def passed(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> None:
        """Notes that `layer` read x, which is no point, as no gradient is wanted for it."""
        if not torch.is_grad_enabled():
            self.skipped = layer

    def read(self, x: Tensor, edge: Edge) -> None:
        """Notes that `edge` was computed from x behind its cut, for the search for bypasses."""
        self.readers.append((x, edge))

    def end(self, y: Any) -> Any:
        """The pass has come to the output y, at which the error is taken; y goes on as returned."""
        return self.root._broadcast(self, y)

    def reads(self) -> list[tuple[Tensor, Edge]]:
        """Cut tensors, and what a layer made of each."""
        chains = [unit for unit in self.in_order() if isinstance(unit, Chain)]
        pairs = [pair for chain in chains for pair in pairwise(chain.outputs[: chain.called])]
        return self.readers + [(x, (h.grad_fn, h.output_nr)) for x, h in pairs]

    def in_order(self) -> list[Point | Chain]:
        """What is on the tape, from the input up."""
        units = []
        newest = self.points
        while newest is not None:
            units.append(newest)
            newest = newest.previous
        return units[::-1]


def cut(
    layer: nn.Module, x: Tensor, rows: int | None = None, features: int | None = None
) -> Tensor:
    """Makes the input x of `layer` a feedback point, where a tape is being written.

    With `features`, one dimension of x behind the rows, the others behind them are positions.
    """
    tape = state.tape
    if tape is None or tape.tapped is not None:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return tape.cut(layer, x, rows, features)
    tape.passed(layer, x, rows, features)
    return x


def backward_weight(layer: nn.Module) -> BackwardWeight | None:
    """What the input gradient of a layer reads in the place of its weight, if something else."""
    root = state.layer_feedback
    return None if root is None else root.backward_weight(layer)


def note_reader(x: Tensor, output: Tensor) -> None:
    """Notes that `output` was computed from x behind its cut, for the search for bypasses."""
    tape = state.tape
    if tape is None or torch.compiler.is_compiling() or output.grad_fn is None:
        return
    tape.read(x, (output.grad_fn, output.output_nr))
