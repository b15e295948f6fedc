"""Times a training step of networks whose norms and activations are modules of their own.

As one writes a network, and as the recipe of the README has it: `Linear`, `BatchNorm1d`, `ReLU`.
*Layers one by one* is fastdfa where every module is called, as where they have hooks. A step is as
in step.py.

    python benchmarks/recipe.py [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import step
import torch
from common import (
    Budget,
    Step,
    add_arguments,
    beside_backprop,
    check_device,
    console,
    interleaved,
    keep_freed_memory,
    result_name,
    save,
    working,
)
from rich.table import Table
from torch import nn

import fastdfa

NORMS = {"": nn.Identity, "batch norm, ": nn.BatchNorm1d, "layer norm, ": nn.LayerNorm}
SIDES = ["backprop", "backprop compiled", "layers one by one", "fastdfa"]


class Case(NamedTuple):
    depth: int
    width: int
    batch: int
    norm: str = "batch norm, "

    @property
    def name(self) -> str:
        return f"{self.norm}relu, {self.depth}x{self.width} / {self.batch}"


SWEEP = [
    *[Case(4, 1024, 256, norm) for norm in NORMS],
    Case(4, 1024, 128),
    Case(16, 256, 128),
    Case(16, 256, 128, ""),
    Case(4, 128, 128),
]
QUICK = [Case(4, 1024, 256)]


def network(case: Case, linear: type[nn.Linear]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in [step.INPUTS, *[case.width] * (case.depth - 1)]:
        layers += [linear(inputs, case.width), NORMS[case.norm](case.width), nn.ReLU()]
    return nn.Sequential(*layers, linear(case.width, step.CLASSES))


def steps_of(case: Case, compiled: bool, device: str = "cpu") -> dict[str, Step]:
    x = torch.randn(case.batch, step.INPUTS, device=device)
    y = torch.randint(step.CLASSES, (case.batch,), device=device)
    plain = network(case, nn.Linear).to(device)
    rule = fastdfa.Feedback(seed=0)
    fused, called = (
        fastdfa.DFA(network(case, fastdfa.Linear), feedback=rule).to(device) for _ in range(2)
    )
    called.looks_ahead = False
    steps: dict[str, Step] = {"backprop": step.AutogradStep(plain, plain, x, y)}
    if compiled:
        steps["backprop compiled"] = step.AutogradStep(plain, torch.compile(plain), x, y)
    steps["layers one by one"] = step.AutogradStep(called, called, x, y)
    steps["fastdfa"] = step.AutogradStep(fused, fused, x, y)
    return steps


def measure(case: Case, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One row: milliseconds of a step, and its time relative to backprop's."""
    console.print(f"measuring {case.name} ...", style="dim")
    steps = steps_of(case, not options.no_compile, options.device)
    steps, failed = working(steps, case.name)
    times = interleaved(steps, options.rounds, seconds, options.device)
    return {
        "case": case.name,
        **case._asdict(),
        **beside_backprop(times),
        "failed": failed,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Speed of a step, eager backprop = 1")
    table.add_column("network / batch")
    for name in SIDES[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        found = [row["to_backprop"].get(name) for name in SIDES[1:]]
        speeds = ["-" if ratio is None else f"{1 / ratio['median']:.2f}x" for ratio in found]
        table.add_row(row["case"], *speeds)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size: a minute")
    add_arguments(parser, rounds=9)
    options = parser.parse_args()
    check_device(options.device)
    keep_freed_memory()
    budget, rows = Budget(options.budget), []
    for case in QUICK if options.quick else SWEEP:
        if budget.allows(case.name):
            rows.append(measure(case, options, 0.1 if options.quick else 0.3))
    show(rows)
    name = result_name("recipe", options.device, options.quick)
    path = save(name, rows, options.out, options.device, left_out=budget.left_out)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
