"""Runs a network uncut: a forward pass that notes where training would cut it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .nodes import Edge
from .tape import Point, Tape, TrainedRoot, moment

# What a point's true gradient comes to: the point's number and the gradient. What it returns, if
# anything, goes on in its place.
Arrival = Callable[[int, Tensor], Tensor | None]


class UncutTape(Tape):
    """Notes where training would cut, and goes on with the history.

    What the layers at a point read is one copy of it, whose gradient is what feedback stands for.

    Args:
        arrived: takes the gradient of each copy; held by the graph, so it must not hold the tape.
    """

    looks_ahead = False  # the output of every layer is a tensor with a gradient
    cuts = False

    def __init__(
        self, root: TrainedRoot, inputs: list[Tensor], tap: nn.Module | None, arrived: Arrival
    ) -> None:
        super().__init__(root, inputs, tap)
        self.arrived = arrived
        self.found: dict[tuple[int, int], tuple[Point, Tensor]] = {}  # with its copy

    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        if any(x is given for given in self.inputs):
            return x
        key = moment(x)
        if key not in self.found:
            number, arrived = len(self.found), self.arrived
            # No view: modified in place, it would take the history of x round the hook.
            copy = x.clone()
            copy.register_hook(lambda gradient: arrived(number, gradient))
            self.found[key] = self.noted(layer, x, rows, features), copy
        return self.found[key][1]

    def noted(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Point:
        """Returns the point that x would be."""
        return Point(layer, x, x, None, None, 0, rows, features, None)

    def read(self, x: Tensor, edge: Edge | None) -> None:
        pass  # nothing looks for bypasses

    def in_order(self) -> list[Point]:
        return [point for point, _ in self.found.values()]
