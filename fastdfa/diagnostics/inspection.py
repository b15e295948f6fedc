"""From what every parameter learns, found by running the model: `inspect`.

A gradient is a sum over sources: the feedback of each point, and the true gradient. There is one
backward pass for each source, in which that source sends NaN and every other one zero. What turns
out NaN is reached by it, even past a weight that is zero now, such as that of a new LoRA adapter.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..dfa import DFA
from ..engine import bypass, plan
from ..engine.root import Root
from ..engine.tape import Receiver, Tape
from . import table


class Row(NamedTuple):
    """From what one parameter learns."""

    name: str
    shape: tuple[int, ...]
    points: tuple[str, ...]  # the feedback points that feed it
    true_gradient: bool
    frozen: bool
    zero: bool  # a gradient comes, and is zero throughout for this input

    @property
    def source(self) -> str:
        """One of "feedback", "true gradient", "feedback and true gradient", "nothing"."""
        kinds = ["feedback"] * bool(self.points) + ["true gradient"] * self.true_gradient
        return " and ".join(kinds) or "nothing"

    def __str__(self) -> str:
        text = self.source.replace("feedback", f"feedback at {', '.join(self.points)}")
        if self.frozen:
            return f"{text} (frozen)"
        return f"{text} (zero for this input)" if self.zero else text


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found: `rows`, one for each parameter. `[name]` is one of them.

    `print` shows a table, `rich.print` the same in colours.
    """

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no parameter {name!r}; there are {[row.name for row in self.rows]}")

    def __str__(self) -> str:
        return table.text([_HEADER, *self._cells()])

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        rich_table = Table(*_HEADER)
        for row, cells in zip(self.rows, self._cells(), strict=True):
            style = "dim" if row.frozen else _STYLES.get(row.source, "")
            rich_table.add_row(*[Text(cell, style) for cell in cells])
        return rich_table

    def _cells(self) -> list[tuple[str, str, str]]:
        return [(row.name, str(list(row.shape)), str(row)) for row in self.rows]


_HEADER = ("parameter", "shape", "trained by")
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
        ValueError: for a model without `DFA` or sharded by `fully_shard`, and for an input that
            makes gradients infinite or NaN.
    """
    model = unwrapped(model)
    roots = roots_of(model)
    with left_as_it_was(model):
        sources = _Sources()
        output = _forward(model, args, kwargs, roots, sources)
        reach = _Reach(parameters_of(model), _begin(output, loss), sources)
    rows = tuple(reach.row(name) for name in reach.parameters)
    nothing = [row.name for row in rows if row.source == "nothing" and not row.frozen]
    if nothing:
        warnings.warn(_trained_by_nothing(nothing), stacklevel=2)
    for root in roots.values():
        alone = reach.by_output(root) - {row.name for row in rows if row.points}
        parameters = [reach.parameters[name] for name in alone]
        bypass.warn_above_the_last_point(root, parameters, stacklevel=3)
    return Inspection(rows)


class _Source(NamedTuple):
    """What sends gradients: a point of a root or, without a name, the root's output."""

    root: DFA
    point: str | None


class _Sources:
    """Hooks on what the sources send; in a backward pass one of these is marked."""

    def __init__(self) -> None:
        self.all: list[_Source] = []
        self.marked: int | None = None  # the one that sends NaN; None: all send what they have

    @contextmanager
    def between(self, root: DFA, prefix: str) -> Iterator[None]:
        """Stands between a root and all that it is about to feed, and puts the hooks there."""
        broadcast, fed = root._broadcast, root._fed
        source_of: dict[int, int] = {}  # by the place of what receives the feedback

        def hooked_broadcast(tape: Tape, y: Any) -> Any:
            tape.in_turn = False
            points = plan.expanded(tape.in_order())
            places = plan.fed(points)
            names = root._name([points[place] for place in places])
            source_of.clear()
            for place, name in zip(places, names, strict=True):
                source_of[place] = self._add(root, prefix + name)
            if isinstance(y, Tensor) and y.requires_grad:
                self._hook(y, self._add(root, None))
            return broadcast(tape, y)

        def hooked_fed(
            nodes: list[plan.Node], receivers: list[Receiver], y: Tensor, *pending: Any
        ) -> Tensor:
            aliased = list(receivers)
            for place, source in source_of.items():
                saved, x, *trained, fed_in_turn = receivers[place]
                trained = [self._alias(tensor, source) for tensor in trained]
                aliased[place] = (saved, x, *trained, fed_in_turn)
            return fed(nodes, aliased, y, *pending)

        root._broadcast, root._fed = hooked_broadcast, hooked_fed
        root.looks_ahead = False  # layers of a chain share one node
        try:
            yield
        finally:
            del root._broadcast, root._fed, root.looks_ahead

    def _add(self, root: DFA, point: str | None) -> int:
        self.all.append(_Source(root, point))
        return len(self.all) - 1

    def _alias(self, x: Tensor | None, source: int) -> Tensor | None:
        """x behind a hook, for this source alone: what it sends to x may not be all that comes."""
        if x is None or not x.requires_grad:
            return x
        alias = x.view_as(x)
        self._hook(alias, source)
        return alias

    def _hook(self, x: Tensor, source: int) -> None:
        def send(grad: Tensor | None) -> Tensor | None:
            if grad is None or self.marked is None:
                return grad
            return torch.full_like(grad, math.nan if self.marked == source else 0.0)

        x.register_hook(send)


# Marks no source: then NaN comes from what is behind the outputs of the roots.
_BEHIND = -1


class _Reach:
    """Which sources reach which parameters, by one backward pass each from `outputs`."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], outputs: list[Tensor], sources: _Sources
    ) -> None:
        self.parameters = parameters
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self.outputs, self.sources = outputs, sources
        # As of a mean over rows, so that half precision neither overflows nor vanishes.
        errors = [torch.randn_like(y) / max(y.shape[:-1].numel(), 1) for y in outputs]
        plain = self._backward(None, errors)
        _check_finite(plain)
        self.zero = {name for name, gradient in plain.items() if not gradient.any()}
        self.reached = [self._marked(source, errors) for source in range(len(sources.all))]
        self.behind = self._marked(_BEHIND, [torch.full_like(y, math.nan) for y in outputs])

    def row(self, name: str) -> Row:
        parameter = self.parameters[name]
        found = dict.fromkeys(
            source.point
            for source, reached in zip(self.sources.all, self.reached, strict=True)
            if name in reached
        )
        return Row(
            name,
            tuple(parameter.shape),
            tuple(point for point in found if point is not None),
            true_gradient=None in found or name in self.behind,
            frozen=not parameter.requires_grad,
            zero=name in self.zero,
        )

    def by_output(self, root: DFA) -> set[str]:
        """What the true gradient of a root's output reaches."""
        pairs = zip(self.sources.all, self.reached, strict=True)
        return set().union(*(names for source, names in pairs if source == _Source(root, None)))

    def _marked(self, source: int, errors: list[Tensor]) -> set[str]:
        gradients = self._backward(source, errors)
        return {name for name, gradient in gradients.items() if gradient.isnan().any()}

    def _backward(self, marked: int | None, errors: list[Tensor]) -> dict[str, Tensor]:
        """The gradients that come, by name."""
        if not self.trained:
            return {}
        self.sources.marked = marked
        gradients = torch.autograd.grad(
            self.outputs,
            list(self.trained.values()),
            errors,
            retain_graph=True,
            allow_unused=True,
        )
        return {
            name: gradient.coalesce().values() if gradient.is_sparse else gradient
            for name, gradient in zip(self.trained, gradients, strict=True)
            if gradient is not None
        }


def _forward(
    model: nn.Module, args: Any, kwargs: Any, roots: dict[str, DFA], sources: _Sources
) -> Any:
    with ExitStack() as stack, warnings.catch_warnings():
        # `inspect` says it of every model; a root says it in its first pass only.
        warnings.filterwarnings("ignore", "the true gradient of the output trains")
        for name, root in roots.items():
            stack.enter_context(sources.between(root, f"{name}." if len(roots) > 1 else ""))
        return model(*args, **kwargs)


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Inside, the model may run forward and backward, by itself and not compiled."""
    tensors = [*model.parameters(), *model.buffers()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with ExitStack() as stack:
        gpus = {x.device.index for x in tensors if x.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(sorted(gpus)))
        stack.enter_context(torch.inference_mode(False))  # enables gradients, too
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer
                    # Compared first, as a copy counts as a modification in place.
                    if not _equal(buffer, before):
                        buffer.copy_(before)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(x if x.layout == torch.strided else x.to_dense() for x in (a, b)))


def _begin(output: Any, loss: Callable[[Any], Any] | None) -> list[Tensor]:
    """The tensors at which the backward pass begins."""
    tensors = [x for x in _tensors(output if loss is None else loss(output)) if x.requires_grad]
    scalars = [x for x in tensors if x.dim() == 0]
    return scalars if scalars and loss is None else tensors


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors(vars(leaf))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, so that nothing is compiled, and no process waits for another."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """By the names that `inspect` gives them: those of points begin inside the wrapped module."""
    return dict((model.module if isinstance(model, Root) else model).named_parameters())


def roots_of(model: nn.Module) -> dict[str, DFA]:
    """The roots in a model by their names.

    Raises:
        ValueError: for a model without one, or sharded by `fully_shard`.
    """
    roots = {name: module for name, module in model.named_modules() if isinstance(module, DFA)}
    if not roots:
        raise ValueError(f"model must hold a fastdfa.DFA, got {type(model).__name__} without one")
    sharded = [name for name, x in model.named_parameters() if type(x.data).__name__ == "DTensor"]
    if sharded:
        raise ValueError(f"model must not be sharded, got {sharded[0]!r}; do this before that")
    return roots


def _check_finite(gradients: dict[str, Tensor]) -> None:
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            raise ValueError(
                f"args must be an input for which gradients are finite; that of {name!r} is not"
            )


def _trained_by_nothing(names: list[str]) -> str:
    return (
        f"trained by nothing: {', '.join(map(repr, names))}. They require grad, and neither "
        "feedback nor a true gradient reaches them: is what they make detached, or unused?"
    )
