"""The backward of DFA: one autograd node for each group of points broadcasts the error to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .layers import as_matrix, weight_gradient


class Target(NamedTuple):
    """One product to make: d = scale (e B) * f'. The kind is IDENTITY where autograd gates."""

    kind: int
    param: float
    scale: float
    stream: int
    features: int


class Group(NamedTuple):
    """The points that one node feeds: on one device, of one dtype.

    Tokens that agree in stream, scale and features receive the same projection, made once.
    """

    fused: tuple[Target, ...]
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

    @property
    def streams(self) -> list[int]:
        targets = self.fused + self.projections
        return [target.stream for target in (targets[:1] if self.shared else targets)]


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
        products, bias_grads = _products(group, error, tensors[:first], saved)
        grads: list[Tensor | None] = [None] * first
        for layer, x in enumerate(inputs):
            needs = ctx.needs_input_grad[2 + first + 4 * layer :]
            delta = products.pop(0)  # so that it is freed before the next weight gradient
            weight_grad = weight_gradient(delta, x) if needs[2] else None
            bias_grad = bias_grads[layer].to(ctx.bias_dtypes[layer]) if needs[3] else None
            grads += [None, None, weight_grad, bias_grad]
        for token, index in zip(tokens, group.token_projection, strict=True):
            grads.append(products[index].view(token.shape))
        return None, error, *grads


def _products(
    group: Group, error: Tensor, dense: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """The deltas of the fused layers and then the projections, [M, n_l]; the bias gradients."""
    e = as_matrix(error).to(group.device)
    targets = group.fused + group.projections
    # The identity's gate reads nothing: an expanded scalar gives shape and dtype.
    blank = e.new_empty((), dtype=group.dtype)
    products, bias_grads = ops.project_gate(
        e,
        dense,
        [as_matrix(h) for h in saved]
        + [blank.expand(e.shape[0], target.features) for target in group.projections],
        [target.kind for target in targets],
        [target.param for target in targets],
        [target.scale for target in targets],
        sum_error=group.sum_error,
        seed=group.seed,
        streams=group.streams,
        distribution=group.distribution,
        allow_tf32=group.allow_tf32,
    )
    return list(products), bias_grads
