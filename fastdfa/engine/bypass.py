"""Checks on the graph of a forward pass: no way round a cut, nothing but the head above.

Feedback enters the graph at every *source*: at each point, and at the output, where it is the true
gradient. It goes down from there to wherever autograd leads, as far as the next cut. A way round a
cut is one of two:

- A source reaches another point. That receives its feedback in place of all the gradient that would
  come to it, along whatever path. So `cat([b1(h), b2(pool(h))])` is refused: h is a point, as b1
  reads it, and the feedback at pool(h) would come to it as well.
- A source that lies behind the cut at a point reaches what is before that point, as with
  `h + layer(norm(h))`: there what all later layers send would gather, cut or not.

Points side by side, of which neither lies behind the other's cut, may have a trunk in common, as
with `b1(tanh(h)) + b2(pool(h))`: it receives the sum of their feedback, as by the chain rule.

What lies behind a cut is told by the layers that read there. A `FeedbackPoint`, and a frozen layer,
leave no history: every later node that reads something without one is taken to read what they made.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from ..activations import KINDS
from .inplace import own_modules
from .layers import CutLayer
from .nodes import Edge, GateNode, SegmentNode
from .plan import AnyPoint
from .root import names_in
from .tape import Tape, TrainedRoot

# The classes of the nodes themselves, which torch makes and has no types of.
_SEGMENT_NODE: Any = SegmentNode._backward_cls
_GATE_NODE: Any = GateNode._backward_cls
_COMPILED = "CompiledFunctionBackward"  # one node for all of a compiled block, without paths
_SQUASHED = ("LogSoftmax", "Softmax", "Sigmoid", "LogSigmoid")
# Modules that call those which they hold one after the other, or leave that to who holds them.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# A place in the graph where paths are compared: a node, of a segment's one of its outputs. A number
# k stands for all that reads the first k of the points whose readers leave no history.
Place = Node | Edge | int


def check(
    root: TrainedRoot, tape: Tape, points: Sequence[AnyPoint], names: Sequence[str], y: Tensor
) -> None:
    """Raises where a path leads round a cut; warns of what else would train unlike DFA.

    Raises:
        RuntimeError: naming both ends of a way round a cut, and what mends it.
    """
    graph = _Graph(tape, points, y)
    if not root.allow_bypass and graph.sources_meet():
        bypass = _find(graph)
        if bypass is not None:
            raise RuntimeError(_message(root.module, bypass, [*names, "the output"]))
    warn_above_the_last_point(root, _trained_by(graph, y))
    _warn_output_is_a_point(points, names, y)
    _warn_squashed_output(root, y)


class _Graph:
    """Leads from each place in the graph of a pass to those that it was made from.

    Attributes:
        sources: where feedback enters: the points' edges, then the output's, if it has one.
        points: the number of the point at an edge.
        read: of what layers made, the numbers of the points that they read.
        unseen: the numbers of the points whose readers leave no history, as these were made.
    """

    def __init__(self, tape: Tape, points: Sequence[AnyPoint], y: Tensor) -> None:
        self.sources: list[Edge] = [(point.edge.node, point.edge.output_nr) for point in points]
        self.points = {edge: number for number, edge in enumerate(self.sources)}
        if y.grad_fn is not None:
            self.sources.append(_edge(y))
        self.read: dict[Place, list[int]] = {}
        unseen: list[tuple[int, int]] = []
        for number, edges in enumerate(_readers(tape, points)):
            if not edges or None in edges:
                unseen.append((_time(self.sources[number][0]), number))
            for edge in edges:
                if edge is not None:
                    self.read.setdefault(_place(edge), []).append(number)
        unseen.sort()
        self._times = [time for time, _ in unseen]
        self.unseen = [number for _, number in unseen]
        self._stops = {_edge(x) for x in tape.inputs}

    def edges(self, place: Place) -> list[Edge]:
        """Returns the edges that lead on from a place without passing a cut, down to parameters."""
        if isinstance(place, int) or _node(place).name() == _COMPILED:
            return []
        behind = _edges_behind(place)
        return [(node, k) for node, k in behind if node and (node, k) not in self._stops]

    def inputs(self, place: Place) -> list[Edge]:
        """Returns those that feedback follows: to no parameter, unless that is itself a point."""
        return [edge for edge in self.edges(place) if edge in self.points or _leaf(edge[0]) is None]

    def cuts(self, place: Place) -> list[int]:
        """Returns the points whose cut is passed where one goes on from a place to `readings`."""
        return [self.unseen[place - 1]] if isinstance(place, int) else self.read.get(place, [])

    def behind(self, place: Place) -> list[Place]:
        """Returns all places that a place was made from, be it through cuts."""
        found: list[Place] = [_place(edge) for edge in self.inputs(place)]
        found += [_place(self.sources[point]) for point in self.cuts(place)]
        if isinstance(place, int):
            before = place - 1
        else:
            before = 0 if place in self.read else self._without_history(place)
        return [*found, before] if before else found

    def _without_history(self, place: Node | Edge) -> int:
        """Returns how many of the unseen points may be read at a place."""
        node, left = _node(place), [before for before, _ in _edges_behind(place)].count(None)
        if getattr(node, "_saved_bias_sym_sizes_opt", None) == (0,):  # a convolution without one
            left -= 1
        return bisect_left(self._times, _time(node)) if left or node.name() == _COMPILED else 0

    def reached(self, starts: Iterable[Edge]) -> Iterator[Place]:
        """Yields the places that lie behind these edges without a cut between."""
        waiting, seen = [_place(edge) for edge in starts], set[Place]()
        while waiting:
            place = waiting.pop()
            if place not in seen:
                seen.add(place)
                yield place
                waiting += [_place(edge) for edge in self.inputs(place)]

    def sources_meet(self) -> bool:
        """Tells whether a source reaches another point, or a place that another reaches too; most
        networks have none, and need no more than this."""
        owner: dict[Place, int] = {}
        for source, start in enumerate(self.sources):
            waiting = [start]
            while waiting:
                edge = waiting.pop()
                place = _place(edge)
                if self.points.get(edge, source) != source or owner.get(place, source) != source:
                    return True
                if place not in owner:
                    owner[place] = source
                    waiting += self.inputs(place)
        return False

    def upwards(self) -> list[Place]:
        """Returns all places, through cuts too, each behind all that it was made from."""
        order: list[Place] = []
        seen: set[Place] = set()
        for start in self.sources:
            waiting: list[tuple[Place, bool]] = [(_place(start), False)]
            while waiting:
                place, done = waiting.pop()
                if done:
                    order.append(place)
                elif place not in seen:
                    seen.add(place)
                    waiting.append((place, True))
                    waiting += [(other, False) for other in self.behind(place)]
        return order


class _Bypass(NamedTuple):
    """Holds a way round a cut: `source` reaches `point`, or what is before it."""

    source: int
    point: int
    behind: bool  # whether the source lies behind the cut at the point


def _find(graph: _Graph) -> _Bypass | None:
    """Returns a way round a cut, of several the first source's.

    In one pass up the graph, which tells the cuts behind each place, and one down, which carries
    the sources that reach it. Both are sets of numbers, the bits of an int.
    """
    order = graph.upwards()
    passed: dict[Place, int] = {}  # the points whose cuts lie behind a place
    for place in order:
        passed[place] = _union([1 << point for point in graph.cuts(place)])
        passed[place] |= _union([passed[other] for other in graph.behind(place)])
    behind = [passed[_place(edge)] for edge in graph.sources]  # each source
    reaching: dict[Place, int] = dict.fromkeys(order, 0)  # the sources that reach a place
    before: dict[Place, int] = dict.fromkeys(order, 0)  # and the points that one of them is behind
    found: _Bypass | None = None
    for source, edge in enumerate(graph.sources):
        reaching[_place(edge)] |= 1 << source
        before[_place(edge)] |= behind[source]
        if graph.points.get(edge, source) != source:  # the output is itself a point
            found = _Bypass(source, graph.points[edge], False)
    for place in reversed(order):
        if reaching[place] & before[place]:
            found = _first(found, _met(reaching[place], behind))
        for edge in graph.inputs(place):
            if edge in graph.points:
                found = _first(found, _hit(graph.points[edge], reaching[place], behind))
            reaching[_place(edge)] |= reaching[place]
            before[_place(edge)] |= before[place]
    return found


def _met(reaching: int, behind: Sequence[int]) -> _Bypass:
    """Returns which of the sources that meet lies behind the cut of which; one does."""
    source = next(source for source in _bits(reaching) if behind[source] & reaching)
    return _Bypass(source, (behind[source] & reaching).bit_length() - 1, True)


def _hit(point: int, reaching: int, behind: Sequence[int]) -> _Bypass | None:
    """Returns the first of the sources that reach a point, if one does."""
    for source in _bits(reaching):
        return _Bypass(source, point, bool(behind[source] >> point & 1))
    return None


def _first(a: _Bypass | None, b: _Bypass | None) -> _Bypass | None:
    return min((each for each in (a, b) if each is not None), default=None)


def _union(sets: Iterable[int]) -> int:
    union = 0
    for each in sets:
        union = union | each if union else each  # no copy of a large one
    return union


def _bits(numbers: int) -> Iterator[int]:
    """Yields the numbers of a set, the smallest first."""
    while numbers:
        yield (numbers & -numbers).bit_length() - 1
        numbers &= numbers - 1


def _trained_by(graph: _Graph, y: Tensor) -> list[Tensor]:
    """Returns the parameters that the true gradient of y trains."""
    starts = [] if y.grad_fn is None else [_edge(y)]
    nodes = [node for place in graph.reached(starts) for node, _ in graph.edges(place)]
    return [leaf for leaf in map(_leaf, nodes) if leaf is not None]


def _message(module: nn.Module, bypass: _Bypass, names: Sequence[str]) -> str:
    earlier, later = names[bypass.point], names[bypass.source]
    end = later if later == "the output" else f"the input of {later!r}"
    if bypass.behind:
        what = (
            f"a path leads from {end} back to the input of {earlier!r}, or to what feeds it, "
            "without passing a cut: later feedback would reach it as well, as it does along a skip "
            "connection, h + layer(h)"
        )
    else:
        what = (
            f"{end} is made of the input of {earlier!r} without passing a cut: branches of one "
            "tensor meet there, which would receive the feedback of both"
        )
    block = _block(module, earlier, later)
    mend = (
        f"put a fastdfa.FeedbackPoint where the two part, h = self.point(h), in front of "
        f"{earlier!r} and of what else reads h (for blocks that add to h, after each add)"
    )
    if block is not None:
        mend += (
            f"; or train each block such as {block!r} as a whole, with a point behind it in place "
            f"of those inside: fastdfa.convert(model, blocks=[{block!r}])"
        )
    return f"{what}. To mend it, {mend}; or accept the path with DFA(..., allow_bypass=True)"


def _block(module: nn.Module, earlier: str, later: str) -> str | None:
    """Returns the name of the smallest module inside that holds both ends of a path, and is called.

    What only calls its modules in turn, or the network itself, holds no skip: that is in the one of
    these which holds the earlier end. None where this is the layer there.
    """
    modules = {name: inner for inner, name in names_in(module).items()}
    parts, others = (name.partition("#")[0].split(".") for name in (earlier, later))
    depth = 0
    while depth < min(len(parts) - 1, len(others)) and parts[depth] == others[depth]:
        depth += 1
    while depth == 0 or isinstance(modules.get(".".join(parts[:depth])), _CONTAINERS):
        depth += 1
    return ".".join(parts[:depth]) if depth < len(parts) else None


def _leaf(node: Node) -> Tensor | None:
    """Returns the parameter or other leaf at a node. A cast of one is one: autocast keeps it, so
    that a layer which is called twice reads the same, and no feedback passes there."""
    if node.name() == "ToCopyBackward0" and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    leaf: Tensor | None = getattr(node, "variable", None)
    return leaf


def _edge(x: Tensor) -> Edge:
    edge = get_gradient_edge(x)
    return edge.node, edge.output_nr


def _place(edge: Edge) -> Node | Edge:
    return edge if isinstance(edge[0], _SEGMENT_NODE) else edge[0]


def _node(place: Node | Edge) -> Node:
    return place[0] if isinstance(place, tuple) else place


def _edges_behind(place: Node | Edge) -> tuple[tuple[Node | None, int], ...]:
    """Returns all edges that lead on from a place; None stands for a tensor without history."""
    if isinstance(place, tuple):
        return SegmentNode.edges_behind(*place)
    return place.next_functions


def _time(node: Node) -> int:
    """Returns a number that grows from node to node as they are made; of a leaf, as the first."""
    return 0 if hasattr(node, "variable") else node._sequence_nr()


def _readers(tape: Tape, points: Sequence[AnyPoint]) -> list[list[Edge | None]]:
    """Returns what layers made of each point behind its cut; None of one that is frozen."""
    readers: dict[tuple[int, int | None], list[Edge | None]] = {}
    for x, version, edge in [*tape.readers, *_read_ahead(tape)]:
        readers.setdefault((id(x), version), []).append(edge)
    return [readers.get((id(point.tensor), point.version), []) for point in points]


def _read_ahead(tape: Tape) -> list[tuple[Tensor, int, Edge]]:
    """Returns the outputs that layers computed ahead have read, and what they made of each."""
    runs = [run for run, place in tape.made.values() if place == 0]
    pairs = [pair for run in runs for pair in pairwise(run.outputs[: run.called])]
    return [(x, x._version, _edge(h)) for x, h in pairs]


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
