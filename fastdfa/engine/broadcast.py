"""The backward of DFA: one autograd node for each group of points broadcasts the error to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from .. import ops, signals
from ..activations import IDENTITY
from ..projectors import Projected, Projector
from ..signals import Signal
from .fused import as_matrix
from .tape import Affine, Chain, Fed

# Up to here a projection is made as fast as memory takes it, and anew for each point that is fed in
# turn: one that is kept for the next adds to the peak of a step (16.2 MiB against backprop's 13.5
# at a GCN of four layers, 2708 x 256).
_FEW_CLASSES = 16


class Target(NamedTuple):
    """One product to make: d = scale (e B) * f'. The kind is IDENTITY where autograd gates."""

    kind: int
    param: float
    scale: float
    stream: int
    features: int
    channels_last: tuple[int, ...] = ()  # sizes (C, *S) of a point that lies as [*S, C] in memory

    def shaped(self, product: Tensor, shape: torch.Size) -> Tensor:
        """The matrix d as a tensor of the point's shape, and in its memory format."""
        if not self.channels_last:
            return product.view(shape)
        channels, *positions = self.channels_last
        return product.view(-1, *positions, channels).movedim(-1, 1)


class Group(NamedTuple):
    """The points that one node feeds: on one device, of one dtype.

    Tokens that agree in stream, scale and features receive the same projection, made once.
    """

    fused: tuple[Target, ...]
    affine: tuple[Affine, ...]  # of each fused layer
    projections: tuple[Target, ...]
    token_projection: tuple[int, ...]  # for each token, an index into `projections`
    dtype: torch.dtype
    device: torch.device
    seed: int
    distribution: str
    shared: bool
    sum_error: bool
    allow_tf32: bool
    dense: int  # how many dense matrices come with it: one if shared, one a target, or none
    projected: bool  # whether what is sent is projected already, by a projector


class Broadcast(torch.autograd.Function):
    """Passes the output y through; in backward feeds the error to a group of points.

    The tensors after y: the dense matrices; of every fused layer saved, input, weight, bias; the
    tokens. A fused layer gets its weight and bias gradients here, so that its delta lives no
    longer than the group; a token gets the projection.
    """

    @staticmethod
    def forward(ctx, group: Group, y: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.group = group
        ctx.count = len(tensors)
        split = group.dense + 4 * len(group.fused)
        layers = tensors[group.dense : split]
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in layers[3::4]]
        # The tokens hold no memory: they tell the shapes.
        ctx.save_for_backward(
            *tensors[: group.dense], *layers[0::4], *layers[1::4], *tensors[split:]
        )
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, error: Tensor | None):
        if error is None:
            return None, None, *[None] * ctx.count
        group, tensors = ctx.group, ctx.saved_tensors
        first, layers = group.dense, len(group.fused)
        saved = tensors[first : first + layers]
        inputs = tensors[first + layers : first + 2 * layers]
        tokens = tensors[first + 2 * layers :]
        e = as_matrix(error)
        # The identity's gate reads nothing: an expanded scalar gives shape and dtype.
        blank = e.new_empty((), dtype=group.dtype)
        made, bias_sums = products(
            group,
            e,
            tensors[:first],
            group.fused + group.projections,
            [affine.matrix(h, h) for affine, h in zip(group.affine, saved, strict=True)]
            + [blank.expand(e.shape[0], target.features) for target in group.projections],
        )
        grads: list[Tensor | None] = [None] * first
        needs = ctx.needs_input_grad[2 + first :]
        weight_grads = _weight_gradients(group.affine, made, saved, inputs, needs[2::4])
        for layer, (affine, h, dtype) in enumerate(
            zip(group.affine, saved, ctx.bias_dtypes, strict=True)
        ):
            bias_grad = None
            if needs[4 * layer + 3]:
                bias_grad = affine.bias_gradient(bias_sums[layer], h).to(dtype)
            grads += [None, None, weight_grads[layer], bias_grad]
        for token, index in zip(tokens, group.token_projection, strict=True):
            grads.append(group.projections[index].shaped(made[layers + index], token.shape))
        return None, error, *grads


def _weight_gradients(
    maps: Sequence[Affine],
    deltas: list[Tensor],
    saved: Sequence[Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Of each layer that needs one; of those that have one map together."""
    grads: list[Tensor | None] = [None] * len(maps)
    for affine in dict.fromkeys(maps):
        layers = [i for i, each in enumerate(maps) if each == affine and needed[i]]
        columns = ([values[layer] for layer in layers] for values in (deltas, saved, inputs))
        for layer, grad in zip(layers, affine.weight_gradients(*columns), strict=True):
            grads[layer] = grad
    return grads


class BroadcastInTurn(torch.autograd.Function):
    """As `Broadcast`, but every point is fed when autograd comes to it.

    Nodes at the output run before all that is below, so `Broadcast` would make every projection
    while all activations are still there. Not traced: a hook of the node that receives a feedback
    makes it, from what this node has left behind.

    The tensors after y: the dense matrices; of every point the token, or the output of a layer
    that gates its own feedback.
    """

    @staticmethod
    def forward(
        ctx,
        group: Group,
        fed: list[Fed | None],
        pending: Pending | None,
        y: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.feedback = _InTurn(group, tensors[: group.dense], pending)
        receivers = tensors[group.dense :]
        ctx.shapes = [receiver.shape for receiver in receivers]
        for receiver, index, layer in zip(receivers, group.token_projection, fed, strict=True):
            hook = partial(ctx.feedback.feed, index, layer, receiver.output_nr)
            receiver.grad_fn.register_prehook(hook)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, error: Tensor | None):
        grads: list[Tensor | None] = [None] * (ctx.feedback.group.dense + len(ctx.shapes))
        if error is not None:
            blank = ctx.feedback.begin(error)
            grads[ctx.feedback.group.dense :] = [blank.expand(shape) for shape in ctx.shapes]
        return None, None, None, error, *grads


def announce(y: Tensor, chains: list[tuple[Chain, Group, list[Tensor]]]) -> Tensor:
    """y, whose error is left in backward with chains, which make the feedback of their layers."""
    announced = _Announced()
    for chain, group, dense in chains:
        chain.fed.append(ChainFeedback(group, dense, announced))
    return _Announce.apply(announced, y, *[chain.token for chain, _, _ in chains])


class _Announce(torch.autograd.Function):
    """Passes the output y through; behind it the tokens of chains."""

    @staticmethod
    def forward(ctx, announced: _Announced, y: Tensor, *tokens: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.announced, ctx.dtypes = announced, [token.dtype for token in tokens]
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, error: Tensor | None):
        if error is None:
            return None, None, *[None] * len(ctx.dtypes)
        ctx.announced.begin(error)
        return None, error, *[error.new_zeros((), dtype=dtype) for dtype in ctx.dtypes]


class _Announced:
    """The error of one backward pass, until its end."""

    error: Tensor | None = None

    def begin(self, error: Tensor) -> None:
        self.error = as_matrix(error.detach())
        Variable._execution_engine.queue_callback(self.end)

    def end(self) -> None:
        self.error = None


class ChainFeedback(NamedTuple):
    """What makes the feedback of the layers of a chain, the first len(group.fused) of them."""

    group: Group
    dense: list[Tensor]
    announced: _Announced

    @property
    def projection(self) -> tuple[Group, list[Tensor], Tensor]:
        """See `chain.Projection`, in a backward pass."""
        return self.group, self.dense, self.announced.error


class _InTurn:
    """The feedback of one backward pass, made point by point; what several share, once."""

    def __init__(self, group: Group, dense: tuple[Tensor, ...], pending: Pending | None) -> None:
        self.group = group
        self.dense = dense
        self.pending = pending
        self.end()

    def begin(self, error: Tensor) -> Tensor:
        """Keeps the error until the end of the backward pass; returns what announces a feedback."""
        self.error = as_matrix(error.detach())  # a blank where it is pending
        self.blank = error.new_zeros((), dtype=self.group.dtype)
        self.left = Counter(self.group.token_projection)
        Variable._execution_engine.queue_callback(self.end)
        return self.blank

    def end(self) -> None:
        self.error = self.blank = None
        if self.pending is not None:
            self.pending.projected = None
        self.shared: dict[int, Tensor] = {}

    def feed(
        self, index: int, layer: Fed | None, output: int, gradients: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        """Hook of the node an output of which receives a feedback, maybe among other gradients."""
        gradient = gradients[output]
        if self.error is None or gradient is None:
            return None
        # A gradient to be differentiated again is one too: it leads to the error that refuses this.
        announced = gradient.data_ptr() == self.blank.data_ptr() and not gradient.requires_grad
        if announced and layer is not None:
            layer.append(partial(self._make, index))
            return None
        target = self.group.projections[index]
        product = target.shaped(self._projection(index), gradient.shape)
        fed = product if announced else gradient + product
        return (*gradients[:output], fed, *gradients[output + 1 :])

    def _projection(self, index: int) -> Tensor:
        self.left[index] -= 1
        product = self.shared.pop(index, None)
        if product is None:
            blank = self.blank.expand(len(self.error), self.group.projections[index].features)
            product, _ = self._make(index, blank, IDENTITY)
        if self.left[index] and self.error.shape[1] > _FEW_CLASSES:
            self.shared[index] = product
        return product

    def _make(self, index: int, saved: Tensor, kind: int | None = None) -> tuple[Tensor, Tensor]:
        """delta [M, n] and its sums [n], gated by what is saved, [M, n]."""
        target = self.group.projections[index]
        target = target if kind is None else target._replace(kind=kind)
        dense = self.dense[index : index + 1] if len(self.dense) > 1 else self.dense
        error = self.error if self.pending is None else self.pending.projected.tensor()
        (delta,), (sums,) = products(self.group, error, dense, [target], [saved])
        return delta, sums


class Pending:
    """What a projector makes for one backward pass, waited for where a point is fed first."""

    projected: Projected | None = None


class Sender(NamedTuple):
    """What is projected in place of an error: a signal of it, times Q where B = Q P; or what a
    projector makes of that.

    Then the nodes that feed points stand at a carrier, a blank [M, columns], not at the output.
    """

    signal: Signal
    low: Tensor | None  # Q [columns of the signal, rank]
    target: Tensor | None
    projector: Projector | None
    widest: int  # features of a point
    pending: Pending | None = None  # where the nodes wait for the projector

    def of(self, error: Tensor, output: Tensor | None) -> Tensor:
        """[M, columns] of an error and an output, [*rows, C], and of `target`, [M, C]."""
        made = self._unprojected(error, output)
        return made if self.projector is None else self._projected(made).tensor()

    def begin(self, error: Tensor, output: Tensor | None) -> Tensor:
        """The same where nothing is pending; else a blank, and the projector is at work."""
        if self.pending is None:
            return self.of(error, output)
        made = self._unprojected(error, output)
        self.pending.projected = self._projected(made)
        return made.new_zeros(()).expand(len(made), self.widest)

    def _unprojected(self, error: Tensor, output: Tensor | None) -> Tensor:
        output = None if output is None else as_matrix(output)
        made = signals.made(self.signal, as_matrix(error), output, self.target)
        if self.low is None and self.projector is None:
            return made
        made = made.to(torch.promote_types(made.dtype, torch.float32))
        return made if self.low is None else made @ self.low.to(made.dtype)

    def _projected(self, made: Tensor) -> Projected:
        return Projected(self.projector, made.detach(), self.widest)

    def checked(self, output: Tensor) -> Sender:
        """With the target as the rows that belong to this output; an error if it does not fit."""
        if not self.signal.needs_target and self.target is None:
            return self
        reader = f"the signal {type(self.signal).__name__}"
        return self._replace(target=signals.given(self.target, output, reader))

    def carrier(self, output: Tensor) -> Tensor:
        columns = self.signal.columns(output.shape[-1])
        if self.projector is not None:
            columns = self.widest
        elif self.low is not None:
            columns = self.low.shape[1]
        dtype = torch.promote_types(output.dtype, torch.float32)
        return output.new_empty((), dtype=dtype).expand(output.shape[:-1].numel(), columns)

    def joined(self, y: Tensor, carrier: Tensor) -> Tensor:
        """y, whose error goes on to it, and what is projected to the carrier."""
        output = y if self.signal.needs_output else None
        without = self._replace(low=None, target=None)
        return _Signalled.apply(without, y, carrier, output, self.low, self.target)


class _Signalled(torch.autograd.Function):
    """Passes y through; in backward makes what is projected of the error, for the carrier."""

    @staticmethod
    def forward(ctx, sender: Sender, y: Tensor, carrier: Tensor, output, low, target) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.sender = sender
        ctx.save_for_backward(output, low, target)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, error: Tensor | None):
        if error is None:
            return (None,) * 6
        output, low, target = ctx.saved_tensors
        sender = ctx.sender._replace(low=low, target=target)
        return None, error, sender.begin(error, output), None, None, None


class Send(torch.autograd.Function):
    """Passes y through; in backward copies the error to another device, once for all groups there.

    `there` is what those groups passed through: it stands for y on their device.
    """

    @staticmethod
    def forward(ctx, y: Tensor, there: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.device = there.device
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, error: Tensor | None):
        return error, None if error is None else error.to(ctx.device)


def products(
    group: Group,
    e: Tensor,
    dense: Sequence[Tensor],
    targets: Sequence[Target],
    saved: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The products [M, n_l] of e [M, C] for some targets of a group, and their sums over rows."""
    if group.projected:
        return _gated(e, targets, saved, len(e) if group.sum_error else 1)
    return ops.project_gate(
        e,
        dense,
        saved,
        [target.kind for target in targets],
        [target.param for target in targets],
        [target.scale for target in targets],
        sum_error=group.sum_error,
        seed=group.seed,
        streams=[target.stream for target in (targets[:1] if group.shared else targets)],
        distribution=group.distribution,
        allow_tf32=group.allow_tf32,
    )


def _gated(
    projected: Tensor, targets: Sequence[Target], saved: Sequence[Tensor], factor: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The same of what is projected, [M, >= n_l], of which every target takes its columns."""
    deltas, sums = [], []
    for target, h in zip(targets, saved, strict=True):
        feedback = projected[:, : target.features] * (factor * target.scale)
        delta, total = ops.gate(feedback.to(h.dtype), h, target.kind, target.param)
        deltas.append(delta)
        sums.append(total)
    return deltas, sums
