"""Tells torch the shapes and dtypes of what the compiled ops return, and how many FLOPs they take.

The first are for torch.compile and opcheck, the second for torch.utils.flop_counter. The arguments
are those of the schemas in csrc/ops.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .checks import check_one_device
from .reference import accumulation_dtype

Shape = Sequence[int]


def register() -> None:
    """Registers all fakes and FLOP formulas; the ops must have been loaded."""
    ops = torch.ops.fastdfa
    for fake in (project_gate, gate, linear_chain, weight_gradients, backpropagate):
        _register(fake.__name__, fake)
    for name in ("fill_feedback_", "activate_"):
        _register(name, lambda *args: None)  # write in place
    for norm in (batch_norm, layer_norm):
        _register(norm.__name__, norm)
        _register(f"{norm.__name__}_backward_", norm_backward)
    register_flop_formula([ops.linear_chain, ops.backpropagate])(_products_flops)
    register_flop_formula(ops.weight_gradients)(_weight_gradients_flops)


def _register(name: str, fake: Callable[..., Any]) -> None:
    """Registers a fake, which refuses operands on several devices.

    One on the meta device takes a call to the fake, whatever the others are on: then nothing would
    be computed, and nobody told.
    """
    names = [
        argument.name for argument in getattr(torch.ops.fastdfa, name).default._schema.arguments
    ]

    def checked(*args: Any) -> Any:
        try:
            check_one_device(dict(zip(names, args, strict=True)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return fake(*args)

    torch.library.register_fake(f"fastdfa::{name}", checked)


def project_gate(
    error: Tensor,
    feedback: Sequence[Tensor],
    seed: int,
    streams: Sequence[int],
    distribution: int,
    saved: Sequence[Tensor],
    *args: Any,
) -> list[Tensor]:
    deltas = [h.new_empty(h.shape) for h in saved]
    return deltas + [h.new_empty(h.shape[1], dtype=accumulation_dtype(h.dtype)) for h in saved]


def gate(grad: Tensor, saved: Tensor, kind: int, param: float) -> tuple[Tensor, Tensor]:
    bias_grad = grad.new_empty(grad.shape[1], dtype=accumulation_dtype(grad.dtype))
    return grad.new_empty(grad.shape), bias_grad


def batch_norm(a: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide, columns = accumulation_dtype(a.dtype), a.shape[1]
    statistics = a.new_empty(columns, dtype=wide), a.new_empty(columns, dtype=wide)
    return a.new_empty(a.shape), *statistics


def layer_norm(a: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide, rows = accumulation_dtype(a.dtype), a.shape[0]
    statistics = a.new_empty(rows, dtype=wide), a.new_empty(rows, dtype=wide)
    return a.new_empty(a.shape), *statistics


def norm_backward(delta: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    wide, columns = accumulation_dtype(delta.dtype), delta.shape[1]
    return delta.new_empty(columns, dtype=wide), delta.new_empty(columns, dtype=wide)


def linear_chain(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], *args: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def weight_gradients(deltas: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [
        delta.new_empty(delta.shape[1], x.shape[1], dtype=accumulation_dtype(delta.dtype))
        for delta, x in zip(deltas, inputs, strict=True)
    ]


def backpropagate(
    delta: Tensor, weights: Sequence[Tensor], saved: Sequence[Tensor], *args: Any
) -> list[Tensor]:
    widths, wide = [weight.shape[1] for weight in weights], accumulation_dtype(delta.dtype)
    deltas = [delta.new_empty(delta.shape[0], n) for n in widths]
    return deltas + [delta.new_empty(n, dtype=wide) for n in widths]


def _products_flops(x: Shape, weights: Sequence[Shape], *args: Any, **kwargs: Any) -> int:
    return sum(2 * x[0] * n * k for n, k in weights)


def _weight_gradients_flops(
    deltas: Sequence[Shape], inputs: Sequence[Shape], *args: Any, **kwargs: Any
) -> int:
    pairs = zip(deltas, inputs, strict=True)
    return sum(2 * rows * n * k for (rows, n), (_, k) in pairs)
