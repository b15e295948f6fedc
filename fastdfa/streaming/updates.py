"""Updates some parameters at a time, in one step of an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Updates:
    """Makes one step of an optimizer, for some parameters at a time.

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
