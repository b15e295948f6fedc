"""Ends a forward pass: puts the node that begins the broadcast behind the output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import signals
from ..feedback.bank import Layout
from ..matrices import Matrices
from ..ops.tracing import traced
from ..ops.typed import uncompiled
from ..projectors import Projected
from . import sites
from .broadcast import Receiver, Sender, as_matrix
from .handed import HandingNode
from .nodes import RootNode, Sending, Token
from .plan import what_is_read
from .planner import Planner
from .tape import Point, Tape, TrainedRoot, was_cut, watched

ONE_ERROR = (
    ". Several heads have one error where a submodule returns torch.cat(outputs, -1), and what is "
    "behind it splits them"
)


def finish(root: TrainedRoot, planner: Planner, tape: Tape, y: Any) -> Any:
    """Returns the output y with the backward of DFA behind it."""
    check_output(y, root.output)
    points = tape.in_order()
    if traced():
        if any(point.receiver is not None for point in points):  # made by layers that ran untraced
            return finish_untraced(root, planner, tape, y)
        return _handing(root, planner, points, y)
    for layer in tape.in_vain():
        root.follows(layer, None)
    points = [announced(point) for point in points]
    plan = planner.plan(root, tape, points, y)
    sent = _sent(root, planner, points, y)
    if not points:
        return y
    broadcast = tape.broadcast(plan)
    broadcast.was_cut = partial(was_cut, root, tape.inputs)
    for number, point in enumerate(points):
        receiver: Any = point.receiver  # there, as the point is `announced`
        receiver.set(broadcast, number, point.place)
    tokens = list({id(point.token): point.token for point in points}.values())  # a run has one
    sending = Sending(broadcast, sent.sender, root.learning, len(sent.learnt) // 2)
    return RootNode.apply(sending, y, sent.output, sent.low, sent.target, *sent.learnt, *tokens)


def _handing(root: TrainedRoot, planner: Planner, points: Sequence[Point], y: Tensor) -> Tensor:
    """Returns y of a pass that is traced or transformed."""
    handed, given = planner.handed(root, points, y)
    sent = _sent(root, planner, points, y)
    if not points:
        return y
    low = None
    if root.bank.rule.rank is not None and root.compression is None:
        low = root.handing.low(root.stamp, root.columns(y.shape[-1]), y.device)
    handed = handed._replace(low=low, sender=sent.sender, learnt=len(sent.learnt) // 2)
    seed = sites.seed_of(root)
    tokens = [point.token for point in points]
    before: Any = (handed, y, sent.output, sent.low, sent.target, seed)
    result: Tensor = HandingNode.apply(*before, *given, *sent.learnt, *tokens)
    return result


class _Sent(NamedTuple):
    """Holds what the node behind the output reads beside it and the tokens."""

    sender: Sender | None
    output: Tensor | None
    low: Tensor | None
    target: Tensor | None
    learnt: list[Tensor]  # what every point reads, then the matrix of each, where these learn


def _sent(root: TrainedRoot, planner: Planner, points: Sequence[Point], y: Tensor) -> _Sent:
    given = take_target(root)
    sender = sender_of(root, planner.layout, y.device, root.columns(y.shape[-1]), given)
    if not points:
        return _Sent(None, None, None, None, [])
    target = None
    if sender is not None:
        sender = sender.checked(y)
        target = sender.target
    learning = root.learning
    if learning is not None and learning.needs_target and target is None:
        target = signals.given(given, y, f"the rule {learning.name}")
    learnt: list[Tensor] = []
    if learning is not None and root.matrices is not None:
        learnt = _reads_and_matrices(root, root.matrices, points, y)
    low: Tensor | None = root.compression
    if low is None and sender is not None:
        low = sender.low
    output = None
    if sender is not None:
        # Not y itself: Dynamo breaks the graph where it is given one tensor twice.
        output = y.detach() if sender.signal.needs_output else None
        sender = sender._replace(low=None, target=None)
    return _Sent(sender, output, low, target, learnt)


finish_untraced = uncompiled(finish)


def announced(point: Point) -> Point:
    """Returns a point whose feedback can be announced: handed over by a token of its own to what a
    traced layer has made, and to an output whose gradient a hook or `retain_grad` waits for."""
    if point.receiver is not None and not (point.run is not None and watched(point.tensor)):
        return point
    x, receiver = (point.token if point.run is None else point.tensor), Receiver()
    token = Token.apply(x, None, None, receiver)
    return point._replace(token=token, receiver=receiver, run=None, place=0)


def _reads_and_matrices(
    root: TrainedRoot, matrices: Matrices, points: Sequence[Point], y: Tensor
) -> list[Tensor]:
    """Returns what every point reads, [M, n_l], then the matrix of each."""
    rows = y.shape[:-1].numel()
    names = root.names_of_points([point.layer for point in points])
    reads = [what_is_read(point, rows) for point in points]
    return reads + [matrices.of(name) for name in names]


def take_target(root: TrainedRoot) -> Tensor | None:
    """Returns the target that was set for this pass; it serves no other."""
    target = root.target
    if target is not None:
        root.target = None
    return target


def sender_of(
    root: TrainedRoot,
    layout: Layout | None,
    device: torch.device,
    columns: int,
    target: Tensor | None,
) -> Sender | None:
    """Returns what makes the signal [M, columns] of a pass; None where what is projected is the
    error itself."""
    signal, rank = root.bank.rule.sends, root.bank.rule.rank
    if isinstance(signal, signals.Error) and rank is None and root.projector is None:
        return None
    low = None if rank is None or traced() else low_of(root, columns, device)
    return Sender(signal, low, target, root.projector, 0 if layout is None else layout.widest)


def sent_by(
    root: TrainedRoot, layout: Layout, error: Tensor, output: Tensor, target: Tensor | None
) -> Tensor | Projected:
    """Returns what is projected for an error and an output, [*rows, C]: [M, columns]."""
    sender = sender_of(root, layout, error.device, root.columns(error.shape[-1]), target)
    if sender is None:
        return as_matrix(error)
    return sender.checked(output).of(error, output.detach())


def low_of(root: TrainedRoot, columns: int, device: torch.device) -> Tensor:
    """Returns Q [columns, rank] of B = Q P: the one that learns, or one of the seed."""
    if root.compression is not None:
        return root.compression.detach()
    return root.bank.low(root.read_seed(), columns, device)


def check_output(y: Any, tap: str | None) -> None:
    """Raises a TypeError or ValueError unless the error can be taken at this output."""
    where = "the output of the module" if tap is None else f"the output of {tap!r}"
    if not isinstance(y, Tensor):
        raise TypeError(
            f"{where} must be a tensor, got {type(y).__name__}; "
            f"DFA(module, output=name) takes the error at a submodule's output{ONE_ERROR}"
        )
    if not y.is_floating_point():
        raise TypeError(f"{where} must be of a floating dtype, got {y.dtype}")
    if y.dim() == 0:
        raise ValueError(
            f"{where} must have shape [*rows, C], got a scalar; if it is the loss, "
            "DFA(module, output=name) takes the error at a submodule's output"
        )
