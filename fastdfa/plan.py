"""From the points of one forward pass to the groups that one backward node feeds each."""

from __future__ import annotations

from math import prod
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from .activations import IDENTITY
from .broadcast import Target
from .tape import Fed, LayerRecord, Point

# The deltas of one group of layers exist at a time: of one layer, or of as many as fit in this. At
# its peak backprop holds two gradients of a layer's size: a step takes 279 MiB against its 288 at
# 16x512, batch 8192, on the CPU. And deltas this small are still in the cache for the weight
# gradients; on CUDA in the L2 cache, 40 MB on an A100 and 50 MB on an H100 (predicted).
WORKSPACE_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}


class Batch(NamedTuple):
    """Points that one `Broadcast` feeds, newest first."""

    dtype: torch.dtype
    device: torch.device
    fused: list[tuple[Target, LayerRecord]]
    tokens: list[tuple[Target, Tensor]]
    fed: list[Fed | None] | None = None  # for each token, where all are fed in turn


def batches(
    points: list[Point], targets: list[tuple[Target, LayerRecord | Tensor]], in_turn: bool
) -> list[Batch]:
    """Points by batches, from the output down: fused layers as many as the workspace holds.

    Tokens go with the first batch of their kind: autograd runs all the nodes at the output
    before what is below, so splitting them would free nothing. Where there are any, and the
    workspace does not hold all points, everything is fed in turn instead, if it may be: the peak of
    a step of a CNN was 55 MiB beside backprop's 44, and is 42 (six layers, three poolings, batch
    64).
    """
    sizes = [x.tensor.numel() * x.tensor.dtype.itemsize for x in points]
    fused = all(isinstance(goal, LayerRecord) for _, goal in targets)
    smallest = min(workspace(point.tensor.device) for point in points)
    if in_turn and not fused and sum(sizes) > smallest:
        return _one_by_one(points, targets)
    batches: list[Batch] = []
    first: dict[tuple[torch.dtype, torch.device], Batch] = {}
    room = 0
    for point, (target, goal), size in reversed(list(zip(points, targets, sizes, strict=True))):
        kind = (point.tensor.dtype, point.tensor.device)
        fused = isinstance(goal, LayerRecord)
        if kind not in first or (fused and (size > room or kind != batches[-1][:2])):
            batches.append(Batch(*kind, [], []))
            first.setdefault(kind, batches[-1])
            room = max(workspace(kind[1]), size)
        if fused:
            batches[-1].fused.append((target, goal))
            room -= size
        else:
            first[kind].tokens.append((target, goal))
    return batches


def _one_by_one(
    points: list[Point], targets: list[tuple[Target, LayerRecord | Tensor]]
) -> list[Batch]:
    """Batches whose points are fed in turn; one of those whose feedback a hook wants to see."""
    batches: dict[tuple[torch.dtype, torch.device, bool], Batch] = {}
    for point, (target, goal) in reversed(list(zip(points, targets, strict=True))):
        layer = isinstance(goal, LayerRecord)
        in_turn = goal is point.target
        kind = (point.tensor.dtype, point.tensor.device)
        batch = batches.setdefault((*kind, in_turn), Batch(*kind, [], [], [] if in_turn else None))
        batch.tokens.append((target, goal.output if layer else goal))
        if in_turn:
            batch.fed.append(goal.fed if layer else None)
    return list(batches.values())


def workspace(device: torch.device) -> int:
    """Bytes that may be held to feed several layers together."""
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])


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
    raise ValueError(
        f"feedback point {name!r}: expected a tensor whose rows are those of the error, "
        f"[{', '.join(map(str, rows))}], got shape {tuple(shape)} for an output of shape "
        f"{tuple(y.shape)}; {advice}"
    )


def target_of(
    point: Point, y: Tensor, features: int, scale: float, stream: int, dense: bool
) -> tuple[Target, LayerRecord | Tensor]:
    """The product for a point, and what takes it: the layer itself where its gate can be fused.

    `dense`: whether B is kept, so that its columns can lie as the point does in memory.
    """
    goal = point.target
    order = _channels_last(point, y) if dense else ()
    if isinstance(goal, LayerRecord):
        in_order = goal.saved.is_contiguous() or order
        fits = in_order and goal.affine.fed_by_rows(goal.saved, y.shape[:-1])
        if fits and not _watched(goal.output):
            return Target(*goal.gate, scale, stream, features, order), goal
        goal = goal.output
    return Target(IDENTITY, 0.0, scale, stream, features, order), goal


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
        if isinstance(point.target, LayerRecord) and point.target.modified:
            raise RuntimeError(
                f"the input or the output of the layer before {name!r} was modified by an in-place "
                "operation after that layer ran, and its gradient needs both as they were"
            )
