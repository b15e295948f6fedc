"""Writes the figures of README.md from the tracked results, between its markers.

python benchmarks/readme.py [--check]    --check: change nothing, exit 1 if they differ
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(value: float) -> str:
    return f"{value:.2f}x"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def where(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['threads']} threads, {machine['cpu_capability']}, "
        f"PyTorch {machine['torch']}, {machine['date']}"
    )


def step() -> str:
    """Speed of a step over sizes, and the peak memory of one."""
    results = read("step")
    names = ["backprop compiled", "PyTorch DFA loop", "limit", "fastdfa, torch.mm", "fastdfa"]
    rows = []
    for row in results["rows"]:
        speed = [times(1 / row["to_backprop"][name]["median"]) for name in names]
        of_limit = f"{1 / row['to_limit']['fastdfa, torch.mm']['median']:.2f}"
        memory = f"{row['peak_mib']['fastdfa']:.0f} / {row['peak_mib']['backprop']:.0f}"
        rows.append([row["case"], *speed, of_limit, memory])
    head = ["hidden layers x width / batch", "backprop, compiled", "PyTorch loop", "limit"]
    head += ["fastdfa, `torch.mm`", "**fastdfa**", "`torch.mm`, of limit"]
    head += ["peak MiB, fastdfa / backprop"]
    big = results["memory"][0]
    return (
        "Speed of a training step, eager backprop = 1 (784 inputs, 10 classes, tanh, float32; "
        f"medians of interleaved rounds; {where(results['machine'])}):\n\n"
        f"{table(head, rows)}\n\n"
        f"Peak memory of a step at {big['case']}: fastdfa {big['peak_mib']['fastdfa']:.0f} MiB, "
        f"backprop {big['peak_mib']['backprop']:.0f}, "
        f"the loop {big['peak_mib']['PyTorch DFA loop']:.0f}."
    )


def kernels() -> str:
    """Speed of project_gate beside eager and compiled PyTorch."""
    results = read("kernels")
    rows = []
    for row in results["rows"]:
        speed = {name: times(1 / value["median"]) for name, value in row["to_eager"].items()}
        names = ["eager, e B once", "compiled, e B once", "fastdfa", "fastdfa, B generated"]
        rows.append([row["case"], *[speed[name] for name in names]])
    head = ["layers x width, rows M, classes C", "eager, `e B` once", "compiled, `e B` once"]
    head += ["**project_gate**", "B generated in the kernel"]
    return (
        "The kernel alone. Eager PyTorch with a product `e B` for each layer = 1; where the layers "
        f"share B and have one width, one product serves all:\n\n{table(head, rows)}"
    )


def train() -> str:
    """Accuracy of the main job, with the cosines, and its cost."""
    rows = []
    for name, data in (("train-digits", "digits"), ("train-mnist", "MNIST")):
        results = read(name)
        options, methods = results["options"], results["summary"]["methods"]
        dfa, bp = methods["dfa"], methods["bp"]
        cosines = ", ".join(f"{cosine:.2f}" for cosine in dfa["alignment"])
        network = f"{data}, {options['depth']}x{options['width']}, {options['epochs']} epochs"
        rows.append(
            [
                network,
                f"{100 - 100 * dfa['test_accuracy']:.2f}%",
                f"{100 - 100 * bp['test_accuracy']:.2f}%",
                cosines,
                times(results["summary"]["speed_against_backprop"]),
                f"{dfa['train_seconds'] + bp['train_seconds']:.0f} s",
            ]
        )
    head = ["network", "**DFA** test error", "backprop", "cosine by layer", "speed of a step"]
    return table([*head, "both together"], rows)


FIGURES: dict[str, Callable[[], str]] = {"step": step, "kernels": kernels, "train": train}


def filled(text: str) -> str:
    """The README with every section between markers written anew."""
    for name, figures in FIGURES.items():
        pattern = re.compile(rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        body = figures()
        text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    new = filled(text)
    if sys.argv[1:] == ["--check"]:
        if new != text:
            print("README.md: the figures differ from benchmarks/results; run `make readme`")
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
