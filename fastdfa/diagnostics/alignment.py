"""Measures how well the feedback that layers receive agrees with their true gradient.

Of a `DFA`, one forward pass goes through the network uncut, and a tape notes each tensor that would
be a point. One backward pass then gives the error at the output and the true gradient at every
point; from that error the nodes of an ordinary DFA step make the feedback. So the instrument
measures what training does, and adds no code to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from .. import arguments, ops
from ..dfa import DFA, backprop
from ..engine.broadcast import as_matrix
from ..engine.finish import check_output, sent_by
from ..engine.layers import CutLayer
from ..engine.nodes import gate_reads, samples_as_rows
from ..engine.plan import feedback_at, lay_out, names_of, product_of
from ..engine.root import Root, names_in
from ..engine.tape import Point, Run, state
from ..engine.uncut import UncutTape
from ..layerwise import LayerFeedback
from . import plots
from .table import Report, Table
from .untouched import called, left_as_it_was, parameters_of, roots_of, unwrapped


@dataclass(frozen=True, eq=False)
class PointAlignment:
    """Holds what was measured at one feedback point.

    Attributes:
        name: as in `DFA.feedback_points`.
        cosines: [M], for each row of the error (a sample, a token, a node) the cosine between
            the true gradient and the feedback at the point; NaN where one of these is zero.
        gated: the same behind the local derivative, at the pre-activation of the layer before,
            where that was asked for and the point is the output of a layer whose activation is its
            own; else None.
    """

    name: str
    cosines: Tensor
    gated: Tensor | None = None

    @property
    def mean(self) -> float:
        """Returns the mean cosine of the rows that have one; NaN if none has."""
        return self.cosines.nanmean().item()

    @property
    def std(self) -> float:
        """Returns the standard deviation over the same rows."""
        known = self.cosines[~self.cosines.isnan()]
        return known.std(correction=0).item() if len(known) else math.nan

    @property
    def degrees(self) -> float:
        """Returns the mean angle between true gradient and feedback: a random direction has 90."""
        return self.cosines.clamp(-1, 1).acos().rad2deg().nanmean().item()

    @property
    def zero_rows(self) -> int:
        """Returns the number of rows without a cosine."""
        return int(self.cosines.isnan().sum())


@dataclass(frozen=True, eq=False)
class Alignment(Report):
    """Holds what `alignment` measured: `points`, from the input up. `[name]` is one of them.

    `print` shows a table, `rich.print` the same in colours, `plot` the distribution over rows.

    Attributes:
        points: of every feedback point.
        weights: by the name of a parameter, the cosine between its true and its DFA gradient, NaN
            where one is zero; empty unless asked for.
    """

    points: tuple[PointAlignment, ...]
    weights: dict[str, float]

    def __getitem__(self, name: str) -> PointAlignment:
        for point in self.points:
            if point.name == name:
                return point
        raise KeyError(f"no feedback point {name!r}; there are {[p.name for p in self.points]}")

    def _tables(self) -> list[Table]:
        header = ("point", "rows", "cosine", "std", "degrees", "zero rows")
        points = [
            (p.name, str(len(p.cosines)), f"{p.mean:.3f}", f"{p.std:.3f}", f"{p.degrees:.1f}",
             str(p.zero_rows))
            for p in self.points
        ]  # fmt: skip
        tables = [Table(header, points)]
        if self.weights:
            cosines = [(name, f"{cosine:.3f}") for name, cosine in self.weights.items()]
            tables.append(Table(("parameter", "cosine"), cosines))
        return tables

    def plot(self) -> plots.Figure:
        """Returns a matplotlib figure: the distribution of the cosine over rows, of each point.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        figure = plots.figure()
        plots.draw_distributions(figure.subplots(), {p.name: p.cosines for p in self.points})
        return figure


def alignment(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    x: Any,
    y: Any,
    *,
    gated: bool = False,
    weights: bool = False,
) -> Alignment:
    """Measures the cosine between true gradient and feedback at every feedback point.

    Both belong to one forward pass, eager and in the mode in which the model is: the same dropout,
    the same statistics of a batch. They are compared at the point itself, as arXiv 1906.04554 does.
    Parameters, `.grad`, buffers and torch's random state stay as they are. By the count of
    products that is a step of backprop without its weight gradients; `weights` takes those too, and
    a backward pass more. Of a `LayerFeedback` a point is the input of each of its layers, and two
    steps are made, by the rule and by backprop.

    Args:
        model: a `DFA`, or a module that holds some, or one `LayerFeedback`;
            `DistributedDataParallel` and `torch.compile` around it are taken off.
        loss_fn: `loss_fn(model(x), y)` is the loss, a scalar.
        x: the model's input; a tuple holds several arguments, a dict keyword arguments.
        y: what `loss_fn` takes beside the output; None where the model computes its loss itself.
        gated: also compare behind the local derivative, where that is a layer's own; of a `DFA`.
        weights: also compare the gradients of the parameters, by one more backward pass.

    Raises:
        TypeError, ValueError: for a model without `DFA`, sharded by `fully_shard`, without points
            or that calls a `DFA` other than once; for a loss that is no scalar or does not depend
            on the output of a `DFA`; for gradients that are not finite.
    """
    model, roots = checked(model, loss_fn, gated, weights)
    if isinstance(roots, LayerFeedback):
        if gated:
            raise ValueError("gated compares at the points of a DFA, and model is a LayerFeedback")
        return _layer_alignment(model, roots, loss_fn, x, y, weights)
    parameters = _trained(model) if weights else {}
    with left_as_it_was(model), ExitStack() as backward:
        with _instead_of(roots) as passes:
            loss = loss_fn(called(model, x), y)
        _check_passes(passes)
        _check_loss(loss, "DFA")
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            backward.enter_context(torch.autocast(kind, enabled=False))  # as training runs it
        true = _true_gradients(loss, passes, parameters)
        prefix = "{}." if len(roots) > 1 else ""  # as `inspect` names them
        measured = [
            point
            for name, each in passes.items()
            for point in each.measure(prefix.format(name), gated)
        ]
        by_feedback = _gradients_by_feedback(loss, passes, parameters)
    return Alignment(tuple(measured), _weight_cosines(parameters, true, by_feedback))


def checked(
    model: nn.Module, loss_fn: Any, gated: bool, weights: bool
) -> tuple[nn.Module, LayerFeedback | dict[str, DFA]]:
    """Returns the model without what is around it, and its roots.

    Raises:
        TypeError, ValueError: for arguments that cannot be measured.
    """
    arguments.module("model", model)
    arguments.function("loss_fn", loss_fn)
    arguments.flag("gated", gated)
    arguments.flag("weights", weights)
    model = unwrapped(model)
    roots = [module for module in model.modules() if isinstance(module, Root)]
    by_layer = [root for root in roots if isinstance(root, LayerFeedback)]
    if not by_layer:
        return model, roots_of(model)
    if len(roots) > 1:
        raise ValueError(f"model must hold one LayerFeedback alone, got {len(roots)} roots")
    return model, by_layer[0]


class _Cut(NamedTuple):
    """Holds a tensor at which training would cut, and what is known of it."""

    point: Point
    edge: GradientEdge  # where its gradient is, whatever is done to it later
    run: Run | None  # the run that it is an output of, at `place`
    place: int
    reads: Tensor | None  # what the gate of the run reads


class _UncutPass(UncutTape):
    """Finds the error and the true gradients of an uncut pass; its gradient can be blocked where
    training would cut: then the network is cut after all."""

    root: DFA
    error: Tensor  # known once it has received its gradients

    def __init__(self, root: DFA) -> None:
        blocked: list[bool] = []  # not empty: yes. The hooks must not hold self
        super().__init__(
            root,
            [],
            root.install_tap(),
            lambda _, gradient: torch.zeros_like(gradient) if blocked else None,
        )
        self.blocked = blocked
        self.cuts_at: list[_Cut] = []  # of each point
        self.output: Tensor | None = None
        self.output_edge: GradientEdge | None = None
        self.true: list[Tensor] = []  # gradients, of each point
        self.feedback: list[Tensor] = []

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs in place of the root's own forward."""
        if self.output is not None:
            raise ValueError("model called a DFA twice, and so has two errors; expected one call")
        leaves = tree_leaves((args, kwargs))
        self.inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        return self.root.run(self, args, kwargs)

    def noted(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Point:
        run, place = self.made.get(id(x), (None, 0))
        point = super().noted(layer, x, rows, features)
        reads = None if run is None else gate_reads(x)
        self.cuts_at.append(_Cut(point, get_gradient_edge(x), run, place, reads))
        return point

    def end(self, y: Any) -> Any:
        check_output(y, self.root.output)
        self.output = y
        if y.requires_grad:
            self.output_edge = get_gradient_edge(y)
        return y

    def edges(self) -> list[GradientEdge]:
        return [each.edge for each in self.cuts_at]

    def receive(self, gradients: Iterator[Tensor | None]) -> None:
        """Takes the error and the true gradients, in the order of the output and of `edges`."""
        error = next(gradients)
        if error is None:
            raise ValueError("loss_fn must depend on the output of the DFA, and it does not")
        self.error = error
        for each in self.cuts_at:
            gradient = next(gradients)
            self.true.append(torch.zeros_like(each.point.tensor) if gradient is None else gradient)

    def measure(self, prefix: str, gated: bool) -> list[PointAlignment]:
        """Makes the feedback, and returns the alignment of every point."""
        points = [each.point for each in self.cuts_at]
        names = self.root.names_of_points([point.layer for point in points])
        self.feedback = self._feedback(points, names)
        gradients = list(zip(self.true, self.feedback, strict=True))
        for name, pair in zip(names, gradients, strict=True):
            if not all(gradient.isfinite().all() for gradient in pair):
                raise ValueError(f"a gradient at feedback point {prefix + name!r} is not finite")
        return [
            PointAlignment(
                prefix + name,
                self._cosines(*pair),
                self._gated(each, *pair) if gated else None,
            )
            for name, each, pair in zip(names, self.cuts_at, gradients, strict=True)
        ]

    def _feedback(self, points: list[Point], names: list[str]) -> list[Tensor]:
        """Returns what each point is sent by the error, from the broadcast of a training step."""
        root, error, output = self.root, self.error, self.output
        assert output is not None  # as its error has come
        planned, settled = root.planner.layout, root.bank.layout  # checked by training's first pass
        try:
            layout = lay_out(points, names, error, root.columns(error.shape[-1]))
            root.planner.layout = layout
            pairs = zip(points, root.bank.settle(root.read_seed(), layout), strict=True)
            projected = root.projector is not None
            products = [
                product_of(point, error, each, root.bank, layout, projected)
                for point, each in pairs
            ]
            broadcast = root.planner.with_products(root, layout, products).broadcast()
            broadcast.send(sent_by(root, layout, error, output, root.target))
        finally:
            root.planner.layout, root.bank.layout = planned, settled
        return [feedback_at(broadcast, k, point) for k, point in enumerate(points)]

    def _cosines(self, true: Tensor, feedback: Tensor) -> Tensor:
        """Returns the cosine of each row, [M], on the CPU."""
        return _row_cosines(true, feedback, self.error.shape[:-1].numel())

    def _gated(self, cut: _Cut, true: Tensor, feedback: Tensor) -> Tensor | None:
        """Returns the cosines of both behind the local derivative of the layer before, if it has
        run its activation itself."""
        run, reads = cut.run, cut.reads
        if run is None or reads is None:
            return None
        if run.by_rows:
            true, feedback, saved = (as_matrix(x) for x in (true, feedback, reads))
        else:
            true, feedback, saved = (samples_as_rows(x, reads) for x in (true, feedback, reads))
        gate = run.gates[cut.place]
        return self._cosines(*[ops.gate(g, saved, *gate)[0] for g in (true, feedback)])


def _row_cosines(a: Tensor, b: Tensor, rows: int) -> Tensor:
    a, b = (_unit_rows(gradient.reshape(rows, -1)) for gradient in (a, b))
    return (a * b).sum(1).double().cpu()


def _unit_rows(rows: Tensor) -> Tensor:
    """Returns rows of length 1; NaN where a row is zero."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = rows / rows.abs().amax(1, keepdim=True)  # so that no square underflows
    return rows.div(rows.norm(dim=1, keepdim=True))


def _weight_cosines(
    names: Iterable[str], true: Sequence[Tensor | None], learnt: Sequence[Tensor | None]
) -> dict[str, float]:
    """Returns the cosine of each parameter that has both gradients."""
    return {
        name: _row_cosines(a.to_dense(), b.to_dense(), 1).item()
        for name, a, b in zip(names, true, learnt, strict=True)
        if a is not None and b is not None
    }


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in parameters_of(model).items() if p.requires_grad}


# Of a `DFA`.


@contextmanager
def _instead_of(roots: dict[str, DFA]) -> Iterator[dict[str, _UncutPass]]:
    """Makes every root run its pass, inside, and gradients true."""
    passes = {name: _UncutPass(root) for name, root in roots.items()}
    instead, true_gradients = state.instead, state.true_gradients
    state.instead = {each.root: each.forward for each in passes.values()}
    state.true_gradients = ()
    try:
        yield passes
    finally:
        state.instead, state.true_gradients = instead, true_gradients


def _true_gradients(
    loss: Tensor, passes: dict[str, _UncutPass], parameters: dict[str, nn.Parameter]
) -> list[Tensor | None]:
    """Gives every pass its error and gradients; returns those of the parameters."""
    read: list[Any] = [e for each in passes.values() for e in (each.output_edge, *each.edges())]
    read += parameters.values()
    gradients = iter(
        torch.autograd.grad(loss, read, retain_graph=bool(parameters), allow_unused=True)
    )
    for each in passes.values():
        each.receive(gradients)
    return list(gradients)


def _gradients_by_feedback(
    loss: Tensor, passes: dict[str, _UncutPass], parameters: dict[str, nn.Parameter]
) -> Sequence[Tensor | None]:
    """Returns the gradients of the parameters from passes that are blocked at every cut."""
    if not parameters:
        return ()
    outputs: list[Any] = [loss]  # tensors and edges
    sent: list[Tensor] = [torch.ones_like(loss)]
    for each in passes.values():
        each.blocked.append(True)
        for cut in each.cuts_at:
            outputs.append(cut.point.tensor if cut.point.tensor.is_leaf else cut.edge)
        sent += each.feedback
    return torch.autograd.grad(outputs, list(parameters.values()), sent, allow_unused=True)


def _check_passes(passes: dict[str, _UncutPass]) -> None:
    for name, each in passes.items():
        where = f"the DFA {name!r}" if name else "the DFA"
        if each.output is None:
            raise ValueError(f"model must call {where} once, with gradients enabled; it did not")
        if not each.cuts_at:
            raise ValueError(f"model must have feedback points, and {where} has none")
        if each.output.numel() == 0:
            raise ValueError(f"x must hold at least one row, got none for {where}")


def _check_loss(loss: Any, root: str) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"loss_fn must depend on the output of the {root}, and it does not")


# Of a `LayerFeedback`.


def _layer_alignment(
    model: nn.Module, root: LayerFeedback, loss_fn: Any, x: Any, y: Any, weights: bool
) -> Alignment:
    parameters = _trained(model) if weights else {}
    steps: list[Sequence[Tensor | None]] = []
    for context in (backprop(model), nullcontext()):
        with left_as_it_was(model), context:
            loss, inputs, output = _layer_step(model, root, loss_fn, x, y)
            read: list[Any] = [*inputs, *parameters.values()]
            steps.append(torch.autograd.grad(loss, read, allow_unused=True) if read else ())
    names = names_of(list(inputs.values()), names_in(root.module))
    rows, (true, by_rule) = output.shape[:-1].numel(), steps
    points = [
        PointAlignment(name, _row_cosines(a, b, rows))
        for name, a, b in zip(names, true, by_rule, strict=False)
        if a is not None and b is not None
    ]
    first = len(names)  # of the parameters
    return Alignment(tuple(points), _weight_cosines(parameters, true[first:], by_rule[first:]))


def _layer_step(
    model: nn.Module, root: LayerFeedback, loss_fn: Any, x: Any, y: Any
) -> tuple[Tensor, dict[GradientEdge, nn.Module], Tensor]:
    """Returns the loss; the inputs of layers, each with the first layer that reads it; and the
    root's output."""
    inputs: dict[GradientEdge, nn.Module] = {}
    outputs: list[Tensor] = []

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if isinstance(x, Tensor) and x.requires_grad and not x.is_leaf:
            inputs.setdefault(get_gradient_edge(x), layer)

    with ExitStack() as hooks:
        for layer in root.module.modules():
            if isinstance(layer, CutLayer):
                hooks.enter_context(layer.register_forward_pre_hook(note))
        hooks.enter_context(root.register_forward_hook(lambda *call: outputs.append(call[-1])))
        loss = loss_fn(called(model, x), y)
    if len(outputs) != 1:
        raise ValueError(f"model must call its LayerFeedback once, got {len(outputs)} calls")
    check_output(outputs[0], None)
    _check_loss(loss, "LayerFeedback")
    return loss, inputs, outputs[0]
