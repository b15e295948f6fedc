"""Streaming: a training step that keeps the activation and the gradient of one layer at a time.

DFA makes no layer's gradient from another's: once the error is known, a layer can be updated as
soon as it has run. So there are two forward passes. The first saves nothing and gives the error;
the second feeds every point as it cuts, updates what is before it, and goes on (MEM-DFA, arXiv
2012.11745). That is a forward pass more than an ordinary step takes: backprop's arithmetic.

What is made of the target alone needs no error (DRTP, arXiv 1909.01311). Then the only pass is one
like the second, and the error trains what is above the last point.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states
from torch.utils.weak import WeakTensorKeyDictionary

from ..dfa import DFA, Layout, Settled, check_output
from ..engine import bypass, plan
from ..engine.tape import Edge, LayerRecord, Point, Tape, state
from ..matrices import learnt
from ..ops import capture


class StreamingStep:
    """A training step whose memory does not grow with depth; its update is the ordinary step's.

        step = fastdfa.StreamingStep(model, optimizer)
        for x, y in batches:
            loss = step(lambda: nn.functional.cross_entropy(model(x), y))
            scheduler.step()

    It stands for forward, `loss.backward()`, `optimizer.step()` and `zero_grad()`. The network runs
    twice: for the error, without saving anything; then again, where each layer is fed as soon as
    it has run, is updated, and lets go of its activation and gradient (MEM-DFA, arXiv 2012.11745).
    The second pass has the random numbers and buffers of the first: the same dropout, and batch
    norm's statistics are updated once. Whatever else the model's forward and its hooks do, they do
    twice. The first step also records the graph, without activations, to know when a gradient is
    complete; a later one that calls other layers than the one before takes a third pass for that.

    Where the signal is `signals.Target(raw=True)`, or another that is `known_ahead`, nothing waits
    for the error but what is above the last point, and the network runs once: every layer is
    updated while the closure calls the model (DRTP, arXiv 1909.01311). A call of sizes that were
    not there before takes two passes, to record when gradients are complete. (With `raw=False` the
    rows of a signal are as long as those of the error, and so need it.)

    The optimizer remains an ordinary one, with its groups, `state_dict` and schedulers; its `step`
    is called for some parameters at a time. So what needs all gradients at once cannot be had:
    LBFGS, clipping by the global norm, `GradScaler` (bfloat16 needs none), accumulation of
    gradients. A parameter that several blocks use is updated after the last of them; what follows
    the output named by `DFA(output=)`, and in a single pass what the loss itself reads, at the end
    of the step. A B that learns is updated with the layer that it feeds, after that.

    Args:
        model: a `DFA`, or a module that holds one.
        optimizer: of parameters of the model and, where the loss has some, of others.

    Raises:
        TypeError, ValueError: for a model that does not hold one `DFA`, and for an optimizer of
            none of its parameters, whose `step` demands a closure, or that has step hooks.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.root = _root(model)
        _check_optimizer(optimizer, self.root)
        self.optimizer = optimizer
        self._schedule: _Schedule | None = None
        self._known: dict[Hashable, _Known] = {}

    def __call__(self, closure: Callable[[], Tensor]) -> Tensor:
        """Makes a step. Returns the loss, detached.

        Args:
            closure: calls the model once and returns the loss, a scalar. It is called once.

        Raises:
            TypeError, ValueError, RuntimeError: before anything is updated, for all that an
                ordinary step refuses, and for gradients that are there already, inputs that require
                grad or are modified in place, a loss that reaches into the model, a model called
                never or twice, inside `backprop`, `no_grad`, `DistributedDataParallel` or the
                capture of a CUDA graph. In the middle of the step, where the second pass reads
                other points than the first, or where the optimizer, a layer's backward or a rule
                of learning fails: some layers are updated then.

        In a single pass the layers are updated before the loss is known. So whatever fails after
        the model's first layers, in the model, the closure or the loss, leaves them updated, as
        does a loss that is not finite; and a model must read the same points whenever its inputs
        have the same sizes. What can be checked before the pass is: the target, the arguments of
        the model, and all else that the sizes tell.
        """
        parameters = self._parameters()
        self._check(parameters)
        updates = _Updates(self.optimizer)
        try:
            loss, tape = self._evaluate(closure, updates)
            tape.backward(loss)
            loss = loss.detach()
            if isinstance(tape, _OnlyPass):
                self._known[tape.call.key] = tape.known
            elif tape.output.grad is not None:
                self._second_pass(tape, updates)
            updates.finish()
        finally:
            for parameter in parameters:
                parameter.grad = None
        return loss

    def _evaluate(
        self, closure: Callable[[], Tensor], updates: _Updates
    ) -> tuple[Tensor, FirstPass | _OnlyPass]:
        """The loss, and the pass of the model that it came from."""
        tapes: list[FirstPass | _OnlyPass] = []
        state.instead[self.root] = partial(self._forward, tapes, updates)
        try:
            loss = closure()
        finally:
            del state.instead[self.root]
        _check_loss(loss, tapes)
        return loss, tapes[0]

    @torch.compiler.disable
    def _forward(
        self,
        tapes: list[FirstPass | _OnlyPass],
        updates: _Updates,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """In place of the root's own forward."""
        if tapes:
            raise RuntimeError(
                "the closure of a StreamingStep called the DFA twice, and so has two errors: call "
                "it once, on the concatenated inputs"
            )
        call = _Call(self.root, args, kwargs)
        # Put back at the end of the step: after one that failed this call takes two passes again.
        known = self._known.pop(call.key, None)
        if known is not None and self._in_one_pass:
            tapes.append(_OnlyPass(call, known, updates))
        else:
            call.record()
            tapes.append(FirstPass(call, survey=self._schedule is None))
        return call.run(tapes[0])

    @property
    def _in_one_pass(self) -> bool:
        return self.root.feedback.sends.known_ahead and self.root.learning is None

    def _second_pass(self, first: FirstPass, updates: _Updates) -> None:
        """Updates every parameter that learns from the error, [*rows, C]."""
        call = first.call
        if first.survey:
            self._schedule = first.schedule
        elif not self._schedule.fits(first):
            survey = FirstPass(call, survey=True)
            call.run_again(survey)
            self._schedule = survey.schedule
        points = [first.readings[index] for index in self._schedule.points]
        layout = self.root._lay_out(points, self.root._name(points), first.output)
        known = _Known(self._schedule, points, layout, _blank(first.output.detach()))
        if self._in_one_pass:
            known = known.without({p for p in call.parameters if p.grad is not None})
        second = _SecondPass(call, known, first.output.grad, first.output.detach(), updates)
        first.output = None  # the logits may be large
        call.run_again(second)
        if self._in_one_pass:
            self._known[call.key] = known

    def _parameters(self) -> list[Tensor]:
        """Those of the model and of the optimizer."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        return list(dict.fromkeys([*self.root.parameters(), *(p for g in groups for p in g)]))

    def _check(self, parameters: list[Tensor]) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError("a StreamingStep was called with gradients disabled")
        if state.tape is not None or state.instead:
            raise RuntimeError("a StreamingStep was called inside a DFA or inside another step")
        if any(self.root is root for root in state.true_gradients):
            raise RuntimeError(
                "a StreamingStep was called inside fastdfa.backprop(model): true gradients need "
                "all activations at once, so make an ordinary step there"
            )
        capture.refuse(
            "a CUDA graph was being captured when a StreamingStep was called, which sets the state "
            "of random generators from the host: capture an ordinary step"
        )
        _check_hooks(self.optimizer)
        if any(parameter.grad is not None for parameter in parameters):
            raise ValueError(
                "a parameter has a gradient, expected none, as a StreamingStep accumulates no "
                "gradients: call optimizer.zero_grad() first"
            )


class _Call:
    """The arguments of a root and all else that its forward pass depends on, to run it again."""

    def __init__(self, root: DFA, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.root, self.args, self.kwargs = root, args, kwargs
        self.inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        _check_call(root, self.inputs)
        self.versions = _versions(self.inputs)
        self.modules = list(root.module.modules())  # to find them takes 1 us a layer
        groups = [module._parameters.values() for module in self.modules]
        self.parameters = [p for group in groups for p in group if p is not None]
        self.trained = tuple(parameter.requires_grad for parameter in self.parameters)
        self.places = {x.device: x for x in [*self.parameters, *self.inputs]}  # one each device
        kinds = {device.type for device in self.places}
        self.kinds = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in self.kinds
        ]
        self.key = self._key()

    def _key(self) -> Hashable:
        """What calls have in common that most likely read the same points of the same sizes."""
        given = [*tree_leaves((self.args, self.kwargs)), self.root.target]
        modes = (self.root.training, *self.autocast)
        return (*map(_size, given), *self.kwargs, *modes, *self.modules, *self.trained)

    def record(self) -> None:
        """Keeps what `run_again` puts back."""
        self.random = _random_state(self.places)
        self.buffers = _copied(_buffers(self.modules))

    def run(self, tape: FirstPass | _UpdatingPass) -> Any:
        """A pass that writes on this tape; returns the module's output."""
        with ExitStack() as stack:
            for settings in self.autocast:
                # No cache: a cast weight that two blocks share would be a way round the cut.
                stack.enter_context(torch.autocast(*settings, cache_enabled=False))
            stack.enter_context(tape.mode())
            return self.root._run(tape, self.args, self.kwargs)

    def run_again(self, tape: FirstPass | _SecondPass) -> None:
        """A pass with random states and buffers as before the first, that leaves those after it.

        It works on copies of the buffers, so what the first has made of them stays.
        """
        if self.versions != _versions(self.inputs):
            raise RuntimeError(
                "an input of the DFA was modified in place by the model or the closure, and a "
                "StreamingStep needs it as it was for its second pass"
            )
        random, buffers = _random_state(self.places), _buffers(self.modules)
        _set_random_state(self.random)
        _put(_copied(self.buffers))
        try:
            self.run(tape)
        except _End:
            pass
        finally:
            _set_random_state(random)
            _put(buffers)

    def without_autocast(self) -> ExitStack:
        """For backward passes: torch recommends to run them outside of autocast."""
        stack = ExitStack()
        for kind in self.kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return stack


def _eagerly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that breaks the graph where it is compiled, at no cost where it is not."""
    disabled = torch.compiler.disable(method)

    @wraps(method)
    def call(*args: Any) -> Any:
        return disabled(*args) if torch.compiler.is_compiling() else method(*args)

    return call


class _End(BaseException):
    """Ends a second pass at the tap: what follows has learnt from the first pass."""


class _Reading(NamedTuple):
    """A layer's reading of its input: what tells a point and its sizes, but holds no memory."""

    layer: nn.Module
    tensor: Tensor  # an expanded scalar, for dtype and device
    rows: int | None
    shape: torch.Size  # of the feedback
    edge: GradientEdge | None  # where the feedback enters the graph, of a point


class FirstPass(Tape):
    """The pass that gives the error. It saves nothing, and notes which layers read what.

    A loss that reaches into it fails: behind an activated layer's output is a hook that refuses a
    gradient, and behind all else a graph without what autograd would save. A survey has the graph
    of every layer, and keeps it to its end.
    """

    looks_ahead = False  # that would keep activations

    def __init__(self, call: _Call, survey: bool) -> None:
        super().__init__(call.root, [], call.root._install_tap())
        self.survey = self.saves = survey
        self.call = call
        self.readings: list[_Reading] = []
        self.output: Tensor | None = None  # a leaf: its gradient is the error
        self.schedule: _Schedule | None = None
        self._cut = WeakTensorKeyDictionary()  # the first reading of every point
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
        self._read(layer, x, rows, features, None)

    @_eagerly
    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        edge = get_gradient_edge(x) if self.survey and x not in self._cut else None
        reading = self._read(layer, x, rows, features, edge)
        if self.survey:
            self._cut.setdefault(x, reading)
        return x.detach()

    @_eagerly
    def unsaved(self, h: Tensor) -> Tensor:
        """The output of an activated layer, computed without a graph.

        A graph behind each took a third of a pass of 32 layers of 16.
        """
        h.requires_grad_().register_hook(_refuse)
        return h

    def _read(
        self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None, edge: Any
    ) -> _Reading:
        shape = x.shape if features is None else torch.Size([*x.shape[:rows], x.shape[features]])
        self.readings.append(_Reading(layer, _blank(x.detach()), rows, shape, edge))
        return self.readings[-1]

    def read(self, x: Tensor, edge: Edge) -> None:
        if x in self._cut:
            self.readers.append((self._cut[x].tensor, edge))

    def end(self, y: Any) -> Tensor:
        check_output(y, self.root.output)
        if self.survey:
            self.schedule = _Schedule.of(self, y)
            self._cut, self.readers = WeakTensorKeyDictionary(), []  # these hold the graph
            self.readings = [reading._replace(edge=None) for reading in self.readings]
        self._ended.append(True)
        self.output = y.detach().requires_grad_()
        return self.output

    def backward(self, loss: Tensor) -> None:
        """Gives the output its error, if the loss reads it, and all that follows it, or that the
        loss reads besides, its gradient."""
        with self.call.without_autocast():
            loss.backward()


class _Schedule(NamedTuple):
    """When the backward passes are due. The sources of gradients are the points, then the output.

    Sources whose graphs meet, which is where feedback goes round a cut, go together.
    """

    layers: tuple[nn.Module, ...]  # in the order of their readings
    trained: tuple[bool, ...]  # which parameters require grad
    points: tuple[int, ...]  # which readings are the points
    due: list[list[int]]  # the sources that send when this one is reached
    complete: list[list[Tensor]]  # the parameters that have their whole gradient then

    @classmethod
    def of(cls, survey: FirstPass, y: Tensor) -> _Schedule:
        """From the graph of a survey that came to y; an error for what no step accepts."""
        root, readings = survey.root, survey.readings
        points = [index for index, reading in enumerate(readings) if reading.edge is not None]
        cut = [readings[index] for index in points]
        names = root._name(cut)
        root._lay_out(cut, names, y)
        bypass.check(root, survey, cut, names, y)
        turn, uses = _walk([reading.edge.node for reading in cut] + [y.grad_fn])
        due: list[list[int]] = [[] for _ in turn]
        complete: list[list[Tensor]] = [[] for _ in turn]
        for source, when in enumerate(turn):
            due[when].append(source)
        for parameter, sources in uses.items():
            complete[max(turn[source] for source in sources)].append(parameter)
        layers = tuple(reading.layer for reading in readings)
        return cls(layers, survey.call.trained, tuple(points), due, complete)

    def fits(self, first: FirstPass) -> bool:
        """Whether a pass called the same layers in the same order, with the same trained."""
        layers = tuple(reading.layer for reading in first.readings)
        return layers == self.layers and first.call.trained == self.trained


def _walk(starts: Iterable[Node | None]) -> tuple[list[int], dict[Tensor, set[int]]]:
    """Of every source the last of those whose graphs meet, of every leaf the sources it serves."""
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


class _Known(NamedTuple):
    """What a call of the model comes to."""

    schedule: _Schedule
    points: list[_Reading]
    layout: Layout
    output: Tensor  # at which the error is taken: a blank

    def without(self, parameters: set[Tensor]) -> _Known:
        """The same, with these to be updated at the end of the step."""
        complete = [[p for p in turn if p not in parameters] for turn in self.schedule.complete]
        return self._replace(schedule=self.schedule._replace(complete=complete))


class _UpdatingPass(Tape):
    """A pass that feeds each point in its turn, updates what is before it, and lets go of that.

    Of the error e [*rows, C] and the output y, only what the signal needs is read.
    """

    looks_ahead = False  # that would keep activations
    role: str  # which pass this is, which it must equal, and what else could be done
    before: str
    advice: str

    def __init__(
        self, call: _Call, known: _Known, error: Tensor, output: Tensor, updates: _Updates
    ) -> None:
        root = call.root
        super().__init__(root, [], root._install_tap())
        self.call, self.known, self.updates, self.error = call, known, updates, error
        self.places = root._settled(known.layout)
        self.widest = known.layout.widest if known.points else 0
        self.target, self.learning = root._take_target(), root.learning
        self.sent = root._signal(error, output, self.target)  # what is projected
        self.reached = 0
        self.waiting: dict[int, Point] = {}  # points that have been reached and not fed
        self.due: list[int] = []  # sources whose turn has come
        self.complete: list[Tensor] = []  # parameters to update when these have sent
        self.held = 0.0  # bytes that these points hold
        self._cut = WeakTensorKeyDictionary()  # what was a point already

    def mode(self) -> torch.enable_grad:
        return torch.enable_grad()

    def passed(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> None:
        pass

    def read(self, x: Tensor, edge: Edge) -> None:
        pass

    @_eagerly
    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        if x not in self._cut:
            self._cut[x] = True
            self.waiting[self.reached] = self.point(layer, x, rows, features)
            self.newest = None  # it would keep the layers before
            self._reach(layer, self.waiting[self.reached].shape)
            if self.held >= plan.workspace(x.device):
                self._send()
        return x.detach()

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
        due = self.known.schedule.due[self.reached]
        self.due += due
        self.complete += self.known.schedule.complete[self.reached]
        self.held += sum(_bytes_held(self.waiting[k]) for k in due if k in self.waiting)
        self.reached += 1

    def _send(self, *true: tuple[Tensor, Tensor | None]) -> list[Node]:
        """Feeds the points that are due, and updates what has its whole gradient then.

        `true` are tensors with their true gradients, for what is above the last point. Returns
        where the feedback entered the graph.
        """
        due = sorted(k for k in self.due if k in self.waiting)
        points = [self.waiting.pop(k) for k in due]
        nodes = [point.edge.node for point in points]
        sent = [*true, *self._feeding(points, [self.places[k] for k in due])]
        del points  # the graph holds what it needs, and frees it as it goes
        sent = [pair for pair in sent if pair[0].requires_grad]
        if sent:
            with self.call.without_autocast():
                torch.autograd.backward(*zip(*sent, strict=True))
        self.updates.update(self.complete)
        self.due, self.complete, self.held = [], [], 0.0
        return nodes

    def _feeding(self, points: list[Point], places: list[Settled]) -> list[tuple[Tensor, Tensor]]:
        """What hands these points their feedback in backward, with what it is made of.

        Each B that learns does so from the error itself, and is updated after it has fed.
        """
        if not points:
            return []
        root, y = self.root, _blank(self.error)
        carrier = root._feed(points, places, self.widest, y, _blank(self.sent), in_turn=True)
        learning = self.learning
        if learning is None:
            return [(carrier, self.sent)]
        matrices = [root.matrices.of(place.name) for place in places]
        self.complete += matrices
        # A Q that all points share learns once, and is updated at the end of the step.
        self.learning = learning._replace(compression=None)
        y = learnt(learning, y, self.target, root.compression, points, matrices)
        return [(carrier, self.sent), (y, self.error)]


class _SecondPass(_UpdatingPass):
    """Knows the error from the first."""

    role, before = "the second pass", "the first"
    advice = "so random choices by torch's generators alone"

    def end(self, y: Tensor) -> Tensor:
        self._reach(None, y.shape)
        self._send((y, self.error))
        if self.tap is not None:
            raise _End
        return y


class _OnlyPass(_UpdatingPass):
    """Feeds what is made of the target, and leaves what is above the last point to the loss."""

    role, before = "the only pass", "that of an earlier step with inputs of these sizes"
    advice = "or its signal be one that needs the error, as signals.Target()"

    def __init__(self, call: _Call, known: _Known, updates: _Updates) -> None:
        # Not read, or seen in all that is made of it.
        error = known.output.new_full((), math.nan).expand(known.output.shape)
        super().__init__(call, known, error, known.output, updates)
        self.output: Tensor | None = None

    def _send(self, *true: tuple[Tensor, Tensor | None]) -> list[Node]:
        nodes = super()._send(*true)
        for node in nodes:  # a gradient from the loss would come too late
            # In PyTorch 2.11 this raises for a node that nothing leads to any more.
            with suppress(RuntimeError):
                node.register_prehook(_refuse)
        return nodes

    def end(self, y: Any) -> Tensor:
        check_output(y, self.root.output)
        self._send()
        self._reach(None, y.shape)
        self.output = _blank(y.detach())
        return y if y.requires_grad else y.detach().requires_grad_()  # above it nothing learns

    def backward(self, loss: Tensor) -> None:
        """Gives all that is above the last point, or that the loss reads besides, its gradient."""
        self._send((loss, None))


def _blank(x: Tensor) -> Tensor:
    """Of the shape of x, without memory."""
    return x.new_empty(()).expand(x.shape)


def _bytes_held(point: Point) -> float:
    """Of a layer alone, which saves its output, and for which a delta and a gradient are made.

    How much a block saves is not known: so it is fed without waiting for others.
    """
    record = point.target
    if not isinstance(record, LayerRecord):
        return math.inf
    return float(2 * record.saved.nbytes + record.weight.nbytes)


class _Updates:
    """One step of an optimizer, made for some parameters at a time.

    Every time by its own `step`, in which it has these parameters alone. The options of a group are
    each time what they were before: what the optimizer counts there, it counts once.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        self.group_of = {p: k for k, group in enumerate(groups) for p in group["params"]}
        self.updated: set[Tensor] = set()
        self.after: dict[int, dict[str, Any]] = {}  # the groups' options as they will be

    def update(self, parameters: Iterable[Tensor]) -> None:
        """Updates those of the optimizer that have a gradient, and frees it."""
        parts: dict[int, list[Tensor]] = {}
        ready = [p for p in parameters if p.grad is not None and p in self.group_of]
        for parameter in ready:
            parts.setdefault(self.group_of[parameter], []).append(parameter)
        if not self.updated.isdisjoint(ready):
            raise RuntimeError(
                "a parameter received a gradient in a StreamingStep after it was updated: the "
                "model uses its parameters otherwise than in the step before, though it calls the "
                "same layers, or the loss does"
            )
        if not ready:
            return
        self._step(parts)
        self.updated.update(ready)
        for parameter in ready:
            parameter.grad = None

    def _step(self, parts: dict[int, list[Tensor]]) -> None:
        groups = self.optimizer.param_groups
        narrowed = [{**groups[k], "params": part} for k, part in parts.items()]
        self.optimizer.param_groups = narrowed
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        self.after.update(zip(parts, narrowed, strict=True))

    def finish(self) -> None:
        """Updates all that is left."""
        self.update(self.group_of)
        for k, narrowed in self.after.items():
            group = self.optimizer.param_groups[k]
            group.update({**narrowed, "params": group["params"]})


# What a forward pass depends on and leaves behind.

Buffers = dict[tuple[nn.Module, str], Tensor]
RandomState = tuple[Tensor, tuple[list[int], list[Tensor]]]


def _buffers(modules: list[nn.Module]) -> Buffers:
    return {
        (module, name): x
        for module in modules
        for name, x in module._buffers.items()
        if x is not None
    }


def _copied(buffers: Buffers) -> Buffers:
    copies = {id(x): x.detach().clone() for x in buffers.values()}
    return {place: copies[id(x)] for place, x in buffers.items()}


def _put(buffers: Buffers) -> None:
    for (module, name), x in buffers.items():
        module._buffers[name] = x


def _random_state(places: dict[torch.device, Tensor]) -> RandomState:
    """Of torch's generators on the CPU and on these devices."""
    return torch.get_rng_state(), get_device_states(*places.values())


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    set_device_states(*state[1])


def _size(x: Any) -> Hashable:
    """Of a tensor; a plain value itself."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return x if isinstance(x, (bool, int, float, str, type(None))) else type(x)


def _versions(inputs: list[Tensor]) -> list[int]:
    return [0 if x.is_inference() else x._version for x in inputs]


def _unpack(saved: Tensor | None) -> Tensor:
    if saved is None:
        _refuse()
    return saved


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "the loss of a StreamingStep reaches into the DFA other than by the output at which the "
        "error is taken: what it reads there is not kept. Make an ordinary step, or let "
        "DFA(..., output=name) name a submodule whose output is all that the loss needs"
    )


# Checks.


def _root(model: nn.Module) -> DFA:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    roots = [module for module in model.modules() if isinstance(module, DFA)]
    if len(roots) != 1:
        raise ValueError(
            f"model must hold one fastdfa.DFA, got {type(model).__name__} with {len(roots)}"
        )
    return roots[0]


def _check_optimizer(optimizer: Optimizer, root: DFA) -> None:
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {kind}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer must be one that updates each parameter from its own gradient, got {kind}, "
            "which evaluates the loss of the whole model in its step(closure)"
        )
    _check_hooks(optimizer)
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in given for p in root.module.parameters()):
        raise ValueError(f"optimizer must hold parameters of the model, got {kind} without any")


def _check_hooks(optimizer: Optimizer) -> None:
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            "optimizer must have no step hooks, as a StreamingStep calls its step for some "
            f"parameters at a time, got {type(optimizer).__name__} with some. Gradients cannot be "
            "clipped together; what averages weights goes after the whole step"
        )


def _check_call(root: DFA, inputs: list[Tensor]) -> None:
    sharded = any(type(x.data).__name__ == "DTensor" for x in root.module.parameters())
    if sharded or DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "a StreamingStep updates in one process: it cannot be used under "
            "DistributedDataParallel or fully_shard, which exchange gradients"
        )
    if any(x.requires_grad for x in inputs):
        raise ValueError(
            "the inputs of the DFA must not require grad in a StreamingStep, which gives them no "
            "gradient, got one that does: pass x.detach(), and put layers before the DFA inside it"
        )


def _check_loss(loss: Any, tapes: list[FirstPass | _OnlyPass]) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"closure must return the loss, a tensor, got {type(loss).__name__}")
    if not tapes or tapes[0].output is None:
        raise RuntimeError("closure must call the model, with gradients enabled, and did not")
    if loss.numel() != 1:
        raise ValueError(f"closure must return a scalar loss, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(
            "closure must return a loss that depends on the output of the model, got one without "
            "a graph: detached, or computed under no_grad"
        )


def _described(layer: nn.Module | None, shape: torch.Size) -> str:
    if layer is None:
        return f"the output, of shape {tuple(shape)}"
    return f"a point of shape {tuple(shape)} before {type(layer).__name__}"
