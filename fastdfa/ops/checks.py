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


def distribution_code(name: str) -> int:
    """Returns the number by which the compiled ops know a distribution."""
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {name!r}")
    return DISTRIBUTIONS.index(name)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raises a TypeError for what is not a tensor of a floating dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_matrix(name: str, tensor: Tensor) -> None:
    """Raises a TypeError or ValueError for what is not a matrix of a floating dtype."""
    check_dtype(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")


def check_like(name: str, tensor: Tensor, other: Tensor, shape: torch.Size) -> None:
    """Raises unless the tensor has this shape, and the dtype and device of the other one."""
    check_matrix(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must be {other.dtype}, got {tensor.dtype}")
    check_device(name, tensor, other)


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    """Raises a ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {tensor.device}")


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
    one_or_each: tuple[tuple[str, Sized], ...] = (("feedback", feedback), ("streams", streams))
    for name, values in one_or_each:
        if values and len(values) not in (1, layers):
            raise ValueError(f"{name} must have 1 or {layers} entries, got {len(values)}")
    if not feedback and not streams:
        raise ValueError("streams must not be empty where feedback is")
    for layer, h in enumerate(saved):
        check_matrix(f"saved[{layer}]", h)
        check_like(f"saved[{layer}]", h, saved[0], torch.Size((error.shape[0], h.shape[1])))
        check_device(f"saved[{layer}]", h, error)
    for index, matrix in enumerate(feedback):
        readers = saved if len(feedback) == 1 else saved[index : index + 1]
        _check_feedback(index, matrix, error, readers)
        if matrix.dtype != feedback[0].dtype:
            raise TypeError(f"feedback[{index}] must be {feedback[0].dtype}, got {matrix.dtype}")


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
        name = f"weights[{i}]"
        check_matrix(name, weight)
        if weight.shape[0] != above:
            raise ValueError(
                f"{name} must have {above} rows, as many as the delta above it has columns, "
                f"got shape {tuple(weight.shape)}"
            )
        _check_own_or_wide(name, weight, delta.dtype)
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"{name} must be {weights[0].dtype}, got {weight.dtype}")
        check_device(name, weight, delta)
        above = weight.shape[1]
        check_like(f"saved[{i}]", h, delta, torch.Size((delta.shape[0], above)))


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
        if vector.dim() != 1 or vector.shape[0] != size:
            raise ValueError(f"{name} must have shape [{size}], got {tuple(vector.shape)}")
        _check_own_or_wide(name, vector, x.dtype)
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


def _check_own_or_wide(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises a TypeError unless the tensor is of this dtype or of its accumulation dtype."""
    allowed = dict.fromkeys((dtype, accumulation_dtype(dtype)))
    if tensor.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise TypeError(f"{name} must be {names}, got {tensor.dtype}")


def _check_feedback(index: int, matrix: Tensor, error: Tensor, readers: Sequence[Tensor]) -> None:
    name = f"feedback[{index}]"
    check_matrix(name, matrix)
    columns = max([0, *[h.shape[1] for h in readers]])
    if matrix.shape[0] != error.shape[1] or matrix.shape[1] < columns:
        raise ValueError(
            f"{name} must have shape [{error.shape[1]}, >= {columns}], got {tuple(matrix.shape)}"
        )
    for h in readers:
        allowed = dict.fromkeys((accumulation_dtype(h.dtype), h.dtype))
        if matrix.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise TypeError(f"{name} must be {names}, got {matrix.dtype}")
    check_device(name, matrix, error)
