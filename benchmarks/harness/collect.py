"""Takes the results of `make gpu` over into the tracked ones, and prints what changed.

    python -m benchmarks.harness.collect DIR

DIR is the folder that `make gpu ARGS="--out DIR"` has filled. Every result is checked first, and
nothing is written unless all of them pass; `make readme` then puts the figures into the pages.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.results import RESULTS
from benchmarks.speed import memory, step

# What the rows of a result must have, for the pages and the comparison.
ROWS = {
    "kernels-cuda": ("milliseconds", "of_copy", "of_product", "peak_mib"),
    "step-cuda": ("milliseconds", "to_backprop", "to_limit", "peak_mib"),
    "kinds-cuda": ("milliseconds", "to_backprop", "bound", "peak_mib"),
    "memory-cuda": ("milliseconds", "to_backprop", "peak_mib"),
}
PICTURES = {"step-cuda": step.draw, "memory-cuda": memory.draw}


def problems(name: str, result: dict[str, Any]) -> Iterator[str]:
    """Says what is wrong with a result, line by line."""
    machine = result.get("machine", {})
    if not machine.get("gpu"):
        yield "machine names no GPU"
    if "cuda" not in machine.get("kernels", []):
        yield "it was measured without the CUDA kernels"
    if not result.get("rows"):
        yield "there are no rows"
    for row in all_rows(result):
        case = row.get("case", "a row without a case")
        for key in ROWS[name]:
            if key not in row:
                yield f"{case}: no {key}"
        for path, value in numbers(row):
            if not math.isfinite(value):
                yield f"{case}: {path} is {value}"
        if not any(side.startswith("fastdfa") for side in row.get("milliseconds", {})):
            yield f"{case}: fastdfa was not measured"


def all_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows with those of narrow layers, which memory.py keeps apart."""
    return result.get("rows", []) + result.get("narrow", [])


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Finds every number in nested dicts and lists, with where it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path} / {key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers(inner, f"{path}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, float(value)


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Says the milliseconds of every side of every case, before and after, and what failed."""
    before = {row["case"]: row["milliseconds"] for row in all_rows(old)}
    for row in all_rows(new):
        for side, value in row["milliseconds"].items():
            after, earlier = value["median"], before.get(row["case"], {}).get(side)
            change = "new"
            if earlier is not None:
                change = f"{100 * (after / earlier['median'] - 1):+.0f}%"
            yield f"{row['case']}, {side}: {after:.4f} ms ({change})"
        for side, message in row.get("failed", {}).items():
            yield f"{row['case']}, {side}: failed: {message}"
    for case in before.keys() - {row["case"] for row in all_rows(new)}:
        yield f"{case}: no longer measured"


def collect(folder: Path, results: Path = RESULTS) -> list[str]:
    """Checks the results in a folder and copies them; returns the lines to print.

    Raises:
        ValueError: where no result is found, or one does not pass.
    """
    found = {name: folder / f"{name}.json" for name in ROWS if (folder / f"{name}.json").exists()}
    if not found:
        raise ValueError(f"{folder} holds none of {', '.join(f'{name}.json' for name in ROWS)}")
    contents = {name: json.loads(path.read_text()) for name, path in found.items()}
    wrong = [
        f"{found[name]}: {problem}"
        for name, content in contents.items()
        for problem in problems(name, content)
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    lines = []
    for name, content in contents.items():
        target = results / f"{name}.json"
        old = json.loads(target.read_text()) if target.exists() else {}
        lines += [f"== {name}, {content['machine']['gpu']}", *changes(old, content)]
        target.write_text(json.dumps(content, indent=1) + "\n")
        if name in PICTURES:
            PICTURES[name](content["rows"], target.with_suffix(".png"))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    try:
        print("\n".join(collect(parser.parse_args().folder)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("written; `make readme` puts the figures into the pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
