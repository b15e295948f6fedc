"""Compares the steps of this checkout with those of another one: `--other DIR`, such as the commit
before a change in a worktree of its own, with its extension built.

    python -m benchmarks.speed.versions --other ../before

Each side runs in processes of its own, in turn; in each process eager backprop takes every second
step. So a side is its speed relative to backprop in the same process, and what is compared is the
ratio of the two, which a machine that slows down between two processes does not move. The peak
memory of a step is compared in the same processes. Networks use what both versions offer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdfa

CLASSES, INPUTS = 10, 784


class Case(NamedTuple):
    """A network of `depth` hidden layers of `width` units, for a batch."""

    kind: str
    depth: int
    width: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.depth}x{self.width} / {self.batch}"


CASES = [
    *[Case("tanh", *sizes) for sizes in (
        (4, 16, 4), (32, 16, 4), (4, 256, 1), (4, 128, 128), (32, 128, 64), (16, 256, 128),
        (32, 256, 256), (8, 512, 256), (4, 1024, 32), (4, 1024, 128), (4, 1024, 512),
        (2, 2048, 256), (8, 2048, 256), (4, 4096, 256),
    )],
    Case("tanh, custom module", 32, 128, 64), Case("tanh, custom module", 4, 1024, 256),
    Case("F.relu(layer(x))", 4, 512, 128), Case("relu, dropout", 4, 512, 128),
    *[Case("batch norm, relu", *sizes) for sizes in (
        (4, 128, 128), (16, 256, 128), (4, 1024, 128), (4, 1024, 256),
    )],
    Case("layer norm, relu", 4, 1024, 256), Case("convolutions of 5x5", 3, 32, 64),
]  # fmt: skip


class InTurn(nn.Module):
    """Calls its modules in turn, in a forward of its own."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Functional(InTurn):
    """The same with `F.relu` behind every layer but the last."""

    def forward(self, x: Tensor) -> Tensor:
        *hidden, head = self.parts
        for part in hidden:
            x = F.relu(part(x))
        return head(x)


def network(case: Case, ours: bool) -> nn.Module:
    """Returns the network of fastdfa's layers, with their activations fused where that is usual, or
    of torch's."""
    if case.kind.startswith("convolutions"):
        return _convolutions(case, ours)
    linear = fastdfa.Linear if ours else nn.Linear
    sizes = [INPUTS, *[case.width] * case.depth]
    pairs = list(pairwise(sizes))
    head = linear(case.width, CLASSES)
    if case.kind.startswith("F.relu"):
        return Functional([*[linear(n, m) for n, m in pairs], head])
    modules: list[nn.Module] = []
    for n, m in pairs:
        modules += _hidden(case.kind, n, m, ours)
    return (InTurn if "custom" in case.kind else nn.Sequential)(
        *[[*modules, head]] if "custom" in case.kind else [*modules, head]
    )


def _hidden(kind: str, n: int, m: int, ours: bool) -> list[nn.Module]:
    if "norm" in kind:
        norm = nn.BatchNorm1d(m) if "batch" in kind else nn.LayerNorm(m)
        return [fastdfa.Linear(n, m) if ours else nn.Linear(n, m), norm, nn.ReLU()]
    name = "relu" if "relu" in kind else "tanh"
    module = nn.ReLU() if name == "relu" else nn.Tanh()
    made = [fastdfa.Linear(n, m, activation=name)] if ours else [nn.Linear(n, m), module]
    return [*made, nn.Dropout(0.1)] if "dropout" in kind else made


def _convolutions(case: Case, ours: bool) -> nn.Module:
    modules: list[nn.Module] = []
    for n in [3, *[case.width] * (case.depth - 1)]:
        if ours:
            modules.append(fastdfa.Conv2d(n, case.width, 5, padding=2, activation="tanh"))
        else:
            modules += [nn.Conv2d(n, case.width, 5, padding=2), nn.Tanh()]
        modules.append(nn.MaxPool2d(2))
    last = (fastdfa.Linear if ours else nn.Linear)(case.width * (32 // 2**case.depth) ** 2, CLASSES)
    return nn.Sequential(*modules, nn.Flatten(), last)


def steps_of(case: Case) -> dict[str, Callable[[], None]]:
    """Returns the steps of eager backprop and of fastdfa, and of fused backprop where this version
    has it: forward, loss and backward into fresh gradients."""
    torch.manual_seed(0)
    image = case.kind.startswith("convolutions")
    x = torch.randn(case.batch, *((3, 32, 32) if image else (INPUTS,)))
    y = torch.randint(CLASSES, (case.batch,))
    models: dict[str, nn.Module] = {
        "backprop": network(case, ours=False),
        "fastdfa": fastdfa.DFA(network(case, ours=True)),
    }
    with contextlib.suppress(TypeError):  # an earlier version has no such argument
        models["fused backprop"] = fastdfa.DFA(network(case, ours=True), cut=())

    def step_of(model: nn.Module) -> Callable[[], None]:
        parameters = list(model.parameters())

        def step() -> None:
            for parameter in parameters:
                parameter.grad = None
            F.cross_entropy(model(x), y).backward()

        return step

    return {name: step_of(model) for name, model in models.items()}


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Returns, of fastdfa and of fused backprop, the speed of a step relative to backprop, and of
    all the milliseconds and the peak MiB above its start.

    Each beside backprop alone: with a third side in turn, what is in the caches when backprop
    begins is another side's, which moved single ratios by a tenth.
    """
    from examples.training.measure import peak_memory

    steps, made = steps_of(case), {}
    for name in steps:
        if name != "backprop":
            times = _in_turn({"backprop": steps["backprop"], name: steps[name]}, seconds)
            made[name] = {
                "speed": times["backprop"] / times[name],
                "backprop_ms": times["backprop"],
            }
            made[name]["peak_mib"] = peak_memory(steps[name]) / 2**20
    return made


def _in_turn(steps: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Returns the median milliseconds of a step of each side."""
    for step in steps.values():
        for _ in range(4):
            step()
    began = time.perf_counter()
    steps["backprop"]()
    count = max(1, int(0.004 / (time.perf_counter() - began)))  # steps in a row: 4 ms
    times: dict[str, list[float]] = {name: [] for name in steps}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times["backprop"]) < 5:
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(count):
                step()
            times[name].append((time.perf_counter() - began) / count * 1e3)
    return {name: median(values) for name, values in times.items()}


def worker(options: argparse.Namespace) -> None:
    """Measures all cases with the package that this process finds, and prints JSON."""
    from benchmarks.harness.timing import keep_freed_memory

    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = {
        case.name: measure(case, options.seconds)
        for case in CASES
        if not options.only or any(word in case.name for word in options.only)
    }
    print(json.dumps({"fastdfa": str(Path(fastdfa.__file__).parent), "rows": rows}))


def run(package: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a worker with the fastdfa of a checkout and the benchmark of this one."""
    here = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.speed.versions", "--worker"]
    command += ["--threads", str(options.threads), "--seconds", str(options.seconds)]
    for word in options.only:
        command += ["--only", word]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package.resolve()), str(here)])}
    # From the checkout's parent, so that the current folder does not come before PYTHONPATH.
    ran = subprocess.run(
        command, env=environment, cwd=package.resolve().parent, capture_output=True, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"the worker of {package} failed:\n{ran.stderr[-2000:]}")
    printed = ran.stdout
    made: dict[str, Any] = json.loads(printed.splitlines()[-1])
    if Path(made["fastdfa"]).parent.resolve() != package.resolve():
        raise RuntimeError(f"expected the fastdfa of {package}, got {made['fastdfa']}")
    return made["rows"]


def compared(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for every case the speeds relative to backprop, and their ratio."""
    rows = []
    for case in now[0]:

        def speed(runs: list[dict[str, Any]], side: str, case: str = case) -> float:
            return median(run[case][side]["speed"] for run in runs)

        row = {
            "case": case,
            "backprop_ms": median(run[case]["fastdfa"]["backprop_ms"] for run in now),
            "before": speed(before, "fastdfa"),
            "now": speed(now, "fastdfa"),
            "fused_backprop": speed(now, "fused backprop"),
            "peak_mib_before": before[0][case]["fastdfa"]["peak_mib"],
            "peak_mib_now": now[0][case]["fastdfa"]["peak_mib"],
        }
        row = {name: _rounded(value) for name, value in row.items()}
        rows.append(row | {"ratio": round(row["now"] / row["before"], 3)})
    return rows


def _rounded(value: float | str) -> float | str:
    return value if isinstance(value, str) else round(value, 3)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    from benchmarks.harness.tables import print_cases

    lines = {
        "before": lambda row: f"{row['before']:.2f}x",
        "now": lambda row: f"{row['now']:.2f}x",
        "now / before": lambda row: f"{row['ratio']:.2f}",
        "fused backprop": lambda row: f"{row['fused_backprop']:.2f}x",
        "peak MiB": lambda row: f"{row['peak_mib_before']:.1f} {row['peak_mib_now']:.1f}",
    }
    print_cases("Speed of a step, eager backprop = 1", rows, lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--other", type=Path, help="the other checkout, its extension built")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side, in turn")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case in a process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", default=[], help="cases with this in their name")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        return worker(options)
    if options.other is None:
        parser.error("--other DIR: name the checkout to compare with")
    here, before, now = Path(__file__).parents[2], [], []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        before.append(run(options.other, options))
        now.append(run(here, options))
    rows = compared(before, now)
    show(rows)
    commit = ["git", "-C", str(options.other), "rev-parse", "--short", "HEAD"]
    other = subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip()
    torch.set_num_threads(options.threads)
    from benchmarks.harness.results import RESULTS, save

    print("written:", save("versions", rows, RESULTS, before=other))
    return None


if __name__ == "__main__":
    main()
