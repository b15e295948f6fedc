"""Holds the ops that read the seed when a traced step runs.

To a graph, which holds tensors and numbers only, a number stands for what a root knows: its *site*.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.tracing import transformed
from ..ops.typed import uncompiled
from .root import Root

_all: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Sites:
    """Keeps what the graphs of one root ask for; it lives as long as the root."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[int, Any]] = {}

    def number(self, key: Hashable, make: Callable[[], Any]) -> int:
        """Returns the number of what `make()` has made for a key."""
        if key not in self._kept:
            number, made = next(_numbers), make()
            self._kept[key] = number, made
            _all[number] = made
        return self._kept[key][0]


class Site:
    """Serves as the base of what makes something of a root's seed."""

    def __init__(self, root: Root) -> None:
        self._root = weakref.ref(root)  # which keeps the site

    def read(self, seed: Tensor | None) -> int:
        """Returns the value of a seed, by default of the root's at this moment."""
        root = self._root()
        if seed is not None or root is None:
            return int(seed)  # type: ignore[arg-type]  # no graph lives longer than its root
        return root.read_seed()


class Drawing(Site):
    """Draws one matrix, of this shape, dtype and device, by the seed that it is given."""

    def __init__(
        self,
        root: Root,
        draw: Callable[[int], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(root)
        self.draw, self.shape, self.dtype, self.device = draw, shape, dtype, device


def seed_of(root: Any) -> Tensor | None:
    """Returns what the ops are given as the seed of a root: None where they read it themselves.

    So that it is no tensor that a compiled step saves, and would find written, as
    DistributedDataParallel writes it in every forward pass. Inside a transform it may be another
    than the root's own.
    """
    return root.seed if transformed() else None


_library = torch.library.Library("fastdfa", "FRAGMENT")


def _op(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # A replay of a CUDA graph would not read the seed again.
    _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    name = schema.partition("(")[0]
    _library.impl(name, uncompiled(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdfa::{name}", fake, lib=_library)


Seed = Tensor | None


def _handed(sent: Tensor, seed: Seed, given: Sequence[Tensor], site: int) -> list[Tensor]:
    at = _all[site]
    made: list[Tensor] = at.feedback(sent, at.read(seed), given)
    return made


def _handed_fake(sent: Tensor, seed: Seed, given: Sequence[Tensor], site: int) -> list[Tensor]:
    made: list[Tensor] = _all[site].like(sent)
    return made


def _drawn(near: Tensor, seed: Seed, site: int) -> Tensor:
    at = _all[site]
    made: Tensor = at.draw(at.read(seed))
    return made.clone()  # as a graph may write into what it was given


def _drawn_fake(near: Tensor, seed: Seed, site: int) -> Tensor:
    like = _all[site]
    return near.new_empty(like.shape, dtype=like.dtype, device=like.device)


_op(
    "handed(Tensor sent, Tensor? seed, Tensor[] given, int site) -> Tensor[]", _handed, _handed_fake
)
# `near`, any tensor, says where in a graph it is: what reads none may be drawn once and for all.
_op("drawn(Tensor near, Tensor? seed, int site) -> Tensor", _drawn, _drawn_fake)


# Inside `torch.vmap`: samples of their own, or modules that are stacked, with seeds of their own.


def _at(x: Tensor, dim: int | None, place: int) -> Tensor:
    return x if dim is None else x.select(dim, place)


def _handed_batched(
    info: Any, in_dims: Any, sent: Tensor, seed: Seed, given: Sequence[Tensor], site: int
) -> Any:
    of_sent, of_seed, of_given, _ = in_dims
    one_rule = of_seed is None and all(dim is None for dim in of_given)
    if one_rule and not _all[site].counts_rows:  # then the rows of all samples are rows
        rows = sent.movedim(of_sent, 0)
        made = torch.ops.fastdfa.handed(rows.flatten(0, 1), seed, given, site)
        made = [each.unflatten(0, rows.shape[:2]) for each in made]
    else:
        parts = [
            torch.ops.fastdfa.handed(
                _at(sent, of_sent, i),
                None if seed is None else _at(seed, of_seed, i),
                [_at(x, dim, i) for x, dim in zip(given, of_given, strict=True)],
                site,
            )
            for i in range(info.batch_size)
        ]
        made = [torch.stack(part) for part in zip(*parts, strict=True)]
    return made, [0] * len(made)


def _drawn_batched(info: Any, in_dims: Any, near: Tensor, seed: Seed, site: int) -> Any:
    of_near, of_seed, _ = in_dims
    near = _at(near, of_near, 0)
    if seed is None or of_seed is None:
        return torch.ops.fastdfa.drawn(near, seed, site), None
    seeds = seed.movedim(of_seed, 0)
    return torch.stack([torch.ops.fastdfa.drawn(near, each, site) for each in seeds]), 0


torch.library.register_vmap("fastdfa::handed", _handed_batched, lib=_library)
torch.library.register_vmap("fastdfa::drawn", _drawn_batched, lib=_library)
