"""Checks on the graph of a forward pass: no way round a cut, nothing but the head above."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..activations import KINDS
from .inplace import own_modules
from .layers import CutLayer
from .nodes import Edge, GateNode, SegmentNode
from .plan import AnyPoint
from .tape import Tape, TrainedRoot

# The classes of the nodes themselves, which torch makes and has no types of.
_SEGMENT_NODE: Any = SegmentNode._backward_cls
_GATE_NODE: Any = GateNode._backward_cls
_SQUASHED = ("LogSoftmax", "Softmax", "Sigmoid", "LogSigmoid")


def check(
    root: TrainedRoot, tape: Tape, points: Sequence[AnyPoint], names: Sequence[str], y: Tensor
) -> None:
    """Raises where a path leads round a cut; warns of what else would train unlike DFA.

    Raises:
        RuntimeError: naming both ends of a path that reaches a point, or what is before it,
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
    """Finds which nodes each point, and at last the output, reaches without passing a cut.

    By sources: point k, then the output as number len(points). A region ends at the parameters
    and at the inputs of the root.
    """

    def __init__(self, tape: Tape, points: Sequence[AnyPoint], y: Tensor) -> None:
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
        waiting: list[tuple[Node | None, int]] = [start]
        while waiting:
            node, output = waiting.pop()
            if node is None or (node, output) in seen or (node, output) in self.stops:
                continue
            edge = node, output
            if node.name() == "CompiledFunctionBackward":
                continue  # one node for all of a compiled block: its edges tell no paths
            leaf = _leaf(node)
            if leaf is not None:
                parameters.append(leaf)
                continue
            seen.add(edge)
            waiting += _edges_behind(edge)
        return seen

    def parts(self, source: int) -> set[Node | Edge]:
        """Returns the nodes that a source reaches; of a segment's node the outputs."""
        return {_separate(edge) for edge in self.reached[source]}

    def follows(self, later: int, earlier: int) -> bool:
        """Tells whether a source is computed, through cuts, from what reads point `earlier`."""
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
    """Returns the parameter or other leaf at a node. A cast of one is one: autocast keeps it, so
    that a layer which is called twice reads the same, and no feedback passes there."""
    if node.name() == "ToCopyBackward0" and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    leaf: Tensor | None = getattr(node, "variable", None)
    return leaf


def _check_bypass(regions: _Regions, names: Sequence[str]) -> None:
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


def _readers(tape: Tape, points: Sequence[AnyPoint]) -> dict[int, set[Node | Edge]]:
    """Returns, for each point that layers read, the nodes of their outputs."""
    index = {id(point.tensor): number for number, point in enumerate(points)}
    readers: dict[int, set[Node | Edge]] = {}
    for x, edge in [*tape.readers, *_read_ahead(tape)]:
        if id(x) in index:
            found = readers.setdefault(index[id(x)], set())
            found.update([] if edge is None else [_separate(edge)])
    return readers


def _read_ahead(tape: Tape) -> list[tuple[Tensor, Edge]]:
    """Returns the outputs that layers computed ahead have read, and what they made of each."""
    runs = [run for run, place in tape.made.values() if place == 0]
    pairs = [pair for run in runs for pair in pairwise(run.outputs[: run.called])]
    return [(x, _edge(h)) for x, h in pairs]


def _separate(edge: Edge) -> Node | Edge:
    """Returns what stands for an edge where paths are compared: the node, of a segment one of its
    outputs."""
    return edge if isinstance(edge[0], _SEGMENT_NODE) else edge[0]


def _edges_behind(edge: Edge) -> tuple[tuple[Node | None, int], ...]:
    """Returns the edges that lead on from an edge."""
    node, output = edge
    if isinstance(node, _SEGMENT_NODE):
        return SegmentNode.edges_behind(node, output)
    return node.next_functions


def warn_above_the_last_point(
    root: TrainedRoot, parameters: Iterable[Tensor], stacklevel: int = 4
) -> None:
    """Warns where more than the head trains by the true gradient, or several heads side by side.

    Layers that cut their input are side by side: each ends the path from the output.
    """
    if root.cut_at is not None:  # chosen so
        return
    trained = {id(parameter) for parameter in parameters}
    owners, others = [], 0
    for name, module in own_modules(root.module):
        cuts = isinstance(module, CutLayer)
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


def _warn_output_is_a_point(points: Sequence[AnyPoint], names: Sequence[str], y: Tensor) -> None:
    for point, name in zip(points, names, strict=True):
        if not y.requires_grad and torch._C._is_alias_of(point.tensor, y):  # type: ignore[attr-defined]  # no stub
            warnings.warn(
                f"the output is itself the feedback point {name!r}, so that what is before it "
                "learns from feedback and nothing from the true gradient: leave that point out",
                stacklevel=4,
            )


def _warn_squashed_output(root: TrainedRoot, y: Tensor) -> None:
    """Warns of a poor error: e is the constant -onehot/M there under a log-likelihood (MNIST: 91.5
    against 96.4%)."""
    if y.grad_fn is None:
        return
    name = type(y.grad_fn).__name__.removesuffix("Backward0")
    inside = ""
    if _ends_in_sigmoid(y.grad_fn):
        name, inside = "Sigmoid", " after making the activation a module of its own"
    if name not in _SQUASHED:
        return
    tap = _producer(root.module, y.grad_fn) or "name of the layer before"
    warnings.warn(
        f"the output is a {name}: the error there is a poor signal for feedback, and DFA learns "
        f"worse from it. Take the error before it, by DFA(..., output={tap!r}){inside}",
        stacklevel=4,
    )


def _ends_in_sigmoid(node: Any) -> bool:
    if isinstance(node, _GATE_NODE):
        return bool(node.gate.kind == KINDS.index("sigmoid"))
    if isinstance(node, _SEGMENT_NODE):
        return bool(node.segment.stages[-1].gate.kind == KINDS.index("sigmoid"))
    return False


def _producer(module: nn.Module, below: Node) -> str | None:
    """Returns the name of the module whose parameter is nearest below a node."""
    waiting = [below]
    while waiting:
        node = waiting.pop(0)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            name: str
            for name, inner in own_modules(module):
                if any(leaf is p for p in inner.parameters(recurse=False)):
                    return name
        waiting += [after for after, _ in node.next_functions if after is not None]
    return None
