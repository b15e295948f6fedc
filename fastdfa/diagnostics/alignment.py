"""How well the feedback that layers receive agrees with their true gradient: `alignment`.

Of a `DFA`, one forward pass goes through the network uncut, and a tape notes each tensor that would
be a point.
One backward pass then gives the error at the output and the true gradient at every point; from that
error the nodes of an ordinary DFA step make the feedback. So the instrument measures what training
does, and adds no code to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from .. import ops
from ..dfa import DFA, backprop, check_output
from ..engine.root import Root, names_in
from ..engine.tape import Edge, LayerRecord, Point, Tape, state
from ..layerwise import LAYERS, LayerFeedback
from . import table
from .inspection import left_as_it_was, parameters_of, roots_of, unwrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEADER = ("point", "rows", "cosine", "std", "degrees", "zero rows")


@dataclass(frozen=True, eq=False)
class PointAlignment:
    """Of one feedback point.

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
        """Of the cosines of the rows that have one; NaN if none has."""
        return self.cosines.nanmean().item()

    @property
    def std(self) -> float:
        """Standard deviation over the same rows."""
        known = self.cosines[~self.cosines.isnan()]
        return known.std(correction=0).item() if len(known) else math.nan

    @property
    def degrees(self) -> float:
        """Mean angle between true gradient and feedback: 90 is what a random direction has."""
        return self.cosines.clamp(-1, 1).acos().rad2deg().nanmean().item()

    @property
    def zero_rows(self) -> int:
        """Rows without a cosine."""
        return int(self.cosines.isnan().sum())


@dataclass(frozen=True, eq=False)
class Alignment:
    """What `alignment` measured: `points`, from the input up. `[name]` is one of them.

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

    def __str__(self) -> str:
        parts = [table.text([_HEADER, *self._cells()])]
        if self.weights:
            parts.append(table.text([("parameter", "cosine"), *self._weight_cells()]))
        return "\n\n".join(parts)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        tables = [Table(*_HEADER)]
        for cells in self._cells():
            tables[0].add_row(*cells)
        if self.weights:
            tables.append(Table("parameter", "cosine"))
            for cells in self._weight_cells():
                tables[1].add_row(*cells)
        return Group(*tables)

    def plot(self) -> Figure:
        """A matplotlib figure: the distribution of the cosine over rows, of each point.

        Raises:
            ImportError: where matplotlib is not installed.
        """
        figure = _figure()
        draw_distribution(figure.subplots(), self)
        return figure

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (p.name, str(len(p.cosines)), f"{p.mean:.3f}", f"{p.std:.3f}", f"{p.degrees:.1f}",
             str(p.zero_rows))
            for p in self.points
        ]  # fmt: skip

    def _weight_cells(self) -> list[tuple[str, str]]:
        return [(name, f"{cosine:.3f}") for name, cosine in self.weights.items()]


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
    _check_arguments(model, loss_fn)
    model = unwrapped(model)
    root = _layer_feedback_of(model)
    if root is not None:
        if gated:
            raise ValueError("gated compares at the points of a DFA, and model is a LayerFeedback")
        return _layer_alignment(model, root, loss_fn, x, y, weights)
    roots = roots_of(model)
    with left_as_it_was(model), ExitStack() as backward:
        with _instead_of(roots) as passes:
            loss = loss_fn(_called(model, x), y)
        _check(loss, passes)
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            backward.enter_context(torch.autocast(kind, enabled=False))  # as training runs it
        every = parameters_of(model).items() if weights else ()
        parameters = {name: p for name, p in every if p.requires_grad}
        true = _true_gradients(loss, passes, parameters)
        prefix = "{}." if len(roots) > 1 else ""  # as `inspect` names them
        measured = [
            point
            for name, each in passes.items()
            for point in each.measure(prefix.format(name), gated)
        ]
        cosines = _weight_cosines(loss, list(passes.values()), parameters, true)
    return Alignment(tuple(measured), cosines)


class _Cut(NamedTuple):
    """A tensor at which training would cut, and what is known of it."""

    tensor: Tensor
    edge: GradientEdge  # where its gradient is, whatever is done to it later
    point: Point  # of its values alone, so that a feedback ends there
    record: LayerRecord | None  # of the layer whose output it is, if that gates its feedback


class _UncutPass(Tape):
    """A forward pass that notes where training would cut, and goes on with the history.

    What a layer reads is a copy, whose gradient can be blocked: then the network is cut after all.
    """

    looks_ahead = False  # the output of every layer is a tensor with a gradient
    cuts = False

    def __init__(self, root: DFA) -> None:
        super().__init__(root, [], root._install_tap())
        self.found: dict[int, _Cut] = {}  # by the id of the tensor
        self.blocked: list[bool] = []  # not empty: yes. The hooks must not hold self
        self.output: Tensor | None = None
        self.output_edge: GradientEdge | None = None
        self.error: Tensor | None = None
        self.true: list[Tensor] = []  # gradients, of each of `found`
        self.feedback: list[Tensor] = []

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In place of the root's own forward."""
        if self.output is not None:
            raise ValueError("model called a DFA twice, and so has two errors; expected one call")
        leaves = tree_leaves((args, kwargs))
        self.inputs = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        return self.root._run(self, args, kwargs)

    def cut(self, layer: nn.Module, x: Tensor, rows: int | None, features: int | None) -> Tensor:
        if any(x is given for given in self.inputs):
            return x
        if id(x) not in self.found:
            record = self.newest if self.newest_is(x, rows, features) else None
            values = x.detach().requires_grad_()
            point = self.point(layer, values, rows, features)
            self.found[id(x)] = _Cut(x, get_gradient_edge(x), point, record)
        # No view: modified in place, it would take the history of x round the hook.
        copy, blocked = x.clone(), self.blocked
        copy.register_hook(lambda gradient: torch.zeros_like(gradient) if blocked else None)
        return copy

    def read(self, x: Tensor, edge: Edge) -> None:
        pass  # nothing looks for bypasses

    def end(self, y: Any) -> Any:
        check_output(y, self.root.output)
        self.output = y
        if y.requires_grad:
            self.output_edge = get_gradient_edge(y)
        return y

    def edges(self) -> list[GradientEdge]:
        return [each.edge for each in self.found.values()]

    def take(self, gradients: Iterator[Tensor | None]) -> None:
        """The error and the true gradients, in the order of the output and of `edges`."""
        self.error = next(gradients)
        if self.error is None:
            raise ValueError("loss_fn must depend on the output of the DFA, and it does not")
        for each in self.found.values():
            gradient = next(gradients)
            self.true.append(torch.zeros_like(each.tensor) if gradient is None else gradient)

    def measure(self, prefix: str, gated: bool) -> list[PointAlignment]:
        """The alignment of every point; makes the feedback."""
        points = [each.point for each in self.found.values()]
        names = self.root._name(points)
        self.feedback = self._feedback(points, names)
        gradients = list(zip(self.true, self.feedback, strict=True))
        for name, pair in zip(names, gradients, strict=True):
            if not all(gradient.isfinite().all() for gradient in pair):
                raise ValueError(f"a gradient at feedback point {prefix + name!r} is not finite")
        return [
            PointAlignment(
                prefix + name,
                self._cosines(*pair),
                self._gated(each.record, *pair) if gated and each.record else None,
            )
            for name, each, pair in zip(names, self.found.values(), gradients, strict=True)
        ]

    def _feedback(self, points: list[Point], names: list[str]) -> list[Tensor]:
        """What each point is sent by the error, made by the nodes of an ordinary backward pass."""
        root = self.root
        before = root._layout, root._sizes  # what the first pass of training checks
        try:
            layout = root._lay_out(points, names, self.error)
            settled = root._settled(layout)
            sent = root._signal(self.error, self.output, root.target)
            fed = root._feed(points, settled, layout.widest, self.error, sent, False)
        finally:
            root._layout, root._sizes = before
        return list(torch.autograd.grad(fed, [point.tensor for point in points], sent))

    def _cosines(self, true: Tensor, fed: Tensor) -> Tensor:
        """Row by row, [M], on the CPU."""
        return _row_cosines(true, fed, self.error.shape[:-1].numel())

    def _gated(self, layer: LayerRecord, true: Tensor, fed: Tensor) -> Tensor:
        """The same of both behind the local derivative of the layer before."""
        of, saved = layer.affine.matrix, layer.saved
        gate = layer.gate
        deltas = [ops.gate(of(g, saved), of(saved, saved), *gate)[0] for g in (true, fed)]
        return self._cosines(*deltas)


def _row_cosines(a: Tensor, b: Tensor, rows: int) -> Tensor:
    a, b = (_unit_rows(gradient.reshape(rows, -1)) for gradient in (a, b))
    return (a * b).sum(1).double().cpu()


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows of length 1; NaN where a row is zero."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    rows = rows / rows.abs().amax(1, keepdim=True)  # so that no square underflows
    return rows / rows.norm(dim=1, keepdim=True)


# The passes of a measurement.


@contextmanager
def _instead_of(roots: dict[str, DFA]) -> Iterator[dict[str, _UncutPass]]:
    """Inside, every root runs its pass, and gradients are true."""
    passes = {name: _UncutPass(root) for name, root in roots.items()}
    instead, true_gradients = state.instead, state.true_gradients
    state.instead = {each.root: each.forward for each in passes.values()}
    state.true_gradients = ()
    try:
        yield passes
    finally:
        state.instead, state.true_gradients = instead, true_gradients


def _called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _true_gradients(
    loss: Tensor, passes: dict[str, _UncutPass], parameters: dict[str, nn.Parameter]
) -> list[Tensor | None]:
    """Gives every pass its error and gradients; returns those of the parameters."""
    edges = [edge for each in passes.values() for edge in (each.output_edge, *each.edges())]
    gradients = iter(
        torch.autograd.grad(
            loss,
            [*edges, *parameters.values()],
            retain_graph=bool(parameters),
            allow_unused=True,
        )
    )
    for each in passes.values():
        each.take(gradients)
    return list(gradients)


def _weight_cosines(
    loss: Tensor,
    passes: list[_UncutPass],
    parameters: dict[str, nn.Parameter],
    true: list[Tensor | None],
) -> dict[str, float]:
    """Of all parameters that have both gradients; the DFA's by a pass blocked at every cut."""
    if not parameters:
        return {}
    outputs: list[Tensor | GradientEdge] = [loss]
    sent: list[Tensor] = [torch.ones_like(loss)]
    for each in passes:
        each.blocked.append(True)
        found = each.found.values()
        outputs += [cut.tensor if cut.tensor.is_leaf else cut.edge for cut in found]
        sent += each.feedback
    by_feedback = torch.autograd.grad(outputs, list(parameters.values()), sent, allow_unused=True)
    return {
        name: _cosine(a, b)
        for name, a, b in zip(parameters, true, by_feedback, strict=True)
        if a is not None and b is not None
    }


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = (g.to_dense().reshape(1, -1) for g in (a, b))
    return (_unit_rows(a) * _unit_rows(b)).sum().item()


# Of a `LayerFeedback`.


class _LayerPass:
    """The gradients that a step of a `LayerFeedback` hands to the inputs of its layers."""

    def __init__(self, root: LayerFeedback) -> None:
        self.edges: dict[str, GradientEdge] = {}  # of every such input, by the name of its point
        self.output: Any = None
        self.names = names_in(root.module)
        self.hooks = [
            layer.register_forward_pre_hook(self._note)
            for layer in self.names
            if isinstance(layer, LAYERS)
        ]
        self.hooks.append(root.register_forward_hook(self._note_output))

    def _note(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not isinstance(x, Tensor) or not x.requires_grad or x.is_leaf:
            return
        edge, name, calls = get_gradient_edge(x), self.names[layer], 1
        if edge in self.edges.values():  # several layers read one tensor
            return
        while (name if calls == 1 else f"{name}#{calls}") in self.edges:
            calls += 1
        self.edges[name if calls == 1 else f"{name}#{calls}"] = edge

    def _note_output(self, root: nn.Module, args: Any, output: Any) -> None:
        if self.output is not None:
            raise ValueError("model called its LayerFeedback twice; expected one call")
        check_output(output, None)
        self.output = output

    def gradients(
        self, model: nn.Module, loss_fn: Any, x: Any, y: Any, parameters: list[Tensor]
    ) -> list[Tensor | None]:
        """Of every edge, then of the parameters."""
        try:
            loss = loss_fn(_called(model, x), y)
        finally:
            for hook in self.hooks:
                hook.remove()
        if self.output is None:
            raise ValueError("model must call its LayerFeedback once; it did not")
        _check_loss(loss, "LayerFeedback")
        inputs = [*self.edges.values(), *parameters]
        return list(torch.autograd.grad(loss, inputs, allow_unused=True)) if inputs else []


def _layer_feedback_of(model: nn.Module) -> LayerFeedback | None:
    roots = [module for module in model.modules() if isinstance(module, Root)]
    if not any(isinstance(root, LayerFeedback) for root in roots):
        return None
    if len(roots) > 1:
        raise ValueError(f"model must hold one LayerFeedback alone, got {len(roots)} roots")
    return roots[0]


def _layer_alignment(
    model: nn.Module, root: LayerFeedback, loss_fn: Any, x: Any, y: Any, weights: bool
) -> Alignment:
    parameters = {n: p for n, p in parameters_of(model).items() if p.requires_grad and weights}
    found = []
    for context in (backprop(model), nullcontext()):
        with left_as_it_was(model), context:
            each = _LayerPass(root)
            found.append(each.gradients(model, loss_fn, x, y, list(parameters.values())))
    rows = each.output.shape[:-1].numel()
    pairs = dict(zip([*each.edges, *parameters], zip(*found, strict=True), strict=True))
    pairs = {name: (a, b) for name, (a, b) in pairs.items() if a is not None and b is not None}
    points = [
        PointAlignment(name, _row_cosines(*pairs[name], rows))
        for name in each.edges
        if name in pairs
    ]
    return Alignment(
        tuple(points), {name: _cosine(*pairs[name]) for name in parameters if name in pairs}
    )


# Bad input.


def _check_arguments(model: Any, loss_fn: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")


def _check(loss: Any, passes: dict[str, _UncutPass]) -> None:
    for name, each in passes.items():
        where = f"the DFA {name!r}" if name else "the DFA"
        if each.output is None:
            raise ValueError(f"model must call {where} once, with gradients enabled; it did not")
        if not each.found:
            raise ValueError(f"model must have feedback points, and {where} has none")
        if each.output.numel() == 0:
            raise ValueError(f"x must hold at least one row, got none for {where}")
    _check_loss(loss, "DFA")


def _check_loss(loss: Any, root: str) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        raise ValueError(f"loss_fn must depend on the output of the {root}, and it does not")


# Along a training run.


class AlignmentMonitor:
    """Measures the alignment every so many steps of a training loop, on the batch of that step.

        monitor = fastdfa.AlignmentMonitor(model, nn.functional.cross_entropy, every=100)
        for x, y in batches:
            monitor(x, y)
            ...
        monitor.plot().savefig("alignment.png")

    A measurement costs what `alignment` does and keeps a number for each row and point; the calls
    between two cost nothing.

    Args:
        model, loss_fn, gated, weights: as in `alignment`.
        every: steps from one measurement to the next; the first call is one.

    Attributes:
        history: (step, `Alignment`) of every measurement.

    Raises:
        TypeError, ValueError: for `every` that is no positive int; and as `alignment`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        every: int = 100,
        *,
        gated: bool = False,
        weights: bool = False,
    ) -> None:
        _check_arguments(model, loss_fn)
        if _layer_feedback_of(unwrapped(model)) is None:
            roots_of(unwrapped(model))
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {type(every).__name__}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model, self.loss_fn, self.every = model, loss_fn, every
        self.options = {"gated": gated, "weights": weights}
        self.step = 0
        self.history: list[tuple[int, Alignment]] = []

    def __call__(self, x: Any, y: Any) -> Alignment | None:
        """Counts a step, and measures if it is one to be measured. Takes what the step takes."""
        measured = None
        if self.step % self.every == 0:
            measured = alignment(self.model, self.loss_fn, x, y, **self.options)
            self.history.append((self.step, measured))
        self.step += 1
        return measured

    def plot(self) -> Figure:
        """A matplotlib figure: the cosine of each point over steps, mean and standard deviation
        over rows, and its distribution at the last measurement.

        Raises:
            ImportError: where matplotlib is not installed.
            ValueError: before the first measurement.
        """
        if not self.history:
            raise ValueError("the monitor has measured nothing yet: call it in the training loop")
        figure = _figure(panels=2)
        left, right = figure.subplots(1, 2)
        self._draw_history(left)
        draw_distribution(right, self.history[-1][1])
        right.set_title(f"step {self.history[-1][0]}", loc="left", fontsize=10)
        return figure

    def _draw_history(self, axes: Axes) -> None:
        names = dict.fromkeys(p.name for _, measured in self.history for p in measured.points)
        for name, colour in zip(names, _colours(len(names)), strict=True):
            points = [
                (step, point.mean, point.std)
                for step, measured in self.history
                for point in measured.points
                if point.name == name
            ]
            steps, means, deviations = torch.tensor(points, dtype=torch.float64).T.numpy()
            axes.plot(steps, means, ".-", markersize=4, color=colour, label=name)
            low, high = means - deviations, means + deviations
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="step", ylabel="cosine to the true gradient")
        axes.legend(frameon=False, fontsize=9)


def draw_distribution(axes: Axes, measured: Alignment) -> None:
    """The distribution of the cosine over rows, of each point, into a matplotlib `Axes`."""
    for point, colour in zip(measured.points, _colours(len(measured.points)), strict=True):
        known = point.cosines[~point.cosines.isnan()].numpy()
        axes.hist(known, bins=50, range=(-1, 1), histtype="step", color=colour, label=point.name)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="cosine to the true gradient", ylabel="rows")
    axes.legend(frameon=False, fontsize=9)


def _colours(number: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * i / max(number - 1, 1)) for i in range(number)]


def _figure(panels: int = 1) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install fastdfa[train]") from None
    return Figure(figsize=(4.8 * panels, 3.6), layout="constrained")  # no window, no backend
