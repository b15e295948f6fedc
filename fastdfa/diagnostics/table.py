"""Makes tables of plain text, as reports print them without rich."""

from __future__ import annotations

from collections.abc import Sequence


def text(lines: Sequence[Sequence[str]]) -> str:
    """Returns the cells of every line, in columns as wide as their widest."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
