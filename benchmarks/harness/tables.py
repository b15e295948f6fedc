"""Prints results: cases side by side, as many as a terminal is wide, and a line for each side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from benchmarks.harness.command import console
from benchmarks.harness.timing import FUSED

Cell = Callable[[dict[str, Any]], str]  # what a line says of a row of the results
LABEL, CASE = 26, 12  # columns of the terminal: of a line's name, and of a case
OWN_PART = f"DFA's own part: the speed of fastdfa where {FUSED} is 1, round by round"


def speed(row: dict[str, Any], side: str, base: str = "to_backprop") -> str:
    """Says how fast a side is where another one is 1; a dash where it was not measured."""
    ratio = row.get(base, {}).get(side)
    return "-" if ratio is None else f"{1 / ratio['median']:.2f}"


def quartiles(row: dict[str, Any]) -> str:
    """Says between which speeds half of the rounds of fastdfa were."""
    ratio = row["to_backprop"].get("fastdfa")
    return "-" if ratio is None else f"{1 / ratio['high']:.2f}-{1 / ratio['low']:.2f}"


def print_cases(title: str, rows: list[dict[str, Any]], lines: dict[str, Cell]) -> None:
    """Prints a table for every few cases, as fit into the terminal, of lines with any number."""
    cells = {label: [cell(row) for row in rows] for label, cell in lines.items()}
    count = max(1, (console.width - LABEL) // CASE)
    console.print(title, style="italic")
    for first in range(0, len(rows), count):
        some = slice(first, first + count)
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for row in rows[some]:
            table.add_column(row["case"], justify="right", max_width=CASE - 1)
        for label, found in cells.items():
            if set(found) != {"-"}:
                table.add_row(label, *found[some])
        console.print(table, end="\n\n")
