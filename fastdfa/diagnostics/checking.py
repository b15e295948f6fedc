"""Says of a model, in sentences, what does not train as DFA would: `check`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..dfa import DFA
from .inspection import Inspection, beginning, inspect
from .table import Report, Table
from .untouched import left_as_it_was, parameters_of, roots_of, undistributed, unwrapped


@dataclasses.dataclass(frozen=True)
class Check(Report):
    """Holds what `check` found: `findings`, a sentence each, and the `inspection` behind them.

    It is true where there are none. `print` shows them as a table.
    """

    findings: tuple[str, ...]
    inspection: Inspection

    def __bool__(self) -> bool:
        return not self.findings

    def _tables(self) -> list[Table]:
        lines = [(finding,) for finding in self.findings]
        return [Table(("findings",), lines or [("none: every parameter learns as DFA would",)])]


def check(
    model: nn.Module, /, *args: Any, loss: Callable[[Any], Any] | None = None, **kwargs: Any
) -> Check:
    """Finds what in a model does not train as DFA would, where a training loop would be silent.

    Which parameters learn from nothing; which by true gradients though a cut is before them; which
    from feedback and a true gradient, as a path leads round a cut; which have a gradient that is
    zero throughout; and what a root warns of in its first pass. `inspect` tells it of the network;
    then one step of the model as it is, compiled if it is, must give each of these a gradient.

    Args:
        model, args, kwargs, loss: as of `inspect`. `DistributedDataParallel` is taken off.

    Returns:
        The findings. The model, torch's random state and every `.grad` stay as they were.

    Raises:
        ValueError: as `inspect`.
    """
    inner = unwrapped(model)
    roots = list(roots_of(inner).values())
    with _untouched(roots) as again, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inspection = inspect(inner, *args, loss=loss, **kwargs)
        again()
        came = _that_get_gradients(undistributed(model), args, kwargs, loss)
    said = [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    learning = [row for row in inspection.rows if row.source != "nothing"]
    found = {
        "no gradient comes, as the model runs, compiled or with its hooks, to": [
            row.name for row in learning if row.name not in came
        ],
        "a path leads round a cut: feedback and a true gradient train": [
            row.name for row in learning if row.points and row.true_gradient
        ],
        "the gradient is zero for this input of": [row.name for row in inspection.rows if row.zero],
    }
    sentences = [f"{what} {', '.join(map(repr, names))}" for what, names in found.items() if names]
    return Check(tuple(dict.fromkeys([*said, *sentences])), inspection)


def _that_get_gradients(
    model: nn.Module, args: Any, kwargs: Any, loss: Callable[[Any], Any] | None
) -> set[str]:
    """Returns the names of the parameters to which a gradient comes in a step of the model."""
    parameters = parameters_of(unwrapped(model))
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    with left_as_it_was(unwrapped(model), eagerly=False):
        begin = beginning(model(*args, **kwargs), loss)
        if not trained or not begin:
            return set()
        errors = [torch.ones_like(y) for y in begin]
        found = torch.autograd.grad(begin, list(trained.values()), errors, allow_unused=True)
    return {name for name, gradient in zip(trained, found, strict=True) if gradient is not None}


@contextmanager
def _untouched(roots: Sequence[DFA]) -> Iterator[Callable[[], None]]:
    """Lets each root run as a step that trains, without counting it; gives what hands the roots
    their targets again."""
    before = [(root, root.target, root.anchors, root.witness) for root in roots]

    def again() -> None:
        for root, target, _, _ in before:
            root.target, root.anchors, root.witness = target, None, None

    try:
        again()
        yield again
    finally:
        for root, target, anchors, witness in before:
            root.target, root.anchors, root.witness = target, anchors, witness
