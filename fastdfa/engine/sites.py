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
from ..ops.typed import constant, uncompiled

_all: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Sites:
    """Keeps what the graphs of one root ask for; it lives as long as the root."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[int, Any]] = {}
        self.latest: list[Tensor | None] = [None]  # the seed of a compiled step

    def number(self, key: Hashable, make: Callable[[], Any]) -> int:
        """Returns the number of what `make()` has made for a key."""
        if key not in self._kept:
            number, made = next(_numbers), make()
            self._kept[key] = number, made
            _all[number] = made
        return self._kept[key][0]

    @constant
    def seed(self) -> int:
        """Returns the number of what reads a seed from a device."""
        return self.number("seed", SeedReader)


class Drawing:
    """Draws one matrix, by the seed that it is given; of this shape, dtype and device."""

    def __init__(
        self,
        draw: Callable[[int], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.draw, self.shape, self.dtype, self.device = draw, shape, dtype, device


class SeedReader:
    """Reads a seed from its device where it was written since, as each read waits for the GPU."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, int, int, int] | None = None

    def read(self, seed: Tensor) -> int:
        """Returns its value."""
        place, version = seed.data_ptr(), seed._version
        seen = self._seen
        if seen is None or seen[1:3] != (place, version):
            seen = self._seen = (
                seed,
                place,
                version,
                int(seed),
            )  # held, so that the place is its own
        return seen[3]


def now(seed: Tensor, sites: Sites) -> Tensor:
    """Returns the seed of this moment, on the host."""
    read: Tensor = torch.ops.fastdfa.on_host(seed, sites.seed())
    if torch.compiler.is_compiling() and not transformed():
        # An output of the forward graph: else the op would be moved into the backward graph.
        sites.latest[0] = read
    return read


_library = torch.library.Library("fastdfa", "FRAGMENT")


def _op(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # A replay of a CUDA graph would not read the seed again.
    _library.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    name = schema.partition("(")[0]
    _library.impl(name, uncompiled(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdfa::{name}", fake, lib=_library)


def _handed(sent: Tensor, seed: Tensor, given: Sequence[Tensor], site: int) -> list[Tensor]:
    made: list[Tensor] = _all[site].feedback(sent, int(seed), given)
    return made


def _handed_fake(sent: Tensor, seed: Tensor, given: Sequence[Tensor], site: int) -> list[Tensor]:
    made: list[Tensor] = _all[site].like(sent)
    return made


def _drawn(seed: Tensor, site: int) -> Tensor:
    made: Tensor = _all[site].draw(int(seed))
    return made.clone()  # as a graph may write into what it was given


def _drawn_fake(seed: Tensor, site: int) -> Tensor:
    like = _all[site]
    return seed.new_empty(like.shape, dtype=like.dtype, device=like.device)


def _on_host(seed: Tensor, site: int) -> Tensor:
    return torch.tensor(_all[site].read(seed))


_op("handed(Tensor sent, Tensor seed, Tensor[] given, int site) -> Tensor[]", _handed, _handed_fake)
_op("drawn(Tensor seed, int site) -> Tensor", _drawn, _drawn_fake)
_op(
    "on_host(Tensor seed, int site) -> Tensor",
    _on_host,
    lambda seed, site: seed.new_empty((), device="cpu"),
)


# Inside `torch.vmap`: samples of their own, or modules that are stacked, with seeds of their own.


def _at(x: Tensor, dim: int | None, place: int) -> Tensor:
    return x if dim is None else x.select(dim, place)


def _handed_batched(
    info: Any, in_dims: Any, sent: Tensor, seed: Tensor, given: Sequence[Tensor], site: int
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
                _at(seed, of_seed, i),
                [_at(x, dim, i) for x, dim in zip(given, of_given, strict=True)],
                site,
            )
            for i in range(info.batch_size)
        ]
        made = [torch.stack(part) for part in zip(*parts, strict=True)]
    return made, [0] * len(made)


def _drawn_batched(info: Any, in_dims: Any, seed: Tensor, site: int) -> Any:
    seeds = seed.movedim(in_dims[0], 0)
    return torch.stack([torch.ops.fastdfa.drawn(each, site) for each in seeds]), 0


torch.library.register_vmap("fastdfa::handed", _handed_batched, lib=_library)
torch.library.register_vmap("fastdfa::drawn", _drawn_batched, lib=_library)
torch.library.register_vmap(
    "fastdfa::on_host", lambda info, dims, seed, site: (seed.cpu(), dims[0]), lib=_library
)
