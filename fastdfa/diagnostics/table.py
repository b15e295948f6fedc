"""Shows results as tables: `print` as plain text, `rich.print` in colours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Holds the cells of a table."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    styles: Sequence[str] = ()  # of the lines, where rich shows them; else all are plain


class Report(ABC):
    """Serves as the base of results, which are shown as their tables."""

    @abstractmethod
    def _tables(self) -> list[Table]:
        """Returns the tables, from the top down."""

    def __str__(self) -> str:
        return "\n\n".join(_text([table.header, *table.lines]) for table in self._tables())

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*map(_by_rich, self._tables()))


def _text(lines: Sequence[Sequence[str]]) -> str:
    """Returns the cells of every line, in columns as wide as their widest."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _by_rich(table: Table) -> Any:
    import rich.table
    from rich.text import Text  # names are no markup

    made = rich.table.Table(*table.header)
    styles = table.styles or [""] * len(table.lines)
    for line, style in zip(table.lines, styles, strict=True):
        made.add_row(*map(Text, line), style=style)
    return made
