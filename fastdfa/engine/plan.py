"""Plans the products by which the points of a forward pass receive their feedback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from operator import index
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..feedback.bank import Bank, Layout, Settled, Size
from .broadcast import Alike, Broadcast, Call, Drawn, Product
from .nodes import spread
from .tape import Point


class AnyPoint(Protocol):
    """Says what plans and checks ask of a feedback point: a `Point`, or what stands for one."""

    @property
    def layer(self) -> nn.Module: ...

    @property
    def tensor(self) -> Tensor: ...

    @property
    def rows(self) -> int | None: ...

    @property
    def features(self) -> int | None: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def edge(self) -> Any: ...

    @property
    def version(self) -> int | None: ...


class Plan(NamedTuple):
    """Holds what a forward pass has in common with others of the same `key`."""

    key: Any
    layout: Layout
    drawn: Drawn
    products: list[Product]  # of every point
    dense: list[Tensor | None]
    alike: Alike
    calls: dict[tuple[int, ...], Call]  # see `Broadcast`

    def broadcast(self) -> Broadcast:
        """Returns what makes the feedback in the backward passes of one forward pass."""
        return Broadcast(self.drawn, self.products, self.dense, self.alike, self.calls)


def key_of(points: Sequence[Point], y: Tensor) -> tuple[Any, ...]:
    """Returns all that the plan of a forward pass follows from, but for the bank.

    By it a step finds its plan at a tenth of the cost of making one (32 layers).
    """
    parts: list[Any] = [y.shape, y.device]
    for point in points:
        x, run = point.tensor, point.run
        gate = None if run is None else run.gates[point.place]
        parts += (point.layer, point.rows, point.features, gate)
        parts += (x.shape, x.stride(), x.dtype, x.device)
    return tuple(parts)


def lay_out(points: Sequence[AnyPoint], names: Sequence[str], y: Tensor, classes: int) -> Layout:
    """Returns the sizes of a pass.

    Raises:
        ValueError: where the rows of a point are not those of y.
    """
    sizes = tuple(
        Size(name, features_of(point, name, y), point.tensor.dtype, point.tensor.device)
        for point, name in zip(points, names, strict=True)
    )
    return Layout(classes, sizes)


def names_of(layers: Sequence[nn.Module], names: dict[nn.Module, str]) -> list[str]:
    """Returns the names of the points that layers read, with "#2" and so on for the second call."""
    calls: Counter[str] = Counter()
    found: list[str] = []
    for layer in layers:
        name = names.get(layer, type(layer).__name__)
        calls[name] += 1
        found.append(name if calls[name] == 1 else f"{name}#{calls[name]}")
    return found


def product_of(
    point: Point, y: Tensor, settled: Settled, bank: Bank, layout: Layout, projected: bool
) -> Product:
    """Returns the product for a point, with the gate of the run that receives it, if that fits.

    y tells the rows of the error.
    """
    _, features, dtype, device = settled.size
    order = order_of(point, y, bank, layout, projected)
    gate, run = None, point.run
    if run is not None:
        rows = y.shape[:-1]
        by_rows = point.tensor.shape[:-1] == rows if run.by_rows else point.tensor.shape[:1] == rows
        in_order = bool(order) or point.tensor.is_contiguous()
        gate = run.gates[point.place] if by_rows and in_order else None
    return Product(gate, settled.scale, settled.stream, features, order, dtype, device)


def order_of(
    point: Point, y: Tensor, bank: Bank, layout: Layout, projected: bool
) -> tuple[int, ...]:
    """Returns the sizes (C, *S) of a point whose B is kept, so that its columns can lie as the
    point does, as [*S, C]; else ()."""
    kept = not projected and bank.keeps(layout, point.tensor.dtype)
    return _channels_last(point, y) if kept else ()


def _channels_last(point: Point, y: Tensor) -> tuple[int, ...]:
    """Returns the sizes (C, *S) of a point whose samples lie as [*S, C] and are flattened."""
    x = point.tensor
    if x.dim() < 3 or y.dim() != 2 or point.rows not in (None, 1) or point.features is not None:
        return ()
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return ()
    return tuple(index(size) for size in x.shape[1:])


def feedback_at(broadcast: Broadcast, number: int, point: Point) -> Tensor:
    """Returns the feedback that a point receives, of the shape of its tensor."""
    made = broadcast.products[number].shaped(broadcast.feedback(number), point.shape)
    if point.features is None:
        return made
    rows = 1 if point.rows is None else point.rows
    return spread(made, point.tensor.shape, rows, point.features)


def what_is_read(point: Point, rows: int) -> Tensor:
    """Returns what a point reads, [M, n_l]."""
    return in_rows(point.tensor.detach(), rows, point.rows, point.features)


def in_rows(x: Tensor, rows: int, leading: int | None, features: int | None) -> Tensor:
    """Returns what is at a point, or its gradient, as [M, n_l]: of its positions the sum over the
    square root of their number, which is what its feedback is to each (see `nodes.Token`)."""
    if features is None:
        return x.reshape(rows, -1)
    leading = 1 if leading is None else leading
    x = x.movedim(features, leading).flatten(leading + 1)
    return x.sum(-1).div(x.shape[-1] ** 0.5).reshape(rows, -1)


def features_of(point: AnyPoint, name: str, y: Tensor) -> int:
    """Returns n_l of a point: its rows must be those of the error, the rest is features.

    By `index`, as a compiled step with dynamic shapes must still take B's size as a constant.
    """
    shape, rows = point.shape, y.shape[:-1]
    if point.rows is not None:
        if prod(shape[: point.rows]) == prod(rows):
            return index(prod(shape[point.rows :]))
    elif shape[:-1] == rows:
        return index(shape[-1])
    elif y.dim() == 2 and len(shape) > 0 and shape[0] == y.shape[0]:
        return index(prod(shape[1:]))
    advice = "fastdfa.FeedbackPoint(rows=k) says which dimensions are rows"
    if y.dim() == 1:  # never taken as one row, as it usually was [N, 1] and lost a dimension
        advice = "an output of one value a row must have shape [N, 1]"
    elif y.dim() > 2 and shape[:1] + shape[2:] == y.shape[:1] + y.shape[2:]:
        advice = (
            "where every position has an error of its own, features come last, in front of a "
            "fastdfa.FeedbackPoint and at the output: movedim(1, -1)"
        )
    raise ValueError(
        f"feedback point {name!r}: expected a tensor whose rows are those of the error, "
        f"[{', '.join(map(str, rows))}], got shape {tuple(shape)} for an output of shape "
        f"{tuple(y.shape)}; {advice}"
    )
