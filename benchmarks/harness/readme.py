"""Writes the figures of README.md and docs/ from the tracked results, between their markers.

python -m benchmarks.harness.readme [--check]    --check: change nothing, exit 1 if they differ
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.harness.figures import kernels, low_precision, memory, steps, training
from benchmarks.paper import report

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FIGURES: dict[str, Callable[[], str]] = {
    "headline": steps.headline,
    "step": steps.step,
    "dtypes": steps.dtypes,
    "growth": steps.growth,
    "accuracy": training.accuracy,
    "memory": memory.memory,
    "one-pass": memory.one_pass,
    "kernels": kernels.kernels,
    "products": kernels.products,
    "overhead": kernels.overhead,
    "float16": low_precision.float16_steps,
    "int8-steps": low_precision.int8_steps,
    "int8-accuracy": low_precision.int8_accuracy,
    "kinds": steps.kinds,
    "recipe": steps.recipe,
    "versions": steps.versions,
    "train": training.train,
    "anchored": training.anchored,
    "family": partial(training.family, "rules-mnist"),
    "family-cnn": partial(training.family, "rules-cnn"),
    "step-cuda": steps.step_cuda,
    "kernels-cuda": kernels.kernels_cuda,
    "kinds-cuda": steps.kinds_cuda,
    "memory-cuda": memory.memory_cuda,
}


def filled(text: str) -> str:
    """Writes every section of a page anew, between its markers."""
    pattern = r"(<!-- figures: ([\w -]+) -->\n).*?(<!-- end -->)"
    of_paper = report.sections()

    def section(marked: re.Match[str]) -> str:
        name = marked[2]
        figures = of_paper[name] if name in of_paper else FIGURES[name]()
        return f"{marked[1]}{figures}\n{marked[3]}"

    return re.sub(pattern, section, text, flags=re.DOTALL)


def main() -> int:
    changed = []
    for page in PAGES:
        text = page.read_text()
        new = filled(text)
        if new != text:
            changed.append(page.relative_to(ROOT).as_posix())
            if sys.argv[1:] != ["--check"]:
                page.write_text(new)
    if changed and sys.argv[1:] == ["--check"]:
        print(f"{', '.join(changed)}: figures differ from benchmarks/results; run `make readme`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
