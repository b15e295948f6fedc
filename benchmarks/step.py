"""Time and peak memory of a training step: fastdfa beside backprop and the bare matrix products.

A step is forward, loss and backward, with fresh gradients on every side; the optimizer, the same
for all, is left out. The limit is what no DFA step can avoid: the matrix products of the forward
pass and of the weight gradients, by bare `torch.mm` into fresh outputs.

    python benchmarks/step.py [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    RESULTS,
    Step,
    console,
    gemm_rate,
    interleaved,
    keep_freed_memory,
    peak_memory,
    ratios,
    save,
    spread,
)
from rich.table import Table
from torch import Tensor, nn

import fastdfa
from fastdfa import gemm

INPUTS, CLASSES = 784, 10


class Case(NamedTuple):
    """A multilayer perceptron INPUTS-width x depth-CLASSES, tanh, and a batch."""

    depth: int
    width: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.depth}x{self.width} / {self.batch}"

    @property
    def widths(self) -> list[int]:
        return [INPUTS, *[self.width] * self.depth, CLASSES]

    @property
    def limit_flop(self) -> int:
        products = zip(self.widths[:-1], self.widths[1:], strict=True)
        return 2 * sum(2 * self.batch * k * n for k, n in products)


SWEEP = [
    Case(4, 128, 128),
    Case(32, 128, 64),
    Case(16, 256, 128),
    Case(32, 256, 256),
    Case(8, 512, 256),
    Case(16, 512, 256),
    Case(4, 1024, 32),
    Case(4, 1024, 128),
    Case(4, 1024, 256),
    Case(4, 1024, 512),
    Case(4, 1024, 1024),
    Case(8, 1024, 256),
    Case(2, 2048, 256),
    Case(8, 2048, 256),
    Case(4, 4096, 256),
]
QUICK = [Case(16, 256, 128), Case(4, 1024, 512)]
# Its peak memory is a target of its own.
MEMORY = [Case(16, 512, 8192)]


def network(case: Case, linear: type[nn.Linear]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(case.widths[:-1], case.widths[1:], strict=True):
        layers.append(linear(inputs, outputs))
        layers.append(nn.Tanh())
    return nn.Sequential(*layers[:-1])


def fused_network(case: Case) -> fastdfa.DFA:
    *hidden, (inputs, outputs) = zip(case.widths[:-1], case.widths[1:], strict=True)
    layers = [fastdfa.Linear(k, n, activation="tanh") for k, n in hidden]
    return fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(inputs, outputs)))


def autograd_step(model: nn.Module, forward: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Forward, loss and backward into fresh gradients."""

    parameters = list(model.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        F.cross_entropy(forward(x), y).backward()

    return step


def by_torch_mm(step: Step) -> Step:
    """The same step with the matrix products that backprop has, to tell apart the two gains."""

    def with_torch_mm() -> None:
        library, gemm.library = gemm.library, lambda: "torch"
        try:
            step()
        finally:
            gemm.library = library

    return with_torch_mm


def loop_step(case: Case, x: Tensor, y: Tensor) -> Step:
    """DFA as one writes it by hand in PyTorch, without autograd and with nothing to spare."""
    layers = [m for m in network(case, nn.Linear) if isinstance(m, nn.Linear)]
    weights = [layer.weight.detach() for layer in layers]
    biases = [layer.bias.detach() for layer in layers]
    scale = (case.width * CLASSES) ** -0.5
    feedback = torch.randn(CLASSES, case.width) * scale

    def step() -> list[Tensor]:
        hidden = [x]
        for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
            hidden.append(torch.tanh(torch.addmm(bias, hidden[-1], weight.t())))
        y_hat = torch.addmm(biases[-1], hidden[-1], weights[-1].t()).requires_grad_()
        (error,) = torch.autograd.grad(F.cross_entropy(y_hat, y), y_hat)
        grads = [error.t() @ hidden[-1], error.sum(0)]
        projection = error @ feedback  # once: all layers share B and have one width
        for h, below in zip(hidden[1:], hidden[:-1], strict=True):
            delta = torch.ops.aten.tanh_backward(projection, h)
            grads += [delta.t() @ below, delta.sum(0)]
        return grads

    return step


def limit_step(case: Case, x: Tensor) -> Step:
    """The matrix products of forward and weight gradients, each into a fresh output."""
    weights = [torch.randn(n, k) for k, n in zip(case.widths[:-1], case.widths[1:], strict=True)]
    inputs = [x, *[torch.randn(case.batch, n) for n in case.widths[1:-1]]]
    deltas = [torch.randn(case.batch, n) for n in case.widths[1:]]

    def step() -> list[Tensor]:
        forward = [h @ w.t() for h, w in zip(inputs, weights, strict=True)]
        del forward
        return [d.t() @ h for d, h in zip(deltas, inputs, strict=True)]

    return step


def steps_of(case: Case, compiled: bool = True) -> dict[str, Step]:
    """Every way to make a step of this size, by name."""
    torch.manual_seed(0)
    x, y = torch.randn(case.batch, INPUTS), torch.randint(CLASSES, (case.batch,))
    plain, dfa = network(case, nn.Linear), fused_network(case)
    steps = {
        "backprop": autograd_step(plain, plain, x, y),
        "PyTorch DFA loop": loop_step(case, x, y),
        "fastdfa": autograd_step(dfa, dfa, x, y),
        "fastdfa, torch.mm": by_torch_mm(autograd_step(dfa, dfa, x, y)),
        "limit": limit_step(case, x),
    }
    if compiled:
        torch._dynamo.reset()
        steps["backprop compiled"] = autograd_step(plain, torch.compile(plain), x, y)
        steps["fastdfa compiled"] = autograd_step(dfa, torch.compile(dfa), x, y)
    return steps


def measure(case: Case, rounds: int, seconds: float, compiled: bool) -> dict[str, Any]:
    """One row: milliseconds, time relative to backprop and to the limit, peak memory."""
    steps = steps_of(case, compiled)
    times = interleaved(steps, rounds, seconds)
    milliseconds = {name: spread([1e3 * t for t in values]) for name, values in times.items()}
    return {
        "case": case.name,
        **case._asdict(),
        "milliseconds": {name: value._asdict() for name, value in milliseconds.items()},
        "to_backprop": {n: v._asdict() for n, v in ratios(times, "backprop").items()},
        "to_limit": {n: v._asdict() for n, v in ratios(times, "limit").items()},
        "limit_gflops": case.limit_flop / milliseconds["limit"].median / 1e6,
        "peak_mib": _memory(steps),
    }


def measure_memory(case: Case) -> dict[str, Any]:
    """A row of peak memory alone."""
    return {"case": case.name, **case._asdict(), "peak_mib": _memory(steps_of(case, False))}


def _memory(steps: dict[str, Step]) -> dict[str, float]:
    measured = ("backprop", "PyTorch DFA loop", "fastdfa")
    return {name: round(peak_memory(steps[name]) / 2**20, 2) for name in measured}


def show(rows: list[dict[str, Any]]) -> None:
    """Times relative to backprop, with the quartiles of fastdfa; the limit; memory."""
    table = Table(title="A training step relative to eager backprop (less is faster)")
    names = [n for n in rows[0]["to_backprop"] if n != "backprop"]
    table.add_column("depth x width / batch", no_wrap=True)
    columns = ["backprop ms", *names, "limit / fastdfa, torch.mm", "peak MiB, backprop, fastdfa"]
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row["case"], f"{row['milliseconds']['backprop']['median']:.2f}"]
        for name in names:
            value = row["to_backprop"][name]
            quartiles = f" ({value['low']:.2f}-{value['high']:.2f})" if name == "fastdfa" else ""
            cells.append(f"{value['median']:.2f}{quartiles}")
        cells.append(f"{1 / row['to_limit']['fastdfa, torch.mm']['median']:.2f}")
        cells.append(f"{row['peak_mib']['backprop']:.0f}, {row['peak_mib']['fastdfa']:.0f}")
        table.add_row(*cells)
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of speed relative to eager backprop, one group a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = ["backprop compiled", "PyTorch DFA loop", "limit", "fastdfa, torch.mm"]
    names += ["fastdfa compiled", "fastdfa"]
    names = [name for name in names if name in rows[0]["to_backprop"]]
    colours = ["#9aa5b1", "#e0b050", "#333333", "#a8d5e2", "#63b0c9", "#1f6f8b"]
    figure, axes = plt.subplots(figsize=(10, 0.55 * len(rows) + 1.6))
    height = 0.8 / len(names)
    for index, (name, colour) in enumerate(zip(names, colours, strict=False)):
        speed = [1 / row["to_backprop"][name]["median"] for row in rows]
        where = [line + index * height for line in range(len(rows))]
        axes.barh(where, speed, height, label=name, color=colour)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(rows))])
    axes.set_yticklabels([row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("speed of a training step, eager backprop = 1")
    axes.set_ylabel("depth x width / batch")
    axes.legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, about two minutes")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    seconds = 0.1 if options.quick else 0.3
    rate = gemm_rate()
    for case in QUICK if options.quick else SWEEP:
        console.print(f"measuring {case.name} ...", style="dim")
        rows.append(measure(case, options.rounds, seconds, not options.no_compile))
    memory = [measure_memory(case) for case in MEMORY]
    show(rows)
    for row in memory:
        peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in row["peak_mib"].items())
        console.print(f"peak MiB of a step, {row['case']}: {peaks}")
    name = "step-quick" if options.quick else "step"
    path = save(name, rows, options.out, memory=memory, gemm_gflops=rate / 1e9)
    draw(rows, options.out / f"{name}.png")
    console.print(f"written: {path} and the picture beside it")


if __name__ == "__main__":
    main()
