"""From the points of one forward pass to the groups that one backward node feeds each."""

from __future__ import annotations

from math import prod
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..activations import IDENTITY
from .broadcast import Group, Target
from .tape import Affine, Chain, LayerRecord, Point, Receiver

if TYPE_CHECKING:
    from ..dfa import Layout

# Outside chains the deltas of one group of layers exist at a time: of one layer, or of as many as
# fit in this. At its peak backprop holds two gradients of a layer's size. And deltas this small are
# still in the cache for the weight gradients; on CUDA in the L2 cache, 40 MB on an A100 and 50 MB
# on an H100 (predicted).
WORKSPACE_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}

# The same within a chain, whose node frees its activations as it goes down: with 4 MiB a step of
# 8x512, batch 256, peaked at 17.3 MiB on the CPU, backprop's at 9.1.
CHAIN_DELTA_BYTES = {"cpu": 2**20, "cuda": 32 * 2**20}
# From so many classes on, a product e B that several layers share is worth the memory.
_MANY_CLASSES = 64


class Feed(NamedTuple):
    """A product to make, and what takes it: a point by its place among the receivers."""

    target: Target
    place: int
    affine: Affine | None  # of the layer whose gate is fused; None: an output or a token takes it

    @property
    def fused(self) -> bool:
        return self.affine is not None


class Batch(NamedTuple):
    """Points that one `Broadcast` feeds, newest first."""

    dtype: torch.dtype
    device: torch.device
    fused: list[Feed]
    tokens: list[Feed]
    in_turn: bool  # one by one, by a `BroadcastInTurn`


class Node(NamedTuple):
    """One `Broadcast` or `BroadcastInTurn`, but for what is new in every forward pass."""

    group: Group
    dense: list[Tensor]
    fused: list[int]  # places of the layers, and of the tokens
    tokens: list[int]
    gate: list[bool] | None  # in turn: whether what stands at a token gates its own feedback

    def tensors(self, receivers: list[Receiver]) -> list[Tensor | None]:
        """In the order that `Broadcast` expects."""
        tensors: list[Tensor | None] = [*self.dense]
        for place in self.fused:
            tensors += receivers[place][:4]
        tensors += [receivers[place][4] for place in self.tokens]
        return tensors


class ChainNode(NamedTuple):
    """The feedback of a whole chain, which its own node makes."""

    group: Group
    dense: list[Tensor]
    unit: int  # which of the tape


class Plan(NamedTuple):
    """What a forward pass has in common with others of the same `key`."""

    key: Any
    nodes: list[Node]  # from the input up, so that the top group is the first in backward
    chains: list[ChainNode]
    layout: Layout


def key(units: list[Point | Chain], y: Tensor) -> tuple[Any, ...] | None:
    """All that the plan of a forward pass follows from; None where it serves this pass alone.

    By it a step finds its plan at a tenth of the cost of making one (32 layers).
    """
    parts: list[Any] = [y.shape, y.device]
    first: dict[int, int] = {}  # by tensor: of several points that read one the first is fed
    for unit in units:
        if isinstance(unit, Chain):
            if any(map(_watched, unit.outputs)):
                return None
            h = unit.saved[0]
            parts.append((unit.layers[0], *unit.readers, *unit.gates, h.dtype, h.device))
            parts += [h.shape for h in unit.saved]
            continue
        x, target = unit.tensor, unit.target
        if _watched(x):
            return None
        layer = isinstance(target, LayerRecord)
        of_layer = (target.gate, target.affine, target.saved.stride()) if layer else unit.shape
        place = first.setdefault(id(x), len(first))
        parts.append(
            (unit.layer, unit.rows, x.shape, x.stride(), x.dtype, x.device, of_layer, place)
        )
    return tuple(parts)


def expanded(units: list[Point | Chain]) -> list[Point]:
    """The points, those of chains among them, from the input up."""
    points: list[Point] = []
    for unit in units:
        points += unit.points() if isinstance(unit, Chain) else [unit]
    return points


def receivers(units: list[Point | Chain], whole: list[ChainNode]) -> list[Receiver | None]:
    """What takes the feedback of each of the points; None for those of whole chains."""
    apart = {chain.unit for chain in whole}
    found: list[Receiver | None] = []
    for i, unit in enumerate(units):
        if i in apart:
            found += [None] * len(unit.readers)
        elif isinstance(unit, Chain):
            found += [point.receiver for point in unit.points()]
        else:
            found.append(unit.receiver)
    return found


def whole_chains(
    units: list[Point | Chain], feeds: dict[int, Feed], device: torch.device
) -> dict[int, list[Feed]]:
    """The chains, by their places on the tape, that are fed as one by an error on `device`."""
    chains: dict[int, list[Feed]] = {}
    place = 0
    for i, unit in enumerate(units):
        if not isinstance(unit, Chain):
            place += 1
            continue
        its = [feeds.get(place + k) for k in range(len(unit.readers))]
        place += len(its)
        here = unit.saved[0].device == device
        if its and here and all(feed is not None and feed.fused for feed in its):
            chains[i] = its
    return chains


def fed(points: list[Point]) -> list[int]:
    """The places of the points that are fed: of several that read one tensor, the first.

    Not by id: compiled in pieces, a step guards its value and is compiled again each time.
    """
    places: list[int] = []
    for place, point in enumerate(points):
        for other in places:
            if points[other].tensor is point.tensor:
                break
        else:
            places.append(place)
    return places


def batches(points: list[Point], feeds: list[Feed], in_turn: bool, projected: bool) -> list[Batch]:
    """Points by batches, from the output down: fused layers as many as the workspace holds.

    Tokens go with the first batch of their kind: autograd runs all the nodes at the output
    before what is below, so splitting them would free nothing. Where there are any, and the
    workspace does not hold all points, everything is fed in turn instead, if it may be: the peak of
    a step of a CNN was 55 MiB beside backprop's 44, and is 42 (six layers, three poolings, batch
    64). So is it where a projector is at work, for which the first point waits.
    """
    if in_turn and projected and len({point.tensor.device for point in points}) == 1:
        return _one_by_one(points, feeds)
    sizes = [x.tensor.numel() * x.tensor.dtype.itemsize for x in points]
    smallest = min(workspace(point.tensor.device) for point in points)
    if in_turn and not all(feed.fused for feed in feeds) and sum(sizes) > smallest:
        return _one_by_one(points, feeds)
    batches: list[Batch] = []
    first: dict[tuple[torch.dtype, torch.device], Batch] = {}
    room = 0
    for point, feed, size in reversed(list(zip(points, feeds, sizes, strict=True))):
        kind = (point.tensor.dtype, point.tensor.device)
        if kind not in first or (feed.fused and (size > room or kind != batches[-1][:2])):
            batches.append(Batch(*kind, [], [], False))
            first.setdefault(kind, batches[-1])
            room = max(workspace(kind[1]), size)
        if feed.fused:
            batches[-1].fused.append(feed)
            room -= size
        else:
            first[kind].tokens.append(feed)
    return batches


def _one_by_one(points: list[Point], feeds: list[Feed]) -> list[Batch]:
    """Batches whose points are fed in turn; one of those whose feedback a hook wants to see."""
    batches: dict[tuple[torch.dtype, torch.device, bool], Batch] = {}
    for point, feed in reversed(list(zip(points, feeds, strict=True))):
        in_turn = feed.fused or not isinstance(point.target, LayerRecord)
        kind = (point.tensor.dtype, point.tensor.device)
        batches.setdefault((*kind, in_turn), Batch(*kind, [], [], in_turn)).tokens.append(feed)
    return list(batches.values())


def workspace(device: torch.device) -> int:
    """The bytes that the deltas of a group of layers may take."""
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])


def first_of_group(hidden: list[Tensor], classes: int) -> int:
    """Of the layers of a chain, by their outputs, the first of those to go with the last one."""
    device = hidden[-1].device
    room = workspace(device)
    if classes < _MANY_CLASSES:
        room = CHAIN_DELTA_BYTES.get(device.type, CHAIN_DELTA_BYTES["cpu"])
    first = len(hidden) - 1
    room -= hidden[first].numel() * hidden[first].itemsize
    while first > 0:
        room -= hidden[first - 1].numel() * hidden[first - 1].itemsize
        if room < 0:
            break
        first -= 1
    return first


def features_of(point: Point, name: str, y: Tensor) -> int:
    """n_l of a point: its rows must be those of the error, the rest is features.

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


def feed_of(
    point: Point, place: int, y: Tensor, features: int, scale: float, stream: int, dense: bool
) -> Feed:
    """The product for a point, gated where what takes it is a layer whose gate can be fused.

    `dense`: whether B is kept, so that its columns can lie as the point does in memory.
    """
    layer = point.target
    order = _channels_last(point, y) if dense else ()
    if isinstance(layer, LayerRecord):
        in_order = layer.saved.is_contiguous() or order
        fits = in_order and layer.affine.fed_by_rows(layer.saved, y.shape[:-1])
        if fits and not _watched(layer.output):
            return Feed(Target(*layer.gate, scale, stream, features, order), place, layer.affine)
    return Feed(Target(IDENTITY, 0.0, scale, stream, features, order), place, None)


def _channels_last(point: Point, y: Tensor) -> tuple[int, ...]:
    """The sizes (C, *S) of a point whose samples lie as [*S, C] in memory and are flattened."""
    x = point.tensor
    if x.dim() < 3 or y.dim() != 2 or point.rows not in (None, 1) or point.shape != x.shape:
        return ()
    if x.is_contiguous() or not x.movedim(1, -1).is_contiguous():
        return ()
    return tuple(index(size) for size in x.shape[1:])


def _watched(x: Tensor) -> bool:
    """Whether someone waits for the gradient of x itself, which the fused path never makes."""
    if torch.compiler.is_compiling():
        return False
    return bool(x._backward_hooks) or x.retains_grad


def without_repeats(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """A layer that is called twice brings its weight twice, which Dynamo refuses: alias it."""
    distinct: list[Tensor | None] = []
    for x in tensors:
        repeated = x is not None and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if repeated else x)
    return distinct


def check_unmodified(points: list[Point], names: list[str]) -> None:
    for point, name in zip(points, names, strict=True):
        if point.modified:
            raise RuntimeError(
                f"the input or the output of the layer before {name!r} was modified by an in-place "
                "operation after that layer ran, and its gradient needs both as they were"
            )
