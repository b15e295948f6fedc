"""Holds every B of a root: generated from the seed, given, or learning."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..matrices import SHARED, Matrices, key_of
from ..ops.reference import accumulation_dtype
from ..ops.tracing import traced
from .rule import (
    LOW_RANK_STREAM,
    DenseCache,
    Feedback,
    Source,
    fits_dense,
    hash_of,
    in_channels_last,
    ready_on_every_stream,
)


class Size(NamedTuple):
    """Says what a forward pass tells of a point."""

    name: str
    features: int  # n_l
    dtype: torch.dtype
    device: torch.device


class Layout(NamedTuple):
    """Holds the sizes of a forward pass: what is projected has `classes` columns, as the error has,
    unless the signal has others; and those of every point."""

    classes: int
    points: tuple[Size, ...]

    @property
    def widest(self) -> int:
        """Returns the most features that a point has; 0 where there is none."""
        return max([0, *[point.features for point in self.points]])


class Settled(NamedTuple):
    """Holds what settles the B of a point: its size, the scale of the entries, and the stream."""

    size: Size
    scale: float
    stream: int


class Bank:
    """Holds the rule of a root and its matrices, and remembers the sizes, which may not change.

    Attributes:
        rule: how B is drawn and scaled.
        matrices: the B that were given, or that learn; None where they are generated.
        layout: the sizes of the latest pass that was settled; None before the first.
    """

    def __init__(self, rule: Feedback, matrices: Matrices | None) -> None:
        self.rule = rule
        self.matrices = matrices
        self.forget()
        self.reset()

    def reset(self) -> None:
        """Lets go of the matrices that can be generated again."""
        self._cache = DenseCache()

    def forget(self) -> None:
        """Forgets the sizes, as modules have changed."""
        self.layout: Layout | None = None

    def settle(self, seed: int, layout: Layout) -> list[Settled]:
        """Returns what settles the B of every point.

        Where they are fitted by anchors, B of points that have none yet are drawn.

        Raises:
            ValueError, TypeError: where a size is not as in earlier passes, or a given matrix does
                not fit.
        """
        scales, streams = self._settle(seed, *layout)
        return [Settled(*each) for each in zip(layout.points, scales, streams, strict=True)]

    def _settle(
        self, seed: int, classes: int, points: tuple[Size, ...]
    ) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Returns scale and stream of every point."""
        layout, rule = Layout(classes, tuple(Size(*point) for point in points)), self.rule
        anchored = rule.anchor is not None
        if anchored and self.matrices is not None:
            self._complete(self.matrices, seed, layout)
        if layout != self.layout:
            _check_same_features(self.layout, layout)
            if self.matrices is not None:
                self.matrices.check(rule.rows(classes), points, spare=anchored)
        self.layout = layout
        if self.matrices is not None:
            shared = SHARED in self.matrices
            streams = [0 if shared else hash_of(point.name) for point in layout.points]
            return (1.0,) * len(points), tuple(streams)
        widest = layout.widest
        scales = [rule.deviation(classes, point.features, widest) for point in layout.points]
        return tuple(scales), tuple(rule.stream(point.name) for point in layout.points)

    def keeps(self, layout: Layout, dtype: torch.dtype) -> bool:
        """Returns whether matrices for tensors of this dtype are kept in memory, so that their
        columns can lie as a point does: generated ones, and fitted ones, which change seldom."""
        if self.matrices is not None:
            return self.rule.anchor is not None and not traced()
        rows, wide = self.rule.rows(layout.classes), accumulation_dtype(dtype)
        return fits_dense(self.rule, rows, layout.widest, wide)

    def dense(
        self, seed: int, layout: Layout, settled: Settled, order: tuple[int, ...]
    ) -> Tensor | None:
        """Returns the unscaled B [rows, >= n_l] of a point, where it is kept, else None.

        `order` are the sizes (C, *S) of a point that lies as [*S, C] in memory, as the columns do
        then.
        """
        name, features, dtype, device = settled.size
        if self.matrices is not None:
            given = self.matrices.of(name).detach()
            if not order:
                return given
            return ready_on_every_stream(in_channels_last(given, order))
        rows = self.rule.rows(layout.classes)
        dtype = ops.feedback_dtype(device, dtype, rows)
        columns = layout.widest if self.rule.shared else features
        if not fits_dense(self.rule, rows, columns, dtype):
            return None
        place = (dtype, device)
        return self._dense(seed, settled.stream, rows, columns, order, *place)

    def low(self, seed: int, columns: int, device: torch.device) -> Tensor:
        """Returns Q [columns, rank], whose entries have the variance 1 / rank."""
        rank = self.rule.rank
        assert rank is not None  # else there is no Q
        place = (torch.float32, device)
        unscaled = self._dense(seed, LOW_RANK_STREAM, columns, rank, (), *place)
        scale: float = rank**-0.5
        return unscaled[:, :rank] * scale  # of a Q that had more

    def _dense(
        self,
        seed: int,
        stream: int,
        rows: int,
        columns: int,
        order: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        density = 1.0 if stream == LOW_RANK_STREAM else self.rule.density
        source = Source(seed, stream, self.rule.distribution, density, dtype, device)
        return self._cache.get(source, rows, columns, order)

    def matrix(self, seed: int, layout: Layout, size: Size) -> Tensor:
        """Returns the scaled B_l of a point, or P_l where B = Q P."""
        if self.matrices is not None:
            return self.matrices.of(size.name).detach()[:, : size.features]
        return self._drawn(seed, layout, size)

    def _complete(self, matrices: Matrices, seed: int, layout: Layout) -> None:
        for size in layout.points:
            if key_of(size.name) not in matrices:
                matrices.add(size.name, self._drawn(seed, layout, size))

    def _drawn(self, seed: int, layout: Layout, size: Size) -> Tensor:
        rule, classes = self.rule, layout.classes
        settings = (rule.stream(size.name), rule.distribution, rule.density)
        source = Source(seed, *settings, accumulation_dtype(size.dtype), size.device)
        matrix = source.matrix(rule.rows(classes), size.features)
        return matrix * rule.deviation(classes, size.features, layout.widest)

    def version(self) -> tuple[object, ...]:
        """Returns what changes where a plan of this bank would be stale."""
        anchored = self.rule.anchor is not None
        given = () if self.matrices is None else self.matrices.version(values=anchored)
        return (self.rule, *given)


def _check_same_features(before: Layout | None, now: Layout) -> None:
    if before is None:
        return
    widths = {point.name: point.features for point in before.points}
    for name, features, _, _ in now.points:
        if widths.get(name, features) != features:
            raise ValueError(
                f"feedback point {name!r}: expected {widths[name]} features as in earlier "
                f"forward passes, got {features}; B has a fixed size"
            )
    if before.classes != now.classes:
        raise ValueError(
            f"the error has {now.classes} features, expected {before.classes} as in earlier "
            "forward passes; B has a fixed size"
        )
