"""Times a training step of networks whose norms and activations are modules of their own.

They are written as the recipe of docs/accuracy.md has it: `Linear`, `BatchNorm1d`, `ReLU`. *Fused
backprop* is fastdfa with no cut, *layers one by one* fastdfa where every module is called, as where
they have hooks. A step is as in step.py.

    python -m benchmarks.speed.recipe [--quick]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

import fastdfa
from benchmarks.harness.command import Budget, add_arguments, check_device, console, working
from benchmarks.harness.results import result_name, save
from benchmarks.harness.steps import AutogradStep
from benchmarks.harness.tables import OWN_PART, Cell, print_cases, speed
from benchmarks.harness.timing import FUSED, Step, beside_backprop, interleaved, keep_freed_memory
from benchmarks.speed.mlp import CLASSES, INPUTS

NORMS = {"": nn.Identity, "batch norm, ": nn.BatchNorm1d, "layer norm, ": nn.LayerNorm}
SIDES = ["backprop", "backprop compiled", FUSED, "layers one by one", "fastdfa"]


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
    for inputs in [INPUTS, *[case.width] * (case.depth - 1)]:
        layers += [linear(inputs, case.width), NORMS[case.norm](case.width), nn.ReLU()]
    return nn.Sequential(*layers, linear(case.width, CLASSES))


def steps_of(case: Case, compiled: bool, device: str = "cpu") -> dict[str, Step]:
    x = torch.randn(case.batch, INPUTS, device=device)
    y = torch.randint(CLASSES, (case.batch,), device=device)
    plain = network(case, nn.Linear).to(device)
    rule = fastdfa.Feedback(seed=0)
    fused, called = (
        fastdfa.DFA(network(case, fastdfa.Linear), feedback=rule).to(device) for _ in range(2)
    )
    called.looks_ahead = False
    uncut = fastdfa.DFA(network(case, fastdfa.Linear), feedback=rule, cut=()).to(device)
    steps: dict[str, Step] = {"backprop": AutogradStep(plain, plain, x, y)}
    if compiled:
        steps["backprop compiled"] = AutogradStep(plain, torch.compile(plain), x, y)
    steps[FUSED] = AutogradStep(uncut, uncut, x, y)
    steps["layers one by one"] = AutogradStep(called, called, x, y)
    steps["fastdfa"] = AutogradStep(fused, fused, x, y)
    return steps


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one row: milliseconds of a step, and its time relative to others'."""
    console.print(f"measuring {case.name} ...", style="dim")
    steps = steps_of(case, not options.no_compile, options.device)
    steps, failed = working(steps, case.name)
    seconds = options.seconds or (0.1 if options.quick else 0.3)
    times = interleaved(steps, options.rounds, seconds, options.device)
    return {
        "case": case.name,
        **case._asdict(),
        **beside_backprop(times),
        "failed": failed,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the speeds of all sides."""
    lines: dict[str, Cell] = {side: partial(speed, side=side) for side in SIDES[1:]}
    lines["DFA's own part"] = partial(speed, side="fastdfa", base="to_fused")
    print_cases("Speed of a step, eager backprop = 1", rows, lines)
    console.print(OWN_PART)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size: a minute")
    add_arguments(parser, rounds=9)
    options = parser.parse_args(argv)
    check_device(options.device)
    keep_freed_memory()
    budget, rows = Budget(options.budget), []
    for case in QUICK if options.quick else SWEEP:
        if budget.allows(case.name):
            rows.append(measure(case, options))
    show(rows)
    name = result_name("recipe", options.device, options.quick)
    path = save(name, rows, options.out, options.device, left_out=budget.left_out)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
