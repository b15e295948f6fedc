"""Schedules a streaming step: when points are due, and parameters complete."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ..dfa import DFA
from ..engine import bypass
from ..engine.plan import lay_out
from ..engine.tape import Tape, feedback_shape
from ..feedback.bank import Layout


class Reading(NamedTuple):
    """Records that a layer read its input: tells a point and its sizes, but holds no memory."""

    layer: nn.Module
    tensor: Tensor  # an expanded scalar, for shape, dtype and device
    rows: int | None
    features: int | None
    edge: Any  # a `GradientEdge`, where the feedback enters the graph, of a point; else None
    version: int  # of what was read

    @property
    def shape(self) -> torch.Size:
        """Returns the shape of the feedback."""
        return feedback_shape(self.tensor, self.rows, self.features)


class Schedule(NamedTuple):
    """Says when the sources of gradients are due: the points, then the output.

    Sources whose graphs meet, which is where feedback goes round a cut, go together.
    """

    layers: tuple[nn.Module, ...]  # in the order of their readings
    trained: tuple[bool, ...]  # which parameters require grad
    points: tuple[int, ...]  # which readings are the points
    due: list[list[int]]  # the sources that send when this one is reached
    complete: list[list[Tensor]]  # the parameters that have their whole gradient then


def schedule_of(
    root: DFA, survey: Tape, readings: Sequence[Reading], trained: tuple[bool, ...], y: Tensor
) -> Schedule:
    """Returns the schedule of a pass from its graph, which came to y.

    Raises:
        ValueError, TypeError, RuntimeError: for what no step accepts.
    """
    numbers = [index for index, reading in enumerate(readings) if reading.edge is not None]
    points = [readings[index] for index in numbers]
    names = root.names_of_points([point.layer for point in points])
    lay_out(points, names, y, root.columns(y.shape[-1]))
    bypass.check(root, survey, points, names, y)
    turn, uses = walk([readings[index].edge.node for index in numbers] + [y.grad_fn])
    due: list[list[int]] = [[] for _ in turn]
    complete: list[list[Tensor]] = [[] for _ in turn]
    for source, when in enumerate(turn):
        due[when].append(source)
    for parameter, sources in uses.items():
        complete[max(turn[source] for source in sources)].append(parameter)
    layers = tuple(reading.layer for reading in readings)
    return Schedule(layers, trained, tuple(numbers), due, complete)


def walk(starts: Iterable[Node | None]) -> tuple[list[int], dict[Tensor, set[int]]]:
    """Returns of every source the last whose graph meets its own, and the sources of every leaf."""
    turn: list[int] = []
    uses: dict[Tensor, set[int]] = {}
    owner: dict[Node, int] = {}
    for source, start in enumerate(starts):
        turn.append(source)
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node is None:
                continue
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                uses.setdefault(leaf, set()).add(source)
            elif node not in owner:
                owner[node] = source
                waiting += [before for before, _ in node.next_functions]
            elif turn[owner[node]] != source:
                met = turn[owner[node]]
                turn = [source if when == met else when for when in turn]
    return turn, uses


class Known(NamedTuple):
    """Holds what a call of the model comes to."""

    schedule: Schedule
    points: list[Reading]
    layout: Layout
    output: Tensor  # at which the error is taken: a blank

    def without(self, parameters: set[Tensor]) -> Known:
        """Returns the same, with these to be updated at the end of the step."""
        complete = [[p for p in turn if p not in parameters] for turn in self.schedule.complete]
        return self._replace(schedule=self.schedule._replace(complete=complete))
