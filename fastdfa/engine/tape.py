"""Writes the tape of a forward pass: where the network is cut, and what receives feedback there.

A root puts its tape into `state` for the time of its forward; the layers below find it there, so
they hold no reference to a root, and several threads and roots do not meet.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules._functions import BackwardHookFunction

from ..activations import Gate
from ..feedback.bank import Bank
from ..matrices import Learning, Matrices
from ..ops.tracing import traced, wants_gradient
from ..ops.typed import constant
from ..projectors import Projector
from .broadcast import Broadcast, Receiver, under_way
from .handed import HandedToken, Handing
from .layers import CutLayer
from .nodes import BackwardWeight, Edge, Token
from .root import names_in
from .stages import autocast_dtype, saved_tensor_hooks_active


class LayerRule(Protocol):
    """Makes every layer hand down its gradient through a matrix of its own."""

    def backward_weight(self, layer: CutLayer) -> BackwardWeight:
        """Returns what this layer reads in backward, for its call in a forward pass."""


class TrainedRoot(Protocol):
    """Says what the engine asks of the root whose forward pass it serves: a `DFA`."""

    module: nn.Module
    bank: Bank
    seed: Tensor
    handing: Handing
    stamp: int
    output: str | None
    allow_bypass: bool
    cut_at: set[nn.Module] | None
    projector: Projector | None
    target: Tensor | None
    learning: Learning | None
    matrices: Matrices | None
    compression: nn.Parameter | None

    def read_seed(self) -> int:
        """Returns the seed of every B."""

    def columns(self, classes: int) -> int:
        """Returns the columns of what is projected, for an error of so many classes."""

    def names_of_points(self, layers: Sequence[nn.Module]) -> list[str]:
        """Returns the names of the points that these layers read."""

    def holds(self, layer: nn.Module) -> bool:
        """Returns whether this layer is inside the network."""

    def after(self, layer: nn.Module) -> nn.Module | None:
        """Returns the layer that most likely reads the output of this one."""

    def follows(self, layer: nn.Module, reader: nn.Module | None) -> None:
        """Notes that `reader` has read the output of `layer`."""

    def finish(self, tape: Tape, y: Any) -> Any:
        """Returns the output y with the backward of DFA behind it."""


class State(threading.local):
    """Holds, for each thread, the tape being written or the layer rule that runs; the roots inside
    a `backprop()` context; and what some roots run in place of their own forward pass, from its
    args and kwargs."""

    def __init__(self) -> None:
        self._tape: list[Tape | None] = [None]  # see `TracedTape`
        self.layer_rule: LayerRule | None = None
        self.instead: dict[nn.Module, Callable[[tuple[Any, ...], dict[str, Any]], Any]] = {}
        self.true_gradients: tuple[nn.Module, ...] = ()

    @property
    def tape(self) -> Tape | None:
        """Returns the tape being written."""
        return self._tape[0]

    @tape.setter
    def tape(self, tape: Tape | None) -> None:
        self._tape[0] = tape


state = State()


class Run:
    """Records one call of a segment, or of one layer whose gate is fused, with its outputs.

    Attributes:
        layers, gates: of each stage.
        outputs: h_l of each stage, of which the first is what the first layer returned; the others
            were computed ahead of their layers' calls.
        token: where the feedback of all outputs that are points is announced.
        receiver: where the segment's node finds, in backward, what makes that feedback.
        by_rows: whether an output [*rows, n] is a matrix [M, n] to the kernels; else [N, C, *S] is
            one of [N, C S].
        autocast: the dtype of autocast in which it was computed.
        versions: of the weights, from which those ahead were computed.
    """

    __slots__ = (
        "autocast", "by_rows", "called", "gates", "layers", "outputs", "receiver", "token",
        "versions",
    )  # fmt: skip

    def __init__(
        self,
        layers: Sequence[CutLayer],
        gates: Sequence[Gate],
        outputs: Sequence[Tensor],
        token: Tensor,
        receiver: Receiver,
        by_rows: bool,
        autocast: torch.dtype | None = None,
        versions: Sequence[int] = (),
    ) -> None:
        self.layers, self.gates = layers, gates
        self.outputs, self.token, self.receiver = outputs, token, receiver
        self.by_rows, self.autocast, self.versions = by_rows, autocast, versions
        self.called = 1  # layers so far


class Point(NamedTuple):
    """Holds a feedback point: the tensor that `layer` reads, at which the network is cut.

    Its feedback is announced at `token` and made by the node behind that: by `run`, whose output
    number `place` the tensor is, together with the gate; or by a token of its own.
    """

    layer: nn.Module
    tensor: Tensor
    token: Tensor
    receiver: Receiver | None  # None: made in a traced layer, and has to be handed its feedback
    run: Run | None
    place: int
    rows: int | None  # leading dimensions that are rows, where the layer says so
    features: int | None  # the dimension of the features, where others are positions
    previous: Point | None
    version: int | None = None  # of the tensor when it was cut; None in a traced layer

    @property
    def shape(self) -> torch.Size:
        """Returns the shape of the feedback: that of `tensor`, but for its positions."""
        return feedback_shape(self.tensor, self.rows, self.features)

    @property
    def edge(self) -> GradientEdge:
        """Returns where the feedback enters the graph of what is before the point, also where the
        tensor was changed in place since."""
        if self.run is not None or self.version in (None, self.tensor._version):
            return get_gradient_edge(self.tensor)
        token: Any = self.token.grad_fn
        ((node, output),) = token.next_functions
        return GradientEdge(node, output)


_BEHIND_HOOKS: Any = BackwardHookFunction._backward_cls


def chosen_by(root: TrainedRoot, layer: nn.Module) -> bool:
    """Returns whether a root cuts the network at the input of this layer."""
    return root.cut_at is None or _is_among(root, layer)


# A constant of a compiled step, as Dynamo guards its arguments: else what it has compiled of one
# layer served all layers of its class where they are compiled one by one, as behind a graph break.
@constant
def _is_among(root: TrainedRoot, layer: nn.Module) -> bool:
    return root.cut_at is not None and layer in root.cut_at


def was_cut(root: TrainedRoot, inputs: Sequence[Tensor], layer: nn.Module, x: Tensor) -> bool:
    """Returns whether a pass of these inputs has cut the network where a layer reads x."""
    given = any(x is one for one in inputs)
    return not given and root.holds(layer) and chosen_by(root, layer)


def feedback_shape(x: Tensor, rows: int | None, features: int | None) -> torch.Size:
    """Returns the shape of the feedback for x: without its positions, where it has `features`."""
    return x.shape if features is None else torch.Size([*x.shape[:rows], x.shape[features]])


class Tape:
    """Collects the points of one forward pass of one root, newest first.

    A linked list, of which a layer looks at the newest only: where layers are compiled one by one,
    a Python list would be guarded by its length, and recompile each of them.
    """

    looks_ahead = True  # whether layers may be computed ahead of their calls
    cuts = True  # whether a layer goes on from its input without the history of that
    gates = True  # whether layers run their activations themselves, where they know them
    saves = True  # whether layers keep what their backward needs; else they return `unsaved`

    def __init__(self, root: TrainedRoot, inputs: list[Tensor], tap: nn.Module | None) -> None:
        self.root = root
        self.inputs = inputs  # tensors given to the root that require grad: never points
        self.points: Point | None = None  # the newest
        self.made: dict[int, tuple[Run, int]] = {}  # by the id of an output: its run and place
        self.cut_before: set[tuple[int, int]] = set()  # the `moment` of all that is a point
        self.known_edges: set[Edge] | None = None  # of the points, once one of them was `hooked`
        # A tensor that was read, its version, and what a layer made of it.
        self.readers: list[tuple[Tensor, int, Edge | None]] = []
        self.unfed: list[nn.Module] = []  # layers that read what has no gradient
        self.tap = tap  # the module at whose output the error is taken, and
        self.tapped: Tensor | None = None  # that output: nothing is cut after it

    def chosen(self, layer: nn.Module) -> bool:
        """Returns whether the root cuts the network at the input of this layer."""
        return chosen_by(self.root, layer)

    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        """Records x as a point and returns it without its history."""
        if self.is_input(x):
            return x
        if not self._is_point(x):
            self.points = self.point(layer, x, rows, features)
        return x.detach()

    def is_input(self, x: Tensor) -> bool:
        for given in self.inputs:
            if x is given:
                return True
        if not self.inputs or not hooked(x):
            return False
        return behind_hooks(x) in map(behind_hooks, self.inputs)

    def _is_point(self, x: Tensor) -> bool:
        """Returns whether x is a point already; it is one from now on."""
        if torch.compiler.is_compiling():  # what a traced layer tells twice is found at the end
            return self.points is not None and self.points.tensor is x
        key = moment(x)
        known = key in self.cut_before
        self.cut_before.add(key)
        if self.known_edges is None and not hooked(x):
            return known
        if self.known_edges is None:
            self.known_edges = {behind_hooks(point.tensor) for point in self.in_order()}
        edge = behind_hooks(x)
        known = known or edge in self.known_edges
        self.known_edges.add(edge)
        return known

    def run_of(self, x: Tensor, rows: int | None, features: int | None) -> tuple[Run, int] | None:
        """Returns the run that made x, and the place among its outputs, if that can make its
        feedback."""
        if traced() or rows is not None or features is not None:
            return None
        return self.made.get(id(x))

    def point(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Point:
        """Returns a new point, of x."""
        found = self.run_of(x, rows, features)
        if found is not None:
            run, place = found
            if self.looks_ahead and run.by_rows and place == len(run.outputs) - 1:
                self.root.follows(run.layers[place], layer)
            token, receiver = run.token, run.receiver
            return Point(
                layer, x, token, receiver, run, place, rows, features, self.points, x._version
            )
        if traced():
            token = HandedToken.apply(x, rows, features)
            return Point(layer, x, token, None, None, 0, rows, features, self.points, None)
        receiver = Receiver()
        token = Token.apply(x, rows, features, receiver)
        return Point(layer, x, token, receiver, None, 0, rows, features, self.points, x._version)

    def passed(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> None:
        """Notes that `layer` read x, which is no point, as no gradient is wanted for it.

        Raises:
            RuntimeError: inside an autograd function, see `refuse_in_function`.
        """
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            self.unfed.append(layer)
        else:
            refuse_in_function(layer)

    def add(self, run: Run) -> None:
        """Puts a run on the tape, whose outputs may be read next."""
        for place, output in enumerate(run.outputs):
            self.made[id(output)] = run, place

    def take(self, layer: CutLayer, x: Tensor) -> Tensor | None:
        """Returns the output of `layer`, if it was computed ahead from x; makes x a point.

        What may have changed since, autocast or the weight, is asked for; a weight changed through
        `.data` between two layers of one pass is not seen.
        """
        found = self.made.get(id(x))
        if found is None:
            return None
        run, place = found
        after = place + 1
        if after != run.called or after == len(run.outputs) or run.layers[after] is not layer:
            return None
        if run.versions[after] != layer.weight._version:
            return None
        if run.autocast != autocast_dtype(x) or saved_tensor_hooks_active():
            return None
        run.called = after + 1
        if not self._is_point(x):
            token, receiver, version = run.token, run.receiver, x._version
            self.points = Point(
                layer, x, token, receiver, run, place, None, None, self.points, version
            )
        return run.outputs[after]

    def read(self, x: Tensor, edge: Edge | None) -> None:
        """Notes that `edge`, where there is one, was computed from x behind its cut, for the search
        for bypasses."""
        self.readers.append((x, x._version, edge))

    def broadcast(self, plan: Any) -> Broadcast:
        """Returns what makes the feedback in the backward passes of this forward pass."""
        broadcast: Broadcast = plan.broadcast()
        return broadcast

    def unsaved(self, h: Tensor) -> Tensor:
        """Returns the output of a layer that has kept nothing for its backward; only a tape that
        saves nothing is asked."""
        raise AssertionError("a tape that saves what layers need has no unsaved output")

    def mode(self) -> AbstractContextManager[Any]:
        """Returns the context in which a pass of this tape runs."""
        return torch.enable_grad()

    def end(self, y: Any) -> Any:
        """Comes to the output y, at which the error is taken; y goes on as returned."""
        return self.root.finish(self, y)

    def in_vain(self) -> list[nn.Module]:
        """Returns the layers behind which others were computed ahead that were not called so."""
        runs = [run for run, place in self.made.values() if place == 0]
        return [run.layers[run.called - 1] for run in runs if run.called < len(run.layers)]

    def in_order(self) -> list[Point]:
        """Returns the points from the input up; of several that read one tensor, the first."""
        points: list[Point] = []
        newest = self.points
        while newest is not None:
            points.append(newest)
            newest = newest.previous
        return _distinct(points[::-1])


def _element(place: int) -> Any:
    """Returns a property that is kept in a list."""

    def read(tape: TracedTape) -> Any:
        return tape.written[place]

    def write(tape: TracedTape, value: Any) -> None:
        tape.written[place] = value

    return property(read, write)


class TracedTape(Tape):
    """Serves passes that Dynamo traces, which (PyTorch 2.13) forgets what is written into an
    attribute after a tensor hook, but not what is written into a list."""

    points, tapped = map(_element, range(2))

    def __init__(self, *args: Any) -> None:
        self.written: list[Any] = [None] * 2
        super().__init__(*args)


def _distinct(points: list[Point]) -> list[Point]:
    if not torch.compiler.is_compiling():
        first: dict[tuple[int, int], Point] = {}
        for point in points:
            x, version = point.tensor, point.version
            first.setdefault((id(x), x._version if version is None else version), point)
        return list(first.values())
    # Not by id: compiled in pieces, a step guards its value and is compiled again each time.
    distinct: list[Point] = []
    for point in points:
        if not any(point.tensor is other.tensor for other in distinct):
            distinct.append(point)
    return distinct


def hooked(x: Tensor) -> bool:
    """Returns whether x is what a module with full backward hooks reads in the place of its input:
    another tensor of the same values."""
    # Where a module has such hooks, Dynamo breaks the graph.
    return not torch.compiler.is_compiling() and type(x.grad_fn) is _BEHIND_HOOKS


def behind_hooks(x: Tensor) -> Edge:
    """Returns the place in the graph of x, or of what x stands for where it is `hooked`."""
    node: Any
    node, output = get_gradient_edge(x)[:2]
    while type(node) is _BEHIND_HOOKS:
        node, output = node.next_functions[output]
    return node, output


def moment(x: Tensor) -> tuple[int, int]:
    """Returns what tells a tensor, while it lives, from others and from itself before it was
    changed in place."""
    return id(x), x._version


def refuse_in_function(layer: nn.Module) -> None:
    """Raises a RuntimeError where a layer is called inside an autograd function, without a graph,
    in the forward pass of a root.

    That function will run it again in the backward pass, when no root is near, and so by true
    gradients; or never, where nothing it reads has a gradient, as behind a cut. A reentrant
    activation checkpoint is one, and so are those of libraries that have their own. Only the
    frames of the stack tell that from a plain `torch.no_grad`.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _APPLY:
            root: Any = state.layer_rule if state.tape is None else state.tape.root
            name = names_in(root.module).get(layer, type(layer).__name__)
            raise RuntimeError(
                f"{name!r} is called without a graph, inside the autograd function "
                f"{frame.f_locals['cls'].__name__}, and so would not be trained by feedback. If "
                "that is a reentrant activation checkpoint, use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        frame = frame.f_back


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]  # a class method


def watched(x: Tensor) -> bool:
    """Returns whether someone waits for the gradient of x itself, which a run never makes."""
    return bool(x._backward_hooks) or x.retains_grad


def cut(
    layer: nn.Module, x: Tensor, rows: int | None = None, features: int | None = None
) -> Tensor:
    """Makes the input x of `layer` a feedback point, where a tape is being written.

    With `features`, one dimension of x behind the rows, the others behind them are positions.
    """
    tape = state.tape
    if tape is None:
        if not torch.compiler.is_compiling() and under_way.cuts(layer, x):
            return x.detach()
        note_outside(layer)
        return x
    if tape.tapped is not None or not tape.chosen(layer):
        return x
    if torch.is_grad_enabled() and wants_gradient(x):
        return tape.cut(layer, x, rows, features)
    tape.passed(layer, x, rows, features)
    return x


class OfRoot:
    """Says of a converted layer or block, in its attribute `of_root`, which it is; `told` is shared
    by all of one network, and not empty once one has run outside."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name = name
        self.told = told


def note_outside(layer: nn.Module) -> None:
    """Warns, once for a network, where a part of it that was converted runs with gradients and its
    root does not: they are backprop's. Inside `backprop()` and where a checkpoint runs it again
    that is meant."""
    of_root: OfRoot | None = layer.__dict__.get("of_root")
    if of_root is None or of_root.told or not torch.is_grad_enabled() or state.true_gradients:
        return
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return
    of_root.told.append(of_root.name)
    warnings.warn(
        f"{of_root.name or 'the model'!r} was converted by fastdfa.convert and is called outside "
        "of the model, whose call would cut there: its gradients are those of backprop. Call the "
        "model, or use torch.no_grad() or fastdfa.backprop(model) where that is meant",
        stacklevel=2,
    )


def note_reader(x: Tensor, output: Tensor) -> None:
    """Notes that `output` was computed from x behind its cut, for the search for bypasses."""
    tape = state.tape
    if tape is None or traced():
        return
    tape.read(x, None if output.grad_fn is None else (output.grad_fn, output.output_nr))
