"""Peak memory and time of a training step over depth: streaming beside backprop and checkpointing.

A step is forward, loss, backward and the optimizer, SGD with momentum, whose state is not counted:
it is there before. Checkpointing saves one activation for each of sqrt(depth) segments (arXiv
1604.06174), once with an ordinary optimizer, once with one that updates each parameter in backward,
so that the gradients do not exist all at once there either. On the CPU fastdfa multiplies by
`torch.mm` here, as backprop does, so that no ratio is that of two libraries; streaming once more by
the products that it takes of itself, where those are its own.

    python -m benchmarks.speed.memory [--quick] [--one-pass] [--device cuda]

With `--one-pass` streaming by the error stands beside streaming by the target (DRTP), where layers
learn during the only forward pass, and checkpointing is left out.

On a GPU wider and with more rows, as the workspace, which streaming fills, is larger there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.checkpoint import checkpoint_sequential

import fastdfa
from benchmarks.harness.command import Budget, add_arguments, check_device, console, working
from benchmarks.harness.results import result_name, save
from benchmarks.harness.steps import by_torch_mm
from benchmarks.harness.timing import Step, beside_backprop, interleaved, keep_freed_memory
from examples.training.measure import peak_memory
from fastdfa import signals
from fastdfa.ops import products as gemm

CLASSES = 10
SETTINGS = {"lr": 1e-3, "momentum": 0.9}
SIDES = {
    "backprop": "#333333",
    "checkpointed": "#9aa5b1",
    "checkpointed, updates in backward": "#e0b050",
    "fastdfa": "#63b0c9",
    "streaming": "#1f6f8b",
    "streaming, own products": "#7fb77e",
}
ONE_PASS = ("backprop", "fastdfa", "streaming", "one pass", "streaming, own products")
ONE_PASS += ("one pass, own products",)


class Case(NamedTuple):
    """A perceptron of `depth` hidden layers, tanh, all as wide as the input; and a batch."""

    depth: int
    width: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.depth}x{self.width} / {self.batch}"


SWEEP = [Case(depth, 512, 512) for depth in (8, 16, 32, 64, 128)]
# Where a step is bound by what Python and autograd do for each layer.
NARROW = [Case(32, 512, 256), Case(32, 256, 256), Case(32, 128, 64)]
QUICK = [Case(depth, 512, 256) for depth in (8, 32)]
# The deepest last: a budget of time may end the sweep.
CUDA_SWEEP = [Case(depth, 1024, 4096) for depth in (8, 16, 32, 64, 128)]
CUDA_NARROW = [Case(32, 1024, 256), Case(32, 256, 128)]
CUDA_QUICK = [Case(depth, 1024, 1024) for depth in (8, 32)]


class OrdinaryStep:
    """Makes fresh gradients, forward, loss, backward, and the optimizer's update where there is
    one."""

    def __init__(
        self, model: nn.Module, forward: Callable[[Tensor], Tensor], optimizer: Optimizer | None
    ) -> None:
        self.model, self.forward, self.optimizer = model, forward, optimizer

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.clear()
        F.cross_entropy(self.forward(x), y).backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def clear(self) -> None:
        self.model.zero_grad()


class OnBatch:
    """Makes a step on one batch, for the timer; `clear` frees what the last call has left."""

    def __init__(self, step: Callable[[Tensor, Tensor], Any], x: Tensor, y: Tensor) -> None:
        self.step, self.x, self.y = step, x, y
        self.clear = getattr(step, "clear", lambda: None)

    def __call__(self) -> None:
        self.step(self.x, self.y)


def plain_network(case: Case) -> nn.Sequential:
    width = case.width
    hidden = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(case.depth)]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def fused_network(case: Case, signal: str | signals.Signal = "error") -> fastdfa.DFA:
    width = case.width
    hidden = [fastdfa.Linear(width, width, activation="tanh") for _ in range(case.depth)]
    layers = nn.Sequential(*hidden, fastdfa.Linear(width, CLASSES))
    return fastdfa.DFA(layers, fastdfa.Feedback(signal=signal))


def update_in_backward(model: nn.Module) -> None:
    """Gives each parameter an optimizer, run as soon as its gradient is there: torch's recipe."""
    for parameter in model.parameters():
        optimizer = SGD([parameter], **SETTINGS)

        def update(parameter: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)


def streaming(model: fastdfa.DFA) -> Callable[[Tensor, Tensor], Any]:
    """Makes a streaming step by an error or a target."""
    step = fastdfa.StreamingStep(model, SGD(model.parameters(), **SETTINGS))

    def on(x: Tensor, y: Tensor) -> None:
        model.target = y if model.feedback.sends.needs_target else None
        step(lambda: F.cross_entropy(model(x), y))

    return on


def steps_of(case: Case, device: str) -> dict[str, Step]:
    """Makes every way to make a step of this size, by name."""
    torch.manual_seed(0)
    x = torch.randn(case.batch, case.width).to(device)
    y = torch.randint(CLASSES, (case.batch,)).to(device)
    plain, checkpointed, in_backward = (plain_network(case).to(device) for _ in range(3))
    ordinary, streamed = (fused_network(case).to(device) for _ in range(2))
    targeted = fused_network(case, signals.Target(raw=True)).to(device)
    update_in_backward(in_backward)

    def by_segments(model: nn.Sequential) -> Callable[[Tensor], Tensor]:
        segments = round(case.depth**0.5)
        return lambda x: checkpoint_sequential(model, segments, x, use_reentrant=False)

    def with_optimizer(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> OrdinaryStep:
        return OrdinaryStep(model, forward, SGD(model.parameters(), **SETTINGS))

    steps = {
        "backprop": with_optimizer(plain, plain),
        "checkpointed": with_optimizer(checkpointed, by_segments(checkpointed)),
        "checkpointed, updates in backward": OrdinaryStep(
            in_backward, by_segments(in_backward), None
        ),
        "fastdfa": with_optimizer(ordinary, ordinary),
        "streaming": streaming(streamed),
        "one pass": streaming(targeted),
    }
    made: dict[str, Step] = {name: OnBatch(step, x, y) for name, step in steps.items()}
    if device == "cpu":
        if gemm.library() == "fastdfa":
            made |= {f"{name}, own products": made[name] for name in ("streaming", "one pass")}
        made |= {name: by_torch_mm(made[name]) for name in ("fastdfa", "streaming", "one pass")}
    return made


def measure(
    case: Case, rounds: int, seconds: float, device: str, sides: Iterable[str]
) -> dict[str, Any]:
    """Measures one row: milliseconds, time relative to backprop, peak memory."""
    console.print(f"measuring {case.name} ...", style="dim")
    made = steps_of(case, device)
    steps, failed = working({n: made[n] for n in sides if n in made}, case.name)
    times = interleaved(steps, rounds, seconds, device)
    peaks = {n: peak_memory(steps[n], device) / 2**20 for n in steps}
    return {
        "case": case.name,
        **case._asdict(),
        **beside_backprop(times),
        "peak_mib": {name: round(peak, 2) for name, peak in peaks.items()},
        "parameters_mib": round(4 * case.depth * case.width * (case.width + 1) / 2**20, 2),
        "failed": failed,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a line for each side of each case."""
    table = Table(title="A training step with its optimizer")
    for name in ("depth x width / batch", ""):
        table.add_column(name)
    for name in ("peak MiB", "ms", "backprop = 1"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        for name, ratio in row["to_backprop"].items():
            peak = f"{row['peak_mib'][name]:.1f}"
            milliseconds = f"{row['milliseconds'][name]['median']:.1f}"
            case = row["case"] if name == "backprop" else ""
            table.add_row(case, name, peak, milliseconds, f"{ratio['median']:.2f}")
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws peak memory and time over depth, of the networks that differ in nothing else."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    depths = [row["depth"] for row in rows]
    for name, colour in SIDES.items():
        there = [row for row in rows if name in row["peak_mib"]]  # where it did not fail
        where = [row["depth"] for row in there]
        peaks = [row["peak_mib"][name] for row in there]
        times = [row["to_backprop"][name]["median"] for row in there]
        left.plot(where, peaks, "o-", label=name, color=colour)
        right.plot(where, times, "o-", label=name, color=colour)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xlabel(f"hidden layers of {rows[0]['width']}, batch {rows[0]['batch']}")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylabel("peak MiB of a step, with its gradients")
    right.set_ylim(0, None)
    right.set_ylabel("time of a step, backprop = 1")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cases(device: str, quick: bool) -> tuple[list[Case], list[Case]]:
    """Lists the cases over depth, and those of narrow layers."""
    if device == "cuda":
        return (CUDA_QUICK, []) if quick else (CUDA_SWEEP, CUDA_NARROW)
    return (QUICK, []) if quick else (SWEEP, NARROW)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two depths, half a minute")
    parser.add_argument("--one-pass", action="store_true", help="streaming by error and target")
    parser.add_argument("--no-picture", action="store_true", help="write the numbers alone")
    add_arguments(parser, rounds=3)
    options = parser.parse_args(argv)
    check_device(options.device)
    keep_freed_memory()
    sweep, narrow = cases(options.device, options.quick)
    budget, rows = Budget(options.budget), []
    sides = ONE_PASS if options.one_pass else SIDES
    name = "memory-one-pass" if options.one_pass else "memory"
    name = result_name(name, options.device, options.quick)
    for case in [*sweep, *narrow]:
        if not budget.allows(case.name):
            continue
        rows.append(measure(case, options.rounds, options.seconds or 0.1, options.device, sides))
        # After every case: a run that is stopped leaves what it has measured.
        path = save(
            name, rows[: len(sweep)], options.out, options.device,
            narrow=rows[len(sweep) :], left_out=budget.left_out,
        )  # fmt: skip
    show(rows)
    if not (options.no_picture or options.one_pass):
        draw(rows[: len(sweep)], path.with_suffix(".png"))
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
