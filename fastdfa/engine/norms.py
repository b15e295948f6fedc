"""Computes the norms between a fused layer and its activation, without calling their modules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..activations import IDENTITY, Gate

KINDS = (nn.BatchNorm1d, nn.LayerNorm)
Module = nn.BatchNorm1d | nn.LayerNorm


class Kept(NamedTuple):
    """Holds what the backward of a norm reads, of its input a [M, n]."""

    a: Tensor
    mean: Tensor  # of columns by a batch norm, of rows by a layer norm
    rstd: Tensor
    weight: Tensor | None


class Norm(NamedTuple):
    """Says how a norm was computed, as its module may be changed before backward."""

    of_rows: bool
    own: bool  # whether by the statistics of what it was given
    trained: tuple[torch.dtype | None, torch.dtype | None]  # dtypes of weight and bias, if they are


def usable(module: Module, features: int, low: bool) -> bool:
    """Tells whether a module of `KINDS` norms so many features as it is done here.

    `low`: under autocast, which has layer norms in float32.
    """
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(type(p) is not nn.Parameter for p in parameters):
        return False
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape == (features,) and not low
    followed = module.running_mean is not None
    return followed == (module.running_var is not None) and module.num_features == features


def trained(module: Module) -> list[nn.Parameter]:
    """Returns the parameters of a norm that require grad."""
    return [p for p in (module.weight, module.bias) if _is_trained(p)]


def _is_trained(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _by_its_own(module: nn.BatchNorm1d) -> bool:
    """Returns whether a batch norm goes by the statistics of its input."""
    return module.training or module.running_mean is None


def fewest_rows(module: Module) -> int:
    """Returns the fewest rows of a batch that is normed here; smaller ones are left to torch."""
    if isinstance(module, nn.LayerNorm):
        return 0
    return 2 if _by_its_own(module) else 1


def forward(module: Module, a: Tensor, gate: Gate) -> tuple[Tensor, Norm, Kept]:
    """Returns what the gate behind the module reads, and moves its statistics as the module does.

    For a [M, n] that is the output of the activation, or of the norm where f' comes from that.
    """
    gate = gate if gate.from_output else Gate(IDENTITY)
    weight, bias, eps = module.weight, module.bias, module.eps
    are_trained = [p.dtype if _is_trained(p) else None for p in (weight, bias)]
    if isinstance(module, nn.LayerNorm):
        own = of_rows = True
        h, mean, rstd = ops.layer_norm(a, weight, bias, eps, *gate)
    else:
        own, of_rows, momentum = _by_its_own(module), False, _momentum(module)
        read = not module.training or module.track_running_stats
        running = (module.running_mean, module.running_var) if read else (None, None)
        h, mean, rstd = ops.batch_norm(a, weight, bias, *running, own, momentum, eps, *gate)
    return h, Norm(of_rows, own, (are_trained[0], are_trained[1])), Kept(a, mean, rstd, weight)


def _momentum(module: nn.BatchNorm1d) -> float:
    """Returns how far a batch norm moves its statistics, and counts the batch."""
    momentum: float | None = module.momentum
    batches = module.num_batches_tracked
    if module.training and module.track_running_stats and batches is not None:
        batches.add_(1)
        if momentum is None:  # the mean over all batches
            return 1.0 / float(batches)
    return momentum or 0.0


def backward_(norm: Norm, delta: Tensor, sums: Tensor, kept: Kept) -> tuple[Tensor, list[Tensor]]:
    """Replaces the gradient at the norm's output by that of a.

    Args:
        norm, kept: of the forward pass.
        delta, sums: the gradient [M, n], and the sum of its rows [n].

    Returns:
        The sum of the rows of the gradient of a [n], and the gradients of `trained`.
    """
    if norm.of_rows:
        weight_grad, a_sums = ops.layer_norm_backward_(delta, *kept)
    else:
        weight_grad, a_sums = ops.batch_norm_backward_(delta, sums, *kept, norm.own)
    made = zip((weight_grad, sums), norm.trained, strict=True)
    return a_sums, [grad.to(dtype) for grad, dtype in made if dtype is not None]
