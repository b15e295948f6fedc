"""Finds from what every parameter learns, by running the model: `inspect`.

A gradient is a sum over sources: the feedback of each point, and the true gradient. There is one
backward pass for each source, in which that source sends NaN and every other one zero. What turns
out NaN is reached by it, even past a weight that is zero now, such as that of a new LoRA adapter.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import arguments
from ..activations import Gate
from ..dfa import DFA
from ..engine import bypass
from ..engine.broadcast import Broadcast
from ..engine.plan import Plan
from ..engine.tape import Tape, state
from .table import Report, Table
from .untouched import left_as_it_was, parameters_of, roots_of, unwrapped


class Row(NamedTuple):
    """Says from what one parameter learns."""

    name: str
    shape: tuple[int, ...]
    points: tuple[str, ...]  # those whose feedback it learns from
    true_gradient: bool
    frozen: bool
    zero: bool  # a gradient comes, and is zero throughout for this input

    @property
    def source(self) -> str:
        """Returns one of "feedback", "true gradient", "feedback and true gradient", "nothing"."""
        kinds = ["feedback"] * bool(self.points) + ["true gradient"] * self.true_gradient
        return " and ".join(kinds) or "nothing"

    def __str__(self) -> str:
        text = self.source.replace("feedback", f"feedback at {', '.join(self.points)}")
        if self.frozen:
            return f"{text} (frozen)"
        return f"{text} (zero for this input)" if self.zero else text


@dataclasses.dataclass(frozen=True)
class Inspection(Report):
    """Holds what `inspect` found: `rows`, one for each parameter. `[name]` is one of them.

    `print` shows a table, `rich.print` the same in colours.
    """

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no parameter {name!r}; there are {[row.name for row in self.rows]}")

    def _tables(self) -> list[Table]:
        cells = [(row.name, str(list(row.shape)), str(row)) for row in self.rows]
        styles = ["dim" if row.frozen else _STYLES.get(row.source, "") for row in self.rows]
        return [Table(("parameter", "shape", "trained by"), cells, styles)]


_STYLES = {"nothing": "bold red", "true gradient": "yellow"}


def inspect(
    model: nn.Module, /, *args: Any, loss: Callable[[Any], Any] | None = None, **kwargs: Any
) -> Inspection:
    """Finds from what every parameter learns: from the feedback of which points, or what else.

    Runs one forward pass, `model(*args, **kwargs)`, eagerly and in the mode in which the model is,
    and a backward pass for each point, on random errors and on NaN: tensor hooks and module hooks
    of yours see these. Parameters, `.grad`, buffers and torch's random state stay as they are.

    Args:
        model: a `DFA`, or a module that holds some; `DistributedDataParallel` and `torch.compile`
            around it are taken off.
        args, kwargs: those of a forward pass.
        loss: from the output of the model to where the backward pass begins: a tensor, or a
            structure of them. By default that is the output; where it is not one tensor, the
            scalars in it (a loss that the model computed), or else all its tensors.

    Returns:
        A row for each parameter, named as in the module that a `DFA` wraps, or as in `model`.

    Warns:
        UserWarning: of parameters that require grad and learn from nothing; and where the true
            gradient alone trains several modules before the output of a `DFA`, not the head only.

    Raises:
        TypeError, ValueError: for a model without `DFA` or sharded by `fully_shard`, and for an
            input that makes gradients infinite or NaN.
    """
    model = unwrapped(model)
    if loss is not None:
        arguments.function("loss", loss)
    roots, parameters = roots_of(model), parameters_of(model)
    with left_as_it_was(model):
        sources: list[_Source] = []
        output = _forward(model, args, kwargs, roots, sources)
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        reached, zero = _reached(beginning(output, loss), trained, sources)
    rows = tuple(_row(name, p, reached, name in zero) for name, p in parameters.items())
    nothing = [row.name for row in rows if row.source == "nothing" and not row.frozen]
    if nothing:
        warnings.warn(
            f"trained by nothing: {', '.join(map(repr, nothing))}. They require grad, and neither "
            "feedback nor a true gradient reaches them: is what they make detached, or unused?",
            stacklevel=2,
        )
    fed = {row.name for row in rows if row.points}
    for root in roots.values():
        by_output = [reached[s] for s in sources if s.root is root and s.point is None]
        alone = set().union(*by_output) - fed
        bypass.warn_above_the_last_point(root, [parameters[name] for name in alone], stacklevel=3)
    return Inspection(rows)


@dataclasses.dataclass(eq=False)
class _Source:
    """Sends gradients: a point of a root or, without a name, the root's output; without a root,
    what is behind the outputs of all."""

    root: DFA | None
    point: str | None
    sends: float | None = None  # in place of its gradients; None: what they are

    def send(self, gradient: Tensor) -> Tensor:
        """Returns what it sends in place of a gradient."""
        return gradient if self.sends is None else torch.full_like(gradient, self.sends)


class _MarkedPass(Tape):
    """Makes the points and the output of a forward pass sources."""

    looks_ahead = False  # layers of a segment share one node
    root: DFA

    def __init__(self, root: DFA, sources: list[_Source], prefix: str, given: Any) -> None:
        inputs = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
        super().__init__(root, inputs, root.install_tap())
        self.sources, self.prefix = sources, prefix

    def broadcast(self, plan: Plan) -> Broadcast:
        names = [self.prefix + point.name for point in plan.layout.points]
        broadcast = _MarkedBroadcast(plan.drawn, plan.products, plan.dense, None, {})
        broadcast.sources = [_Source(self.root, name) for name in names]
        self.sources += broadcast.sources
        return broadcast

    def end(self, y: Any) -> Any:
        if isinstance(y, Tensor) and y.requires_grad:
            source = _Source(self.root, None)
            y.register_hook(source.send)
            self.sources.append(source)
        return super().end(y)


class _MarkedBroadcast(Broadcast):
    """Makes what sources send: behind a gate, so that none of it is lost where that is closed."""

    sources: list[_Source]  # of every point by its number

    def feedback(self, number: int) -> Tensor:
        return self.sources[number].send(super().feedback(number))

    def deltas(
        self, numbers: Sequence[int], saved: Sequence[Tensor], gates: Sequence[Gate]
    ) -> tuple[list[Tensor], list[Tensor]]:
        deltas, sums = super().deltas(numbers, saved, gates)
        sources = [self.sources[number] for number in numbers]
        made = [source.send(delta) for source, delta in zip(sources, deltas, strict=True)]
        return made, [source.send(total) for source, total in zip(sources, sums, strict=True)]


def _reached(
    outputs: list[Tensor], trained: dict[str, nn.Parameter], sources: list[_Source]
) -> tuple[dict[_Source, set[str]], set[str]]:
    """Returns the names of the parameters that every source reaches, by a backward pass for each,
    and of those whose gradient is zero."""

    def gradients(errors: list[Tensor]) -> dict[str, Tensor]:
        if not trained:
            return {}
        found = torch.autograd.grad(
            outputs, list(trained.values()), errors, retain_graph=True, allow_unused=True
        )
        return {
            name: gradient.coalesce().values() if gradient.is_sparse else gradient
            for name, gradient in zip(trained, found, strict=True)
            if gradient is not None
        }

    def turned_nan(errors: list[Tensor]) -> set[str]:
        return {name for name, gradient in gradients(errors).items() if gradient.isnan().any()}

    # As of a mean over rows, so that half precision neither overflows nor vanishes.
    errors = [torch.randn_like(y) / max(y.shape[:-1].numel(), 1) for y in outputs]
    plain = gradients(errors)
    for name, gradient in plain.items():
        if not gradient.isfinite().all():
            raise ValueError(
                f"args must be an input for which gradients are finite; that of {name!r} is not"
            )
    for source in sources:
        source.sends = 0.0
    reached: dict[_Source, set[str]] = {}
    for source in sources:
        source.sends = math.nan
        reached[source] = turned_nan(errors)
        source.sends = 0.0
    reached[_Source(None, None)] = turned_nan([torch.full_like(y, math.nan) for y in outputs])
    return reached, {name for name, gradient in plain.items() if not gradient.any()}


def _row(name: str, p: nn.Parameter, reached: dict[_Source, set[str]], zero: bool) -> Row:
    found = dict.fromkeys(source.point for source, names in reached.items() if name in names)
    points = tuple(point for point in found if point is not None)
    return Row(name, tuple(p.shape), points, None in found, not p.requires_grad, zero)


def _forward(
    model: nn.Module, args: Any, kwargs: Any, roots: dict[str, DFA], sources: list[_Source]
) -> Any:
    """Runs the model, in which the points and outputs of all roots become sources."""

    def marked(root: DFA, prefix: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return root.run(_MarkedPass(root, sources, prefix, (args, kwargs)), args, kwargs)

    prefix = "{}." if len(roots) > 1 else ""
    before = state.instead
    state.instead = {
        root: partial(marked, root, prefix.format(name)) for name, root in roots.items()
    }
    try:
        with warnings.catch_warnings():
            # `inspect` says it of every model; a root says it in its first pass only.
            warnings.filterwarnings("ignore", "the true gradient of the output trains")
            return model(*args, **kwargs)
    finally:
        state.instead = before


def beginning(output: Any, loss: Callable[[Any], Any] | None) -> list[Tensor]:
    """Returns the tensors at which the backward pass begins."""
    tensors = [x for x in _tensors(output if loss is None else loss(output)) if x.requires_grad]
    scalars = [x for x in tensors if x.dim() == 0]
    return scalars if scalars and loss is None else tensors


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors(vars(leaf))
