"""Makes a training step that keeps the activation and the gradient of one layer at a time.

DFA makes no layer's gradient from another's: once the error is known, or where the target is sent
in its place, a layer can be updated as soon as it has run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import arguments
from ..dfa import DFA
from ..engine.plan import lay_out
from ..engine.root import only_root, roots_in
from ..engine.tape import state
from ..ops import capture
from ..ops.typed import uncompiled
from .call import Call
from .passes import FirstPass, OnlyPass, SecondPass, blank
from .schedule import Known, Schedule
from .updates import Updates


class StreamingStep:
    """Makes a training step whose memory does not grow with depth, and updates as an ordinary one.

        step = fastdfa.StreamingStep(model, optimizer)
        for x, y in batches:
            loss = step(lambda: nn.functional.cross_entropy(model(x), y))
            scheduler.step()

    It stands for forward, `loss.backward()`, `optimizer.step()` and `zero_grad()`. The network runs
    twice: for the error, without saving anything; then again, where each layer has its feedback as
    soon as it has run, is updated, and lets go of its activation and gradient (MEM-DFA, arXiv
    2012.11745). The second pass has the random numbers and buffers of the first: the same dropout,
    and batch norm's statistics are updated once. Whatever else the model's forward and its hooks
    do, they do twice. The first step also records the graph, without activations, to know when a
    gradient is complete; a later one that calls other layers than the one before takes a third pass
    for that.

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
    of the step. A B that learns is updated with the layer before its point, after that.

    Args:
        model: a `DFA`, or a module that holds one.
        optimizer: of parameters of the model and, where the loss has some, of others.

    Raises:
        TypeError, ValueError: for a model that does not hold one `DFA`, and for an optimizer of
            none of its parameters, whose `step` demands a closure, or that has step hooks.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.root = only_root(roots_in(model, DFA))
        _check_optimizer(optimizer, self.root)
        self.optimizer = optimizer
        self._schedule: Schedule | None = None
        self._known: dict[Hashable, Known] = {}

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
        arguments.function("closure", closure)
        parameters = self._parameters()
        self._check(parameters)
        updates = Updates(self.optimizer)
        try:
            loss, tape = self._evaluate(closure, updates)
            tape.backward(loss)
            loss = loss.detach()
            if isinstance(tape, OnlyPass):
                self._known[tape.call.key] = tape.known
            elif tape.output is not None and tape.output.grad is not None:
                self._second_pass(tape, updates)
            updates.finish()
        finally:
            for parameter in parameters:
                parameter.grad = None
        return loss

    def _evaluate(
        self, closure: Callable[[], Tensor], updates: Updates
    ) -> tuple[Tensor, FirstPass | OnlyPass]:
        """Returns the loss, and the pass of the model that it came from."""
        tapes: list[FirstPass | OnlyPass] = []
        state.instead[self.root] = partial(self._forward, tapes, updates)
        try:
            loss = closure()
        finally:
            del state.instead[self.root]
        _check_loss(loss, tapes)
        return loss, tapes[0]

    @uncompiled
    def _forward(
        self,
        tapes: list[FirstPass | OnlyPass],
        updates: Updates,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs in place of the root's own forward."""
        if tapes:
            raise RuntimeError(
                "the closure of a StreamingStep called the DFA twice, and so has two errors: call "
                "it once, on the concatenated inputs"
            )
        call = Call(self.root, args, kwargs)
        # Put back at the end of the step: after one that failed this call takes two passes again.
        known = self._known.pop(call.key, None)
        if known is not None and self._in_one_pass:
            tapes.append(OnlyPass(call, known, updates))
        else:
            call.record()
            tapes.append(FirstPass(call, survey=self._schedule is None))
        return call.run(tapes[0])

    @property
    def _in_one_pass(self) -> bool:
        return self.root.feedback.sends.known_ahead and self.root.learning is None

    def _second_pass(self, first: FirstPass, updates: Updates) -> None:
        """Updates every parameter that learns from the error, [*rows, C]."""
        call, output = first.call, first.output
        called = tuple(each.layer for each in first.readings), call.trained
        schedule = first.schedule or self._schedule
        if schedule is None or (schedule.layers, schedule.trained) != called:
            survey = FirstPass(call, survey=True)
            call.run_again(survey)
            schedule = survey.schedule
        assert schedule is not None and output is not None and output.grad is not None  # by now
        self._schedule = schedule
        points = [first.readings[index] for index in schedule.points]
        names = self.root.names_of_points([point.layer for point in points])
        layout = lay_out(points, names, output, self.root.columns(output.shape[-1]))
        known = Known(schedule, points, layout, blank(output))
        if self._in_one_pass:
            known = known.without({p for p in call.parameters if p.grad is not None})
        second = SecondPass(call, known, output.grad, output.detach(), updates)
        first.output = output = None  # the logits may be large
        call.run_again(second)
        if self._in_one_pass:
            self._known[call.key] = known

    def _parameters(self) -> list[Tensor]:
        """Returns those of the model and of the optimizer."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        return list(dict.fromkeys([*self.root.parameters(), *(p for g in groups for p in g)]))

    def _check(self, parameters: list[Tensor]) -> None:
        if not torch.is_grad_enabled():
            raise RuntimeError("a StreamingStep was called with gradients disabled")
        if state.tape is not None or state.instead:
            raise RuntimeError("a StreamingStep was called inside a DFA or inside another step")
        if self.root.anchors is not None:
            raise ValueError(
                "a StreamingStep has no pass that runs uncut, by which anchored feedback is "
                "fitted: expected Feedback(anchor=None), got "
                f"anchor={self.root.anchors.every}. Fit in ordinary steps first, then set "
                "model.feedback = replace(model.feedback, anchor=None), which keeps B"
            )
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


# Checks.


def _check_optimizer(optimizer: Optimizer, root: DFA) -> None:
    kind = type(optimizer).__name__
    arguments.instance("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer")
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


def _check_loss(loss: Any, tapes: list[FirstPass | OnlyPass]) -> None:
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
