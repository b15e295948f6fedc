"""Tables in Markdown, and how a number, a ratio and a machine are written in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from benchmarks.harness.results import RESULTS
from benchmarks.harness.timing import FUSED


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(value: float) -> str:
    return f"{value:.2f}x"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def threads(machine: dict[str, Any]) -> str:
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def where(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {threads(machine)}, {machine['cpu_capability']}, "
        f"PyTorch {machine['torch']}, {machine['date']}"
    )


def where_gpu(results: dict[str, Any]) -> str:
    machine, rates = results["machine"], results["rates"]
    return (
        f"{machine['gpu']}, CUDA {machine['cuda']}, PyTorch {machine['torch']}, {machine['date']}; "
        f"a copy moves {rates['copy_gb_per_s'] / 1000:.2f} TB/s there, a bf16 product of torch "
        f"reaches {rates['product_tflops']:.0f} TFLOP/s"
    )


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def median(values: dict[str, Any], name: str, form: Callable[[float], str]) -> str:
    """Writes a side's median, or a dash where it was not measured."""
    return form(values[name]["median"]) if name in values else "-"


def inverse(value: float) -> str:
    return times(1 / value)


def by_side(rows: list[dict[str, Any]], sides: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """Returns headings and, for each row, the speeds of sides, given as {side: heading}.

    Behind fastdfa stands DFA's own part, its speed where fused backprop is 1. Results from before
    fused backprop was timed have neither column.
    """
    if not any(FUSED in row["to_backprop"] for row in rows):
        sides = {side: heading for side, heading in sides.items() if side != FUSED}
    cells = [[median(row["to_backprop"], side, inverse) for side in sides] for row in rows]
    heads = list(sides.values())
    if FUSED in sides:
        place = list(sides).index("fastdfa") + 1
        heads.insert(place, "DFA's own part")
        for row, cell in zip(rows, cells, strict=True):
            cell.insert(place, median(row.get("to_fused", {}), "fastdfa", inverse))
    return heads, cells
