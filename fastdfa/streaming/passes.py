"""Makes the forward passes of a streaming step: one for the error, one that updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge, saved_tensors_hooks
from torch.utils.weak import WeakTensorKeyDictionary

from .. import signals
from ..dfa import DFA
from ..engine import stages
from ..engine.broadcast import Broadcast, Product, as_matrix
from ..engine.finish import announced, check_output, sent_by, take_target
from ..engine.nodes import Edge
from ..engine.plan import product_of, what_is_read
from ..engine.tape import Point, Tape, feedback_shape
from ..matrices import Learning, learning_gradients
from ..ops.typed import uncompiled
from .call import Call, End
from .schedule import Known, Reading, Schedule, schedule_of
from .updates import Updates


def _eagerly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a method break the graph where it is compiled, at no cost where it is not."""
    disabled = uncompiled(method)

    @wraps(method)
    def call(*args: Any) -> Any:
        return disabled(*args) if torch.compiler.is_compiling() else method(*args)

    return call


class FirstPass(Tape):
    """Gives the error. It saves nothing, and notes which layers read what.

    A loss that reaches into it fails: behind an activated layer's output is a hook that refuses a
    gradient, and behind all else a graph without what autograd would save. A survey has the graph
    of every layer, and keeps it to its end.
    """

    looks_ahead = False  # that would keep activations
    root: DFA

    def __init__(self, call: Call, survey: bool) -> None:
        super().__init__(call.root, [], call.root.install_tap())
        self.survey = self.saves = survey
        self.call = call
        self.readings: list[Reading] = []
        self.output: Tensor | None = None  # a leaf: its gradient is the error
        self.schedule: Schedule | None = None
        self._cut = WeakTensorKeyDictionary()  # the latest reading that made each tensor a point
        self._ended: list[bool] = []

    @contextmanager
    def mode(self) -> Iterator[None]:
        ended = self._ended  # the hooks must not hold self, as they are held by its graph
        drop = saved_tensors_hooks(lambda x: x.detach() if ended else None, _unpack)
        with torch.enable_grad(), drop:
            yield

    @_eagerly
    def passed(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> None:
        super().passed(layer, x, rows, features)
        self.readings.append(Reading(layer, blank(x), rows, features, None, x._version))

    @_eagerly
    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        new = self.survey and self._reading(x) is None
        edge = get_gradient_edge(x) if new else None
        self.readings.append(Reading(layer, blank(x), rows, features, edge, x._version))
        if new:
            self._cut[x] = self.readings[-1]
        return x.detach()

    def _reading(self, x: Tensor) -> Reading | None:
        """Returns the reading that made x a point, as x is now."""
        first: Reading | None = self._cut.get(x)
        return first if first is not None and first.version == x._version else None

    @_eagerly
    def unsaved(self, h: Tensor) -> Tensor:
        """Returns the output of an activated layer, computed without a graph.

        A graph behind each took a third of a pass of 32 layers of 16.
        """
        h.requires_grad_().register_hook(refuse)
        return h

    def read(self, x: Tensor, edge: Edge | None) -> None:
        first = self._reading(x)
        if first is not None:
            self.readers.append((first.tensor, first.version, edge))

    def end(self, y: Any) -> Tensor:
        check_output(y, self.root.output)
        if self.survey:
            trained = self.call.trained
            self.schedule = schedule_of(self.root, self, self.readings, trained, y)
            self._cut, self.readers = WeakTensorKeyDictionary(), []  # these hold the graph
            self.readings = [reading._replace(edge=None) for reading in self.readings]
        self._ended.append(True)
        self.output = y.detach().requires_grad_()
        return self.output

    def backward(self, loss: Tensor) -> None:
        """Gives the output its error, and what follows it or the loss reads besides a gradient."""
        with self.call.without_autocast():
            loss.backward()


_RUN_AGAIN = (
    "a checkpoint has a feedback point inside, and runs its layers again in a StreamingStep that "
    "has updated some of them: expected checkpoints between points, which a StreamingStep hardly "
    "needs, or an ordinary step. Some layers are updated already"
)


class UpdatingPass(Tape):
    """Sends each point its feedback in turn, updates what is before it, and lets go of that.

    Of the error e [*rows, C] and the output y, only what the signal needs is read.
    """

    looks_ahead = False  # that would keep activations
    root: DFA
    role: str  # which pass this is, which it must equal, and what else could be done
    before: str
    advice: str

    def __init__(
        self, call: Call, known: Known, error: Tensor, output: Tensor, updates: Updates
    ) -> None:
        root = call.root
        super().__init__(root, [], root.install_tap())
        self.call, self.known, self.updates, self.error = call, known, updates, error
        root.planner.layout = known.layout
        self.settled = root.bank.settle(root.read_seed(), known.layout)
        self.target, self.learning = take_target(root), root.learning
        self.products: list[Product] = []
        self.dense: list[Tensor | None] = []
        self.feedback = Broadcast(root.planner.drawn(root), self.products, self.dense, None, {})
        self.feedback.send(sent_by(root, known.layout, error, output, self.target))
        self.reached = 0
        self.waiting: dict[int, Point] = {}  # points that are reached and have no feedback yet
        self.due: list[int] = []  # sources whose turn has come
        self.complete: list[Tensor] = []  # parameters to update when these have sent
        self.sending = False  # whether a backward pass runs
        self._cut = WeakTensorKeyDictionary()  # what was a point already, and its version

    def read(self, x: Tensor, edge: Edge | None) -> None:
        pass  # nothing looks for bypasses

    @_eagerly
    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        if self._cut.get(x) != x._version:
            if self.sending:
                raise RuntimeError(_RUN_AGAIN)
            self._cut[x] = x._version
            number = self.reached
            self._reach(layer, feedback_shape(x, rows, features))
            self._plan(announced(self.point(layer, x, rows, features)), number)
            self.made.clear()  # it would keep the layers before
            if self._held() >= stages.workspace(x.device):
                self._send()
        return x.detach()

    def _held(self) -> float:
        """Returns the bytes that the points hold whose turn has come."""
        return sum(_bytes_held(self.waiting[k]) for k in self.due if k in self.waiting)

    def _plan(self, point: Point, number: int) -> None:
        """Plans the feedback of a point, which waits for its turn."""
        root, layout = self.root, self.known.layout
        y, settled = blank(self.error), self.settled[number]
        product = product_of(point, y, settled, root.bank, layout, root.projector is not None)
        self.products.append(product)
        self.dense.append(root.planner.dense(root, layout, settled, product))
        receiver: Any = point.receiver  # there, as the point is `announced`
        receiver.set(self.feedback, number, point.place)
        self.waiting[number] = point

    def _reach(self, layer: nn.Module | None, shape: torch.Size) -> None:
        """Comes to the next source: the point of a layer or, for None, the output."""
        left = self.known.points[self.reached : self.reached + 1]
        wanted = (left[0].layer, left[0].shape) if left else (None, self.known.output.shape)
        if (layer, shape) != wanted:
            raise RuntimeError(
                f"{self.role} of a StreamingStep came to {_described(layer, shape)} where "
                f"{self.before} came to {_described(*wanted)}, and some layers may be updated "
                f"already: a model must do the same in both, {self.advice}"
            )
        self.due += self.known.schedule.due[self.reached]
        self.complete += self.known.schedule.complete[self.reached]
        self.reached += 1

    def _send(self, *true: tuple[Tensor, Tensor | None]) -> list[Node]:
        """Sends the points that are due their feedback, and updates what is complete then.

        `true` are tensors with their true gradients, for what is above the last point. Returns
        where the feedback entered the graph.
        """
        due = sorted(k for k in self.due if k in self.waiting)
        points = [self.waiting.pop(k) for k in due]
        nodes = [point.edge.node for point in points]
        if self.learning is not None and points:
            self._learn(self.learning, points, due)
        sent = [*true, *((point.token, torch.zeros_like(point.token)) for point in points)]
        del points  # the graph holds what it needs, and frees it as it goes
        sent = [pair for pair in sent if pair[0].requires_grad]
        if sent:
            with self.call.without_autocast():
                tensors, gradients = zip(*sent, strict=True)
                self.sending = True
                torch.autograd.backward(tensors, gradients)
                self.sending = False
        self.updates.update(self.complete)
        self.due, self.complete = [], []
        return nodes

    def _learn(self, learning: Learning, points: list[Point], numbers: list[int]) -> None:
        """Gives the B of these points their gradients, to be updated after the feedback is sent."""
        root, rows = self.root, self.error.shape[:-1].numel()
        assert root.matrices is not None  # as they learn
        matrices = [root.matrices.of(self.settled[k].size.name) for k in numbers]
        target = None
        if learning.needs_target:
            target = signals.given(self.target, self.error, f"the rule {learning.name}")
        reads = [what_is_read(point, rows) for point in points]
        e, low = as_matrix(self.error), root.compression
        with torch.no_grad():
            of_low, made = learning_gradients(learning, e, target, low, reads, matrices)
        for matrix, gradient in zip([low, *matrices], [of_low, *made], strict=True):
            if matrix is not None and gradient is not None and matrix.requires_grad:
                matrix.grad = gradient
        self.complete += matrices
        # A Q that all points share learns once, and is updated at the end of the step.
        self.learning = learning._replace(compression=None)


class SecondPass(UpdatingPass):
    """Knows the error from the first."""

    role, before = "the second pass", "the first"
    advice = "so random choices by torch's generators alone"

    def end(self, y: Tensor) -> Tensor:
        self._reach(None, y.shape)
        self._send((y, self.error))
        if self.tap is not None:
            raise End
        return y


class OnlyPass(UpdatingPass):
    """Sends the feedback of the target, and leaves what is above the last point to the loss."""

    role, before = "the only pass", "that of an earlier step with inputs of these sizes"
    advice = "or its signal be one that needs the error, as signals.Target()"

    def __init__(self, call: Call, known: Known, updates: Updates) -> None:
        # Not read, or seen in all that is made of it.
        error = known.output.new_full((), math.nan).expand(known.output.shape)
        super().__init__(call, known, error, known.output, updates)
        self.output: Tensor | None = None

    def _send(self, *true: tuple[Tensor, Tensor | None]) -> list[Node]:
        nodes = super()._send(*true)
        for node in nodes:  # a gradient from the loss would come too late
            with suppress(RuntimeError):  # PyTorch 2.11: where nothing leads to the node any more
                node.register_prehook(refuse)
        return nodes

    def end(self, y: Any) -> Any:
        check_output(y, self.root.output)
        self._send()
        self._reach(None, y.shape)
        self.output = blank(y)
        return y if y.requires_grad else y.detach().requires_grad_()  # above it nothing learns

    def backward(self, loss: Tensor) -> None:
        """Gives all that is above the last point, or that the loss reads besides, its gradient."""
        self._send((loss, None))


def blank(x: Tensor) -> Tensor:
    """Returns a tensor of the shape of x, without memory."""
    return x.new_empty(()).expand(x.shape)


def _bytes_held(point: Point) -> float:
    """Returns the bytes of a layer alone: its output, and the delta and gradient to be made."""
    if point.run is None:  # how much a block saves is not known: it does not wait for others
        return math.inf
    weight = point.run.layers[point.place].weight
    return float(2 * point.tensor.nbytes + weight.nbytes)


def _unpack(saved: Tensor | None) -> Tensor:
    if saved is None:
        refuse()
    return saved


def refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "the loss of a StreamingStep reaches into the DFA other than by the output at which the "
        "error is taken: what it reads there is not kept. Make an ordinary step, or let "
        "DFA(..., output=name) name a submodule whose output is all that the loss needs"
    )


def _described(layer: nn.Module | None, shape: torch.Size) -> str:
    if layer is None:
        return f"the output, of shape {tuple(shape)}"
    return f"a point of shape {tuple(shape)} before {type(layer).__name__}"
