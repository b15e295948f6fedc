"""Where results are written, under which name, and what stands in a file besides its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.training.measure import machine

RESULTS = Path(__file__).parents[1] / "results"


def save(
    name: str, rows: list[dict[str, Any]], folder: Path, device: str = "cpu", **facts: Any
) -> Path:
    """Writes rows and the machine as JSON and returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"machine": machine(device), **facts, "rows": rows}, indent=1)
    path.write_text(text + "\n")
    return path


def result_name(name: str, device: str, quick: bool) -> str:
    """Names the file of a result, without ".json"."""
    parts = [name, *(["cuda"] if device == "cuda" else []), *(["quick"] if quick else [])]
    return "-".join(parts)
