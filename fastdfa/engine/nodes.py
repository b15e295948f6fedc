"""Holds the nodes of the graph: behind a segment, a gate, a point, and the output.

A gradient that arrives at a token announces feedback, which the node behind it asks the broadcast
for; one that arrives at an output is a true gradient, as that output is used elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from .. import ops
from ..activations import Gate
from ..matrices import Learning, learning_gradients
from ..ops.typed import Function
from . import norms
from .broadcast import Broadcast, Sender, as_matrix
from .stages import Backward, Saved, compute, in_dtype, plain_linear

# An edge of the graph: a node, and which of its outputs.
Edge = tuple[Node, int]

_BEFORE_PARAMETERS = 4  # arguments of `SegmentNode.forward`


class SegmentNode(Function):
    """Returns the outputs of a segment, and a token where they may become points; of one with a
    head its output alone, at which the error arrives.

    Behind it the input, the weights, the biases, then the norms' trained parameters. Outputs are
    views, so that autograd refuses a modification in place: the gates read them, and would gate
    wrongly. Only the output of a layer without activation is none.
    """

    @staticmethod
    def forward(
        ctx: Any, segment: Any, receiver: Any, sender: Any, x: Tensor, *parameters: Any
    ) -> Any:
        count = segment.layers
        weights, biases = parameters[:count], parameters[count : 2 * count]
        hidden, gating, normed = compute(segment.stages, x, weights, biases)
        y = None
        if segment.head:
            y = _with_rows(plain_linear(hidden[-1], weights[-1], biases[-1]), x)
        ctx.set_materialize_grads(False)
        ctx.segment, ctx.receiver = segment, receiver
        ctx.sender = None if sender is None else sender.checked(y)
        ctx.x_shape, ctx.wide = x.shape, weights[0].dtype != x.dtype
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        _save(ctx, y, x, weights, hidden, gating, normed)
        if segment.head:
            return y
        if receiver is not None:
            return *[_view(h, x) for h in hidden], x.new_empty(())
        (gate,) = [stage.gate for stage in segment.stages]
        return _view(hidden[0], x) if gate.kind else _with_rows(hidden[0], x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        segment, receiver, error = ctx.segment, ctx.receiver, None
        output, saved = _unpacked(ctx)
        ctx.maybe_clear_saved_tensors()
        if segment.head:
            (error,) = grads
            if error is None:
                return (None,) * len(ctx.needs_input_grad)
            error, grads = as_matrix(error), (None,) * len(segment.stages)
            if receiver is not None:
                sent = error if ctx.sender is None else ctx.sender.of(error, output)
                receiver.broadcast.begin(sent)
        elif receiver is not None:
            grads, announced = grads[:-1], grads[-1]
            receiver = None if announced is None else receiver
        needs_x, *needs = ctx.needs_input_grad[_BEFORE_PARAMETERS - 1 :]
        backward = Backward(segment, saved, receiver, ctx.wide, needs[: segment.layers])
        made = backward.run(error, grads, needs_x)
        biases = [
            None if total is None or dtype is None else in_dtype(total, dtype)
            for total, dtype in zip(made.sums, ctx.bias_dtypes, strict=True)
        ]
        x_grad = None if made.x is None else made.x.view(ctx.x_shape)
        return None, None, None, x_grad, *made.weights, *biases, *made.norms

    def edges_behind(self: Any, output: int) -> tuple[Edge, ...]:
        """Returns the edges behind one output of a run: of the first the input too."""
        biases = [dtype is not None for dtype in self.bias_dtypes]
        edges = self.next_functions  # None is no edge
        parameters = edges[len(edges) - len(biases) - sum(biases) :]
        bias = len(biases) + sum(biases[:output])
        inputs = edges[: len(edges) - len(parameters)] if output == 0 else ()
        return *inputs, parameters[output], *parameters[bias : bias + biases[output]]


def _save(
    ctx: Any,
    y: Tensor | None,
    x: Tensor,
    weights: Sequence[Tensor],
    hidden: Sequence[Tensor],
    gating: Sequence[Tensor],
    normed: dict[int, tuple[norms.Norm, norms.Kept]],
) -> None:
    """Saves what `Backward` reads. The gate of most stages reads what the next layer does."""
    segment = ctx.segment
    ctx.norms = {place: norm for place, (norm, _) in normed.items()}
    needs_output = ctx.sender is not None and ctx.sender.signal.needs_output
    ctx.save_for_backward(
        y if needs_output else None,
        x,
        *[weights[i] for i in segment.weights_kept],
        *hidden[: segment.read],
        *[gating[i] for i in segment.gates_apart],
        *[tensor for _, kept in normed.values() for tensor in kept],
    )


def _unpacked(ctx: Any) -> tuple[Tensor | None, Saved]:
    """Returns the output, where it is needed, and the rest of what was saved."""
    output, x, *tensors = ctx.saved_tensors
    segment = ctx.segment
    weights = dict(zip(segment.weights_kept, tensors, strict=False))
    first = len(weights)
    hidden = list(tensors[first : first + segment.read])
    rest = iter(tensors[first + segment.read :])
    gating: list[Tensor | None] = [*hidden, *[None] * (len(segment.stages) - len(hidden))]
    for i in segment.gates_apart:
        gating[i] = next(rest)
    normed = {}
    for i, norm in ctx.norms.items():
        normed[i] = norm, norms.Kept(*[next(rest) for _ in norms.Kept._fields])
    return output, Saved(as_matrix(x), hidden, gating, normed, weights)


def _with_rows(h: Tensor, x: Tensor) -> Tensor:
    """Returns [M, n] with the rows of x, [*rows, k]; no view to autograd."""
    return h if x.dim() == 2 else torch.ops.aten._unsafe_view(h, [*x.shape[:-1], h.shape[1]])


def _view(h: Tensor, x: Tensor) -> Tensor:
    """Returns a view of [M, n] with the rows of x."""
    return h.view_as(h) if x.dim() == 2 else h.view(*x.shape[:-1], h.shape[1])


def gate_reads(output: Tensor) -> Tensor:
    """Returns what the gate of an output reads, of its shape: f(a), or a."""
    node: Any = output.grad_fn
    of_gate: Any = GateNode._backward_cls
    if isinstance(node, of_gate):
        saved: Tensor = node.saved_tensors[0]
        return saved
    read = _unpacked(node)[1].gating[output.output_nr]
    return output.detach() if read is None else read.view(output.shape)


class GateNode(Function):
    """Returns h = f(a), computed already by the kernels, behind a layer's own product; and a token
    where h may become a point.

    A view, as of a segment. Not one node with the layer, so that the gradient of h is freed before
    the layer's own are made: one node holds both, and put the peak of a step of a CNN above
    backprop's (49 against 44 MiB).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, h: Tensor, saved: Tensor, gate: Gate, receiver: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h if saved is None else saved)
        ctx.gate, ctx.receiver = gate, receiver
        # A view of the same strides; batch norm's backward in PyTorch 2.13 is wrong for others.
        h = torch.ops.aten.alias(h)
        return h if receiver is None else (h, h.new_empty(()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, announced: Tensor | None = None) -> Any:
        (saved,) = ctx.saved_tensors
        reads, delta = samples_as_rows(saved, saved), None
        if announced is not None:
            broadcast, (number,) = ctx.receiver.broadcast, ctx.receiver.numbers
            product = broadcast.products[number]
            if product.gate is not None:
                (delta,), _ = broadcast.deltas([number], [reads], [ctx.gate])
            else:
                fed = product.shaped(broadcast.feedback(number), saved.shape)
                grad = fed if grad is None else grad + fed
        if grad is not None:
            true, _ = ops.gate(samples_as_rows(grad, saved), reads, *ctx.gate)
            delta = true if delta is None else delta + true
        return None if delta is None else rows_as_samples(delta, saved), None, None, None, None


def samples_as_rows(x: Tensor, like: Tensor) -> Tensor:
    """Returns [N, C, *S] as [N, C S], or as [N, S C] where `like` lies like that in memory."""
    return (x if like.is_contiguous() else x.movedim(1, -1)).flatten(1)


def rows_as_samples(rows: Tensor, like: Tensor) -> Tensor:
    """Returns the inverse of `samples_as_rows`."""
    if like.is_contiguous():
        return rows.view(like.shape)
    return rows.view(like.movedim(1, -1).shape).movedim(-1, 1)


class Token(Function):
    """Holds the place of x in the graph at this moment, without holding its memory.

    (x itself would do, but for a later modification in place, which moves x to another place in the
    graph.) A gradient of the token announces the feedback, which goes on to x: of [*rows, n], where
    x has positions, to every one of them, divided by the square root of their number, so that a
    row's is as long as without positions (so does TinyDFA, arXiv 2006.12878). Positions are the
    dimensions behind the rows other than `features`, of size n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Any, features: Any, receiver: Any) -> Any:
        ctx.rows, ctx.features, ctx.receiver = rows, features, receiver
        ctx.shape = x.shape
        return x.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, announced: Tensor) -> Any:
        rows, features, shape = ctx.rows, ctx.features, ctx.shape
        broadcast, (number,) = ctx.receiver.broadcast, ctx.receiver.numbers
        fed = shape if features is None else (*shape[:rows], shape[features])
        feedback = broadcast.products[number].shaped(broadcast.feedback(number), fed)
        if features is not None:
            feedback = spread(feedback, shape, rows, features)
        return feedback, None, None, None


def spread(feedback: Tensor, shape: torch.Size, rows: int, features: int) -> Tensor:
    """Returns a feedback [*rows, n] at every position of a tensor of this shape; see `Token`."""
    positions = shape[rows:features] + shape[features + 1 :]
    one = feedback.div(prod(positions) ** 0.5).view(*feedback.shape, *[1] * len(positions))
    return one.movedim(rows, features).expand(shape)


class Sending(NamedTuple):
    """Says how the root of a pass sends its error.

    Attributes:
        broadcast: what nodes ask for their feedback.
        sender: what makes a signal of the error; None where that is the error itself.
        learning: how matrices learn from the error; None where none does.
        learnt: how many matrices learn.
    """

    broadcast: Broadcast
    sender: Sender | None
    learning: Learning | None
    learnt: int


class RootNode(Function):
    """Passes the output y through; in backward begins the broadcast of its error, and gives the
    matrices that learn their gradients.

    The tensors after the target: what the points read, then the matrices, where these learn; and
    the tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sending: Sending,
        y: Tensor,
        output: Tensor | None,
        low: Tensor | None,
        target: Tensor | None,
        *tensors: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.sending, ctx.count = sending, len(tensors)
        saved = 2 * sending.learnt
        ctx.places = [(token.dtype, token.device) for token in tensors[saved:]]
        ctx.save_for_backward(output, low, target, *tensors[:saved])
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor | None) -> Any:
        sending = ctx.sending
        if error is None:
            return (None,) * (5 + ctx.count)
        output, low, target, *tensors = ctx.saved_tensors
        reads, learnt = tensors[: sending.learnt], tensors[sending.learnt :]
        grads: list[Tensor | None] = []
        e, low_grad = as_matrix(error), None
        if sending.learning is not None:
            low_grad, grads = learning_gradients(sending.learning, e, target, low, reads, learnt)
        sent = e
        if sending.sender is not None:
            sender = sending.sender._replace(low=low, target=target)
            sent = sender.of(error, output)
        sending.broadcast.begin(sent)
        nothing = [None] * sending.learnt
        return None, error, None, low_grad, None, *nothing, *grads, *_announcements(e, ctx.places)


def _announcements(e: Tensor, places: Sequence[tuple[torch.dtype, torch.device]]) -> list[Tensor]:
    """Returns a zero for every token, one for all of a dtype on a device."""
    zeros = {}
    for place in places:
        if place not in zeros:
            zeros[place] = e.new_zeros((), dtype=place[0], device=place[1])
    return [zeros[place] for place in places]


class BackwardWeight(Protocol):
    """Makes what the input gradient of a layer reads in the place of its weight."""

    def of(self, weight: Tensor) -> Tensor:
        """Returns a matrix of the shape and dtype of the weight; called in backward."""


class InputGradient(Function):
    """Passes on what a layer has made of its detached input x; in backward that input receives the
    gradient that another matrix than the weight makes.

    It saves nothing that a hook sees: an activation checkpoint runs the layer again outside of
    every root, and demands that it saves the same tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weight: Tensor,
        backward_weight: BackwardWeight,
        input_gradient: Any,
    ) -> Any:
        ctx.weight = weight.detach()
        ctx.version = None if torch.compiler.is_compiling() else weight._version
        ctx.backward_weight, ctx.input_gradient = backward_weight, input_gradient
        ctx.x_shape = x.shape
        return torch.ops.aten._unsafe_view(y, y.shape)  # an activation in place may follow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, delta: Tensor) -> Any:
        if ctx.version is not None and ctx.weight._version != ctx.version:
            raise RuntimeError(
                "the weight of a layer was modified by an inplace operation between the forward "
                "and the backward pass of a LayerFeedback"
            )
        weight = ctx.backward_weight.of(in_dtype(ctx.weight, delta.dtype))
        return delta, ctx.input_gradient(delta, ctx.x_shape, weight), None, None, None
