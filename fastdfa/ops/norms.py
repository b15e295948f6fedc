"""Offers batch and layer norm, with the activation behind them, and their backward.

Shapes: a [M, n], of which a batch norm normalises the columns and a layer norm the rows. What is
per column or row is in the dtype of a or in its accumulation dtype, what is returned in the latter.
"""

from __future__ import annotations

from torch import Tensor

from . import checks
from .loading import call


def batch_norm(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    kind: int = 0,
    param: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes h = f((a - mean) * rstd * weight + bias) by statistics of the columns.

    Args:
        a: [M, n].
        weight, bias: [n] or None each.
        running_mean, running_var: [n] each, or both None. Where `training`, they are moved in place
            by `momentum` towards the statistics of a, of the variance the unbiased one; else a is
            normalised by them.
        training: whether a is normalised by its own statistics; it must have two rows then.
        eps: what is added to the variance: rstd = 1 / sqrt(var + eps).
        kind, param: the activation, a code of `fastdfa.activations.KINDS` and its parameter; only
            those whose f' comes from the output.

    Returns:
        h [M, n], mean [n] and rstd [n].

    Raises:
        ValueError, TypeError: where shapes, dtypes or devices do not fit.
    """
    arguments = (
        a, weight, bias, running_mean, running_var, training, momentum, eps, kind, param
    )  # fmt: skip
    made: tuple[Tensor, Tensor, Tensor] = call("batch_norm", arguments, checks.check_batch_norm)
    return made


def batch_norm_backward_(
    delta: Tensor,
    delta_sums: Tensor,
    a: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Replaces the gradient of a batch norm's output by that of its input a.

    Args:
        delta: [M, n] with contiguous rows, behind the gate of the activation; overwritten.
        delta_sums: [n], of the rows of delta, as `project_gate` returns them: the gradient of the
            norm's bias.
        a, mean, rstd, weight, training: of `batch_norm`.

    Returns:
        The gradient of the weight [n], and the sum [n] of the rows of the gradient of a.

    Raises:
        ValueError, TypeError: where shapes, dtypes or devices do not fit.
    """
    arguments = (delta, delta_sums, a, mean, rstd, weight, training)
    made: tuple[Tensor, Tensor] = call(
        "batch_norm_backward_", arguments, checks.check_batch_norm_backward
    )
    return made


def layer_norm(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: int = 0,
    param: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes h = f((a - mean) * rstd * weight + bias) by statistics of the rows.

    Args:
        a: [M, n], where n > 0.
        weight, bias: [n] or None each.
        eps, kind, param: as of `batch_norm`.

    Returns:
        h [M, n], mean [M] and rstd [M].

    Raises:
        ValueError, TypeError: where shapes, dtypes or devices do not fit.
    """
    arguments = (a, weight, bias, eps, kind, param)
    made: tuple[Tensor, Tensor, Tensor] = call("layer_norm", arguments, checks.check_layer_norm)
    return made


def layer_norm_backward_(
    delta: Tensor, a: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Replaces the gradient of a layer norm's output by that of its input a.

    Args:
        delta: [M, n] with contiguous rows, behind the gate of the activation; overwritten.
        a, mean, rstd, weight: of `layer_norm`.

    Returns:
        The gradient of the weight [n], and the sum [n] of the rows of the gradient of a.

    Raises:
        ValueError, TypeError: where shapes, dtypes or devices do not fit.
    """
    arguments = (delta, a, mean, rstd, weight)
    made: tuple[Tensor, Tensor] = call(
        "layer_norm_backward_", arguments, checks.check_layer_norm_backward
    )
    return made
