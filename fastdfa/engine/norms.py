"""Computes the norms between a fused layer and its activation, without calling their modules."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

KINDS = (nn.BatchNorm1d, nn.LayerNorm)
Module = nn.BatchNorm1d | nn.LayerNorm


class Kept(NamedTuple):
    """Holds what the backward of a norm reads, of its input a [M, n]."""

    a: Tensor
    mean: Tensor  # of columns by a batch norm, of rows by a layer norm
    spread: Tensor  # one over their deviation; not by own statistics: their variance
    weight: Tensor | None
    bias: Tensor | None


class Norm(NamedTuple):
    """Says how a norm was computed, as its module may be changed before backward."""

    shape: tuple[int, ...] | None  # of a layer norm
    own: bool  # whether by the statistics of what it was given
    eps: float
    trained: tuple[bool, bool]  # whether weight and bias are


def usable(module: Module, features: int, low: bool) -> bool:
    """Tells whether a module of `KINDS` norms so many features as it is done here.

    `low`: under autocast, which has layer norms in float32.
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(type(p) is not nn.Parameter for p in parameters):
        return False
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape == (features,) and not low
    buffers = (module.running_mean, module.running_var, module.num_batches_tracked)
    followed = module.track_running_stats and all(x is not None for x in buffers)
    return followed and module.num_features == features


def trained(module: Module) -> list[nn.Parameter]:
    """Returns the parameters of a norm that require grad."""
    return [p for p in (module.weight, module.bias) if _is_trained(p)]


def _is_trained(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def fewest_rows(module: Module) -> int:
    """Returns the fewest rows of a batch that is normed here; smaller ones are left to torch."""
    if isinstance(module, nn.LayerNorm):
        return 0
    return 2 if module.training else 1


def forward(module: Module, a: Tensor) -> tuple[Tensor, Norm, Kept]:
    """Returns what the module makes of a [M, n], and moves its statistics as the module does."""
    weight, bias, eps = module.weight, module.bias, module.eps
    are_trained = _is_trained(weight), _is_trained(bias)
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        out, center, spread = torch.native_layer_norm(a, shape, weight, bias, eps)
        return out, Norm(shape, True, eps, are_trained), Kept(a, center, spread, weight, bias)
    momentum: float | None = module.momentum
    mean: Any = module.running_mean  # `usable` asks for these, which torch may leave out
    variance: Any = module.running_var
    batches: Any = module.num_batches_tracked
    if module.training:
        batches.add_(1)
        if momentum is None:  # the mean over all batches
            momentum = 1.0 / float(batches)
    own, momentum = module.training, momentum or 0.0
    out, center, spread = torch.native_batch_norm(
        a, weight, bias, mean, variance, own, momentum, eps
    )
    if not own:
        center, spread = mean.clone(), variance.clone()  # a pass in training mode moves them
    return out, Norm(None, own, eps, are_trained), Kept(a, center, spread, weight, bias)


def backward(norm: Norm, delta: Tensor, kept: Kept) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradient of a from that of the norm's output, and those of `trained`."""
    a, mean, spread, weight, bias = kept
    mask = [True, *norm.trained]
    if norm.shape is not None:
        a_grad, *grads = torch.ops.aten.native_layer_norm_backward(
            delta, a, norm.shape, mean, spread, weight, bias, mask
        )
    else:
        a_grad, *grads = torch.ops.aten.native_batch_norm_backward(
            delta, a, weight, mean, spread, mean, spread, norm.own, norm.eps, mask
        )
    return a_grad, [grad for grad, made in zip(grads, norm.trained, strict=True) if made]
