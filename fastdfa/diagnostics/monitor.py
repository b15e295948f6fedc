"""Measures the alignment along a training run: `AlignmentMonitor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from . import plots
from .alignment import Alignment, alignment, checked


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
        checked(model, loss_fn, gated, weights)
        self.model, self.loss_fn = model, loss_fn
        self.every: int = arguments.integer("every", every)
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

    def plot(self) -> plots.Figure:
        """Returns a matplotlib figure: the cosine of each point over steps, mean and standard
        deviation over rows, and its distribution at the last measurement.

        Raises:
            ImportError: where matplotlib is not installed.
            ValueError: before the first measurement.
        """
        if not self.history:
            raise ValueError("the monitor has measured nothing yet: call it in the training loop")
        figure = plots.figure(panels=2)
        left, right = figure.subplots(1, 2)
        self._draw_history(left)
        step, latest = self.history[-1]
        plots.draw_distributions(right, {p.name: p.cosines for p in latest.points})
        right.set_title(f"step {step}", loc="left", fontsize=10)
        return figure

    def _draw_history(self, axes: plots.Axes) -> None:
        names = dict.fromkeys(p.name for _, measured in self.history for p in measured.points)
        for name, colour in zip(names, plots.colours(len(names)), strict=True):
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
