"""Checks the arguments of the ops, and names the one that does not fit.

The compiled ops check their own arguments, at a hundredth of the cost. These checks run where plain
PyTorch computes, and after a compiled op has refused, as its errors are all RuntimeErrors.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from ..activations import FIRST_KIND_FROM_INPUT, KINDS
from .reference import accumulation_dtype

DISTRIBUTIONS = ("normal", "uniform", "rademacher")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OWN_OR_WIDE = {dtype: (accumulation_dtype(dtype), dtype) for dtype in _DTYPES}


def distribution_code(name: str) -> int:
    """Returns the number by which the compiled ops know a distribution."""
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {name!r}")
    return DISTRIBUTIONS.index(name)


def check_dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype] = _DTYPES) -> None:
    """Raises a TypeError unless x is a tensor of one of these dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in allowed:
        names = " or ".join(dict.fromkeys(map(str, allowed)))
        raise TypeError(f"{name} must be {names}, got {x.dtype}")


def check_device(name: str, x: Tensor, other: Tensor) -> None:
    """Raises a ValueError unless both tensors are on one device."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {x.device}")


def check_matrix(name: str, x: Tensor, allowed: Sequence[torch.dtype] = _DTYPES) -> None:
    """Raises a TypeError or ValueError unless x is a matrix of one of these dtypes."""
    check_dtype(name, x, allowed)
    if x.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(x.shape)}")


def check_like(name: str, x: Tensor, other: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless x is a matrix of this shape, and of the dtype and device of the other one."""
    check_matrix(name, x, (other.dtype,))
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    check_device(name, x, other)


def check_bias(x: Tensor, bias: Tensor) -> None:
    """Raises unless the bias [n] can be added to x [..., n]."""
    _check_vectors(x, x.shape[-1] if x.dim() else None, bias=bias)


def check_kinds(kinds: Sequence[int], params: Sequence[float], allowed: Sequence[str]) -> None:
    """Raises a ValueError unless all activations are among the first ones that are `allowed`."""
    for kind, param in zip(kinds, params, strict=True):
        if not 0 <= kind < len(allowed):
            names = ", ".join(allowed)
            raise ValueError(f"kind must be 0 to {len(allowed) - 1} ({names}), got {kind}")
        if kind and param < 0:
            raise ValueError(f"param of {KINDS[kind]} must not be negative, got {param}")


def check_project_gate(
    error: Tensor,
    feedback: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
    scales: Sequence[float],
    streams: Sequence[int],
) -> None:
    """Raises unless `project_gate` can be computed of these arguments."""
    check_matrix("error", error)
    layers = len(saved)
    _check_lengths(layers, "saved", kinds=kinds, params=params, scales=scales)
    check_kinds(kinds, params, KINDS)
    for name, count in (("feedback", len(feedback)), ("streams", len(streams))):
        if count not in (0, 1, layers):
            raise ValueError(f"{name} must have 1 or {layers} entries, got {count}")
    if not feedback and not streams:
        raise ValueError("streams must not be empty where feedback is")
    for i, h in enumerate(saved):
        check_matrix(f"saved[{i}]", h, (saved[0].dtype,) if i else _DTYPES)
        _check_rows(f"saved[{i}]", h, error.shape[0], "the error")
    for i, matrix in enumerate(feedback if saved else []):
        allowed = (feedback[0].dtype,) if i else _OWN_OR_WIDE[saved[0].dtype]
        check_matrix(f"feedback[{i}]", matrix, allowed)
        readers = saved if len(feedback) == 1 else [saved[i]]
        rows, columns = error.shape[1], max(h.shape[1] for h in readers)
        if matrix.shape[0] != rows or matrix.shape[1] < columns:
            expected, got = f"[{rows}, >= {columns}]", tuple(matrix.shape)
            raise ValueError(f"feedback[{i}] must have shape {expected}, got {got}")
    check_devices(error, saved=saved, feedback=feedback)


def check_backpropagate(
    delta: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
) -> None:
    """Raises unless `backpropagate` can be computed of these arguments."""
    check_matrix("delta", delta)
    _check_lengths(len(weights), "weights", saved=saved, kinds=kinds, params=params)
    check_kinds(kinds, params, KINDS)
    above = delta.shape[1]
    for i, (weight, h) in enumerate(zip(weights, saved, strict=True)):
        allowed = (weights[0].dtype,) if i else _OWN_OR_WIDE[delta.dtype]
        check_matrix(f"weights[{i}]", weight, allowed)
        _check_rows(f"weights[{i}]", weight, above, "the delta above it has columns")
        above = weight.shape[1]
        check_like(f"saved[{i}]", h, delta, (delta.shape[0], above))
    check_devices(delta, weights=weights)


def check_batch_norm(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    kind: int,
    param: float,
) -> None:
    """Raises unless `batch_norm` can be computed of these arguments.

    Of too few rows it says what torch does.
    """
    check_matrix("a", a)
    check_kinds([kind], [param], KINDS[:FIRST_KIND_FROM_INPUT])
    if training and len(a) < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {a.shape}"
        )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or none")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var must be given where training is false")
    running = {"running_mean": running_mean, "running_var": running_var}
    _check_vectors(a, a.shape[1], weight=weight, bias=bias, **running)


def check_batch_norm_backward(
    delta: Tensor,
    delta_sums: Tensor,
    a: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> None:
    """Raises unless `batch_norm_backward_` can be computed of these arguments."""
    _check_overwritten(delta, a)
    statistics = {"delta_sums": delta_sums, "mean": mean, "rstd": rstd}
    _check_vectors(delta, delta.shape[1], weight=weight, **statistics)


def check_layer_norm(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: int, param: float
) -> None:
    """Raises unless `layer_norm` can be computed of these arguments."""
    check_matrix("a", a)
    check_kinds([kind], [param], KINDS[:FIRST_KIND_FROM_INPUT])
    _check_columns("a", a)
    _check_vectors(a, a.shape[1], weight=weight, bias=bias)


def check_layer_norm_backward(
    delta: Tensor, a: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> None:
    """Raises unless `layer_norm_backward_` can be computed of these arguments."""
    _check_overwritten(delta, a)
    _check_columns("delta", delta)
    _check_vectors(delta, len(delta), mean=mean, rstd=rstd)
    _check_vectors(delta, delta.shape[1], weight=weight)


def _check_overwritten(delta: Tensor, a: Tensor) -> None:
    """Raises unless delta is a matrix like a that can be overwritten row by row."""
    check_matrix("delta", delta)
    check_like("a", a, delta, delta.shape)
    if delta.shape[1] > 1 and delta.stride(1) != 1:
        raise ValueError(f"delta must have contiguous rows, got strides {tuple(delta.stride())}")


def _check_columns(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} must have columns, got shape {tuple(tensor.shape)}")


def _check_vectors(x: Tensor, size: int | None, **vectors: Tensor | None) -> None:
    """Raises unless each vector that is given has `size` entries, and fits to x."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_dtype(name, vector, _OWN_OR_WIDE[x.dtype])
        if vector.dim() != 1 or vector.shape[0] != size:
            raise ValueError(f"{name} must have shape [{size}], got {tuple(vector.shape)}")
        check_device(name, vector, x)


def check_devices(first: Tensor, **lists: Sequence[Tensor]) -> None:
    """Raises a ValueError unless all tensors of the lists are on the device of the first one.

    The fakes need it: one tensor on the meta device takes a call there, whatever the others are on.
    """
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            check_device(f"{name}[{i}]", x, first)


def _check_lengths(count: int, of: str, **lists: Sized) -> None:
    for name, values in lists.items():
        if len(values) != count:
            raise ValueError(
                f"{name} must have one entry for each of {count} {of}, got {len(values)}"
            )


def _check_rows(name: str, x: Tensor, rows: int, of: str) -> None:
    if x.shape[0] != rows:
        raise ValueError(
            f"{name} must have {rows} rows, as many as {of}, got shape {tuple(x.shape)}"
        )
