"""Checks on the graph of a forward pass: no way round a cut, nothing but the head above."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..activations import KINDS
from ..nn.conv import Conv1d, Conv2d
from ..nn.linear import Linear
from .chain import functions_behind, separate
from .tape import Edge, Point, Tape

if TYPE_CHECKING:
    from ..dfa import DFA

_SQUASHED = ("LogSoftmax", "Softmax", "Sigmoid", "LogSigmoid")


def check(root: DFA, tape: Tape, points: list[Point], names: list[str], y: Tensor) -> None:
    """Raises where a path leads round a cut; warns of what else would train unlike DFA.

    Raises:
        RuntimeError: naming both ends of a path that reaches a point, or what feeds a point,
            from a later one or from the output without passing a cut; or where layers hide in a
            reentrant checkpoint, which runs them without a graph and later without a tape.
    """
    regions = _Regions(tape, points, y)
    if tape.skipped is not None:
        _check_reentrant(regions, tape.skipped)
    if not root.allow_bypass:
        _check_bypass(regions, [*names, "the output"])
    warn_above_the_last_point(root, regions.parameters)
    _warn_output_is_a_point(points, names, y)
    _warn_squashed_output(root, y)


class _Regions:
    """Which nodes each point, and at last the output, reaches backward without passing a cut.

    By sources: point k, then the output as number len(points). A region ends at the parameters
    and at the inputs of the root.
    """

    def __init__(self, tape: Tape, points: list[Point], y: Tensor) -> None:
        self.edges: list[Edge] = [(point.edge.node, point.edge.output_nr) for point in points]
        self.readers = _readers(tape, points)
        self.stops = {_edge(x) for x in tape.inputs}
        self.parameters: list[Tensor] = []  # trained by the output's true gradient
        self.reached: list[set[Edge]] = []
        for edge in self.edges:
            self.reached.append(self._walk(edge, []))
        self.reached.append(self._walk(_edge(y), self.parameters) if y.grad_fn else set())

    def _walk(self, start: Edge, parameters: list[Tensor]) -> set[Edge]:
        seen: set[Edge] = set()
        waiting = [start]
        while waiting:
            edge = waiting.pop()
            if edge[0] is None or edge in seen or edge in self.stops:
                continue
            if edge[0].name() == "CompiledFunctionBackward":
                continue  # one node for all of a compiled block: its edges tell no paths
            leaf = _leaf(edge[0])
            if leaf is not None:
                parameters.append(leaf)
                continue
            seen.add(edge)
            waiting += functions_behind(edge)
        return seen

    def parts(self, source: int) -> set[Node | Edge]:
        """What a source reaches, by nodes; of the node of a chain by its layers."""
        return {separate(edge) for edge in self.reached[source]}

    def follows(self, later: int, earlier: int) -> bool:
        """Whether a source is computed, through cuts, from what reads point `earlier`."""
        if earlier not in self.readers:
            return True  # a FeedbackPoint leaves no trace behind its cut: assume it
        waiting, seen = [later], set()
        while waiting:
            source = waiting.pop()
            if source in seen:
                continue
            seen.add(source)
            parts = self.parts(source)
            behind = [p for p, readers in self.readers.items() if parts & readers]
            if earlier in behind:
                return True
            waiting += behind
        return False


def _leaf(node: Node) -> Tensor | None:
    """The parameter or other leaf at a node. A cast of one is one: autocast keeps it, so that a
    layer which is called twice reads the same, and no feedback passes there."""
    if node.name() == "ToCopyBackward0" and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _check_bypass(regions: _Regions, names: list[str]) -> None:
    points = {edge: point for point, edge in enumerate(regions.edges)}
    owners: dict[Node | Edge, list[int]] = {}
    for source, reached in enumerate(regions.reached):
        for point in sorted(points[edge] for edge in points.keys() & reached):
            if point != source:
                raise RuntimeError(_bypass_message(names[point], names[source]))
        parts = regions.parts(source)
        for earlier in sorted({owner for part in parts for owner in owners.get(part, ())}):
            if regions.follows(source, earlier):
                raise RuntimeError(_bypass_message(names[earlier], names[source]))
        for part in parts:
            owners.setdefault(part, []).append(source)


def _check_reentrant(regions: _Regions, skipped: nn.Module) -> None:
    nodes = {node for region in regions.reached for node, _ in region}
    if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
        raise RuntimeError(
            f"{type(skipped).__name__} is inside a reentrant activation checkpoint, where it "
            "cannot be cut: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )


def _bypass_message(earlier: str, later: str) -> str:
    end = later if later == "the output" else f"the input of {later!r}"
    return (
        f"a path leads from {end} back to the input of {earlier!r}, or to what feeds it, without "
        "passing a cut: later feedback would reach it as well. Usually it is a skip connection, "
        "h + layer(h): put a fastdfa.FeedbackPoint after the add and none inside the block, as "
        "fastdfa.convert(model, blocks=...) does, or accept the path with "
        "DFA(..., allow_bypass=True)"
    )


def _edge(x: Tensor) -> Edge:
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def _readers(tape: Tape, points: list[Point]) -> dict[int, set[Node | Edge]]:
    """For each point that layers read: what made their outputs."""
    index = {id(point.tensor): number for number, point in enumerate(points)}
    readers: dict[int, set[Node | Edge]] = {}
    for x, edge in tape.reads():
        if id(x) in index:
            readers.setdefault(index[id(x)], set()).add(separate(edge))
    return readers


def warn_above_the_last_point(root: DFA, parameters: Iterable[Tensor], stacklevel: int = 4) -> None:
    """Only the head should train by the true gradient of the output, or several side by side.

    Layers that cut their input are side by side: each ends the path from the output.
    """
    trained = {id(parameter) for parameter in parameters}
    owners, others = [], 0
    for name, module in root.module.named_modules():
        cuts = isinstance(module, (Linear, Conv1d, Conv2d))
        owned = trained & {id(parameter) for parameter in module.parameters(recurse=cuts)}
        if owned:
            owners.append(name or type(module).__name__)
            others += not cuts
        if cuts:
            trained -= owned
    if len(owners) > 1 and others:
        warnings.warn(
            f"the true gradient of the output trains {', '.join(map(repr, owners))}: there is no "
            "feedback point between them. Where only the head should, make it a fastdfa.Linear, "
            "or put a fastdfa.FeedbackPoint before it",
            stacklevel=stacklevel,
        )


def _warn_output_is_a_point(points: list[Point], names: list[str], y: Tensor) -> None:
    for point, name in zip(points, names, strict=True):
        if not y.requires_grad and torch._C._is_alias_of(point.tensor, y):
            warnings.warn(
                f"the output is itself the feedback point {name!r}, so that what is before it "
                "learns from feedback and nothing from the true gradient: leave that point out",
                stacklevel=4,
            )


def _warn_squashed_output(root: DFA, y: Tensor) -> None:
    """There e is the constant -onehot/M under a log-likelihood (MNIST: 91.5 against 96.4%)."""
    if y.grad_fn is None:
        return
    name = type(y.grad_fn).__name__.removesuffix("Backward0")
    inside = ""
    if getattr(y.grad_fn, "gate", (None,))[0] == KINDS.index("sigmoid"):
        name, inside = "Sigmoid", " after making the activation a module of its own"
    if name not in _SQUASHED:
        return
    tap = _producer(root.module, y.grad_fn) or "name of the layer before"
    warnings.warn(
        f"the output is a {name}: the error there is a poor signal for feedback, and DFA learns "
        f"worse from it. Take the error before it, by DFA(..., output={tap!r}){inside}",
        stacklevel=4,
    )


def _producer(module: nn.Module, node: Node) -> str | None:
    """The name of the module whose parameter is nearest below a node."""
    waiting = [node]
    while waiting:
        node = waiting.pop(0)
        if hasattr(node, "variable"):
            for name, inner in module.named_modules():
                if any(node.variable is p for p in inner.parameters(recurse=False)):
                    return name
        waiting += [after for after, _ in node.next_functions if after is not None]
    return None
