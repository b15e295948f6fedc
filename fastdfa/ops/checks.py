"""Checks the arguments of the ops, and names the one that does not fit.

`check_foo` takes the arguments of the op `foo` as its schema has them. What they refuse the
compiled ops refuse as well (csrc/ops): `loading.checked` says which of the two is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized

import torch
from torch import Tensor

from ..activations import FIRST_KIND_FROM_INPUT, KINDS
from .reference import accumulation_dtype

DISTRIBUTIONS = ("normal", "uniform", "rademacher")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MOST_ELEMENTS = 2**40  # as in csrc/ops/call.h
_OWN_OR_WIDE = {dtype: (accumulation_dtype(dtype), dtype) for dtype in _DTYPES}


def distribution_code(name: str) -> int:
    """Returns the number by which the compiled ops know a distribution."""
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {name!r}")
    return DISTRIBUTIONS.index(name)


def check_operand(name: str, x: Tensor, allowed: Sequence[torch.dtype] = _DTYPES) -> None:
    """Raises unless x is a dense tensor of one of these dtypes whose memory is there.

    Every operand of every op comes here first, as in csrc/ops/call.h.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got a {kind}")
    if x.numel() > _MOST_ELEMENTS:
        raise ValueError(f"{name} must have at most 2^40 elements, got shape {tuple(x.shape)}")
    _check_storage(name, x)
    if x.dtype not in allowed:
        names = " or ".join(dict.fromkeys(map(str, allowed)))
        raise TypeError(f"{name} must be {names}, got {x.dtype}")


def _check_storage(name: str, x: Tensor) -> None:
    """Raises a ValueError where a view reaches past its storage, which may have been freed."""
    if x.numel() == 0 or not torch._C._has_storage(x):  # in a transform of torch.func it has none
        return
    first, held = x.storage_offset(), x.untyped_storage().nbytes() // x.itemsize
    if first < 0 or first + _extent(x) > held:
        raise ValueError(
            f"{name} must lie within its storage, which holds {held} elements, got shape "
            f"{tuple(x.shape)} from element {first} on: was its memory freed?"
        )


def _extent(x: Tensor, start: int = 0) -> int:
    """Counts the elements in memory from the first to the last, from dimension `start` on."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape[start:], x.stride()[start:], strict=True))


def check_device(name: str, x: Tensor, other: Tensor) -> None:
    """Raises a ValueError unless both tensors are on one device."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {x.device}")


def check_matrix(name: str, x: Tensor, allowed: Sequence[torch.dtype] = _DTYPES) -> None:
    """Raises a TypeError or ValueError unless x is a matrix of one of these dtypes."""
    check_operand(name, x, allowed)
    if x.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(x.shape)}")


def check_like(name: str, x: Tensor, other: Tensor, shape: tuple[int, ...]) -> None:
    """Raises unless x is a matrix of this shape, and of the dtype and device of the other one."""
    check_matrix(name, x, (other.dtype,))
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    check_device(name, x, other)


def check_kinds(kinds: Sequence[int], params: Sequence[float], allowed: Sequence[str]) -> None:
    """Raises a ValueError unless all activations are among the first ones that are `allowed`."""
    for kind, param in zip(kinds, params, strict=True):
        if not 0 <= kind < len(allowed):
            names = ", ".join(allowed)
            raise ValueError(f"kind must be 0 to {len(allowed) - 1} ({names}), got {kind}")
        if kind and not param >= 0:
            raise ValueError(f"param of {KINDS[kind]} must not be negative, got {param}")


def check_fill_feedback(out: Tensor, seed: int, stream: int, distribution: int) -> None:
    """Raises unless `fill_feedback_` can fill `out`."""
    check_matrix("out", out)
    check_streams(stream)
    _check_rows_side_by_side("out", out)
    _check_written({"out": out})


def check_gate(grad: Tensor, saved: Tensor, kind: int, param: float) -> None:
    """Raises unless `gate` can be computed of these arguments."""
    check_kinds([kind], [param], KINDS)
    check_matrix("grad", grad)
    check_like("saved", saved, grad, grad.shape)


def check_activate(x: Tensor, bias: Tensor | None, kind: int, param: float) -> None:
    """Raises unless `activate_` can be computed of these arguments."""
    check_kinds([kind], [param], KINDS[:FIRST_KIND_FROM_INPUT])
    check_operand("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got shape ()")
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got strides {tuple(x.stride())}")
    _check_vectors(x, x.shape[-1], bias=bias)
    _check_written({"x": x}, bias=bias)


def check_linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Sequence[int],
    params: Sequence[float],
) -> None:
    """Raises unless `linear_chain` can be computed of these arguments."""
    check_matrix("x", x)
    check_lengths(len(weights), "weights", biases=biases, kinds=kinds, params=params)
    check_kinds(kinds, params, KINDS[:FIRST_KIND_FROM_INPUT])
    columns = x.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        allowed = (weights[0].dtype,) if i else _OWN_OR_WIDE[x.dtype]
        check_matrix(f"weights[{i}]", weight, allowed)
        if weight.shape[1] != columns:
            raise ValueError(
                f"weights[{i}] must have {columns} columns, as its input has, got shape "
                f"{tuple(weight.shape)}"
            )
        columns = weight.shape[0]
        _check_vectors(x, columns, **{f"biases[{i}]": bias})
    check_one_device({"x": x, "weights": weights})


def check_weight_gradients(
    deltas: Sequence[Tensor], inputs: Sequence[Tensor], wide: bool = False
) -> None:
    """Raises unless `weight_gradients` can be computed of these arguments."""
    check_lengths(len(deltas), "deltas", inputs=inputs)
    for i, (delta, x) in enumerate(zip(deltas, inputs, strict=True)):
        check_matrix(f"deltas[{i}]", delta, (deltas[0].dtype,) if i else _DTYPES)
        check_matrix(f"inputs[{i}]", x, (delta.dtype,))
        _check_rows(f"inputs[{i}]", x, delta.shape[0], "its delta")
    check_one_device({"deltas": deltas, "inputs": inputs})


def check_project_gate(
    error: Tensor,
    feedback: Sequence[Tensor],
    seed: int,
    streams: Sequence[int],
    distribution: int,
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
    scales: Sequence[float],
    sum_error: bool,
    allow_tf32: bool,
) -> None:
    """Raises unless `project_gate` can be computed of these arguments."""
    check_matrix("error", error)
    layers = len(saved)
    check_lengths(layers, "saved", kinds=kinds, params=params, scales=scales)
    check_kinds(kinds, params, KINDS)
    for name, count in (("feedback", len(feedback)), ("streams", len(streams))):
        if count not in (0, 1, layers):
            raise ValueError(f"{name} must have 1 or {layers} entries, got {count}")
    check_streams(*streams)
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
    check_one_device({"error": error, "saved": saved, "feedback": feedback})


def check_streams(*streams: int) -> None:
    """Raises a ValueError unless each is the number of a stream of the generator."""
    for stream in streams:
        if not 0 <= stream < 2**32:
            raise ValueError(f"stream must be in 0 .. 2^32 - 1, got {stream}")


def check_backpropagate(
    delta: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
) -> None:
    """Raises unless `backpropagate` can be computed of these arguments."""
    check_matrix("delta", delta)
    check_lengths(len(weights), "weights", saved=saved, kinds=kinds, params=params)
    check_kinds(kinds, params, KINDS)
    above = delta.shape[1]
    for i, (weight, h) in enumerate(zip(weights, saved, strict=True)):
        allowed = (weights[0].dtype,) if i else _OWN_OR_WIDE[delta.dtype]
        check_matrix(f"weights[{i}]", weight, allowed)
        _check_rows(f"weights[{i}]", weight, above, "the delta above it has columns")
        above = weight.shape[1]
        check_like(f"saved[{i}]", h, delta, (delta.shape[0], above))
    check_one_device({"delta": delta, "weights": weights})


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
    if training:
        _check_written(running, a=a, weight=weight, bias=bias)


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
    _check_written({"delta": delta}, a=a, weight=weight, **statistics)


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
    _check_written({"delta": delta}, a=a, mean=mean, rstd=rstd, weight=weight)


def _check_overwritten(delta: Tensor, a: Tensor) -> None:
    """Raises unless delta is a matrix like a that can be overwritten row by row."""
    check_matrix("delta", delta)
    check_like("a", a, delta, delta.shape)
    _check_rows_side_by_side("delta", delta)


def _check_rows_side_by_side(name: str, x: Tensor) -> None:
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"{name} must have contiguous rows, got strides {tuple(x.stride())}")


def _check_written(written: Mapping[str, Tensor | None], **read: Tensor | None) -> None:
    """Raises a ValueError where an element that is written is another one too.

    `written` are the operands that an op writes, `read` the others, None where they are not given.
    """
    present = {name: x for name, x in written.items() if x is not None and x.numel()}
    others = present | {name: x for name, x in read.items() if x is not None and x.numel()}
    for i, (name, x) in enumerate(present.items()):
        if x.is_neg():
            raise ValueError(f"{name} must not be a negated view, as it is written: resolve_neg()")
        if x.shape[0] > 1 and x.stride(0) < _extent(x, 1):
            raise ValueError(
                f"the rows of {name} must not overlap, got shape {tuple(x.shape)} with stride "
                f"{x.stride(0)} between them"
            )
        for other, y in list(others.items())[i + 1 :]:
            if _meet(x, y):
                raise ValueError(f"{name} must share no memory with {other}, as it is written")


def _meet(x: Tensor, y: Tensor) -> bool:
    """Tells whether x and y may share memory. Rows as far apart may lie between each other."""
    if not (torch._C._has_storage(x) and torch._C._has_storage(y)):
        return False
    if x.untyped_storage()._cdata != y.untyped_storage()._cdata:
        return False
    begin, other_begin = (t.storage_offset() * t.itemsize for t in (x, y))
    end, other_end = begin + _extent(x) * x.itemsize, other_begin + _extent(y) * y.itemsize
    if end <= other_begin or other_end <= begin:
        return False
    row, other_row = (t.stride(0) * t.itemsize if t.shape[0] > 1 else 0 for t in (x, y))
    if row == 0 or row != other_row:
        return True
    shift = (other_begin - begin) % row
    return shift < _extent(x, 1) * x.itemsize or shift + _extent(y, 1) * y.itemsize > row


def _check_columns(name: str, tensor: Tensor) -> None:
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} must have columns, got shape {tuple(tensor.shape)}")


def _check_vectors(x: Tensor, size: int | None, **vectors: Tensor | None) -> None:
    """Raises unless each vector that is given has `size` entries, and fits to x."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_operand(name, vector, _OWN_OR_WIDE[x.dtype])
        if vector.dim() != 1 or vector.shape[0] != size:
            raise ValueError(f"{name} must have shape [{size}], got {tuple(vector.shape)}")
        check_device(name, vector, x)


def check_one_device(operands: Mapping[str, object]) -> None:
    """Raises a ValueError unless all tensors among these, and in lists, are on one device."""
    first = None
    for name, value in operands.items():
        if isinstance(value, list | tuple):
            entries = [(f"{name}[{i}]", x) for i, x in enumerate(value)]
        else:
            entries = [(name, value)]
        for entry, x in entries:
            if isinstance(x, Tensor):
                first = x if first is None else first
                check_device(entry, x, first)


def check_lengths(count: int, of: str, **lists: Sized) -> None:
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
