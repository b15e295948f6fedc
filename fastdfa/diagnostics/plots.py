"""Draws with matplotlib, which is imported where something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:  # not required by the package
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure


def figure(panels: int = 1) -> Figure:
    """Returns an empty figure that is as wide as so many panels.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot needs matplotlib: pip install fastdfa[train]") from None
    return Figure(figsize=(4.8 * panels, 3.6), layout="constrained")  # no window, no backend


def draw_distributions(axes: Axes, cosines: Mapping[str, Tensor]) -> None:
    """Draws the distribution of the cosines [M] of every point, NaN left out."""
    for (name, each), colour in zip(cosines.items(), colours(len(cosines)), strict=True):
        known = each[~each.isnan()].numpy()
        axes.hist(known, bins=50, range=(-1, 1), histtype="step", color=colour, label=name)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="cosine to the true gradient", ylabel="rows")
    axes.legend(frameon=False, fontsize=9)


def colours(number: int) -> list[Any]:
    """Returns so many colours, from the input to the output."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * i / max(number - 1, 1)) for i in range(number)]
