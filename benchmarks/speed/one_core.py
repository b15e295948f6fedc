"""What one core does: rates of matrix products, and what Python and autograd cost a step.

    python -m benchmarks.speed.one_core [--quick]

Products: the kernels of this library, whatever `fastdfa.ops.products` would choose on this
processor, beside `torch.mm` and oneDNN (the op that inductor calls for a linear layer, with weights
as they are). Every product goes into a fresh output, float32. Overhead: a step of a network so
small that there is nothing to compute, by the sides of mlp.py, and the three ops of its hidden
layers alone.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

import fastdfa
from benchmarks.harness.command import Budget, add_arguments, console, working
from benchmarks.harness.results import result_name, save
from benchmarks.harness.steps import AutogradStep
from benchmarks.harness.timing import Step, beside_backprop, interleaved, keep_freed_memory, spread
from benchmarks.speed import mlp
from fastdfa import ops
from fastdfa.activations import IDENTITY, KINDS

TANH = KINDS.index("tanh")
PARTS = ["forward", "with bias and tanh", "weight gradient"]
LIBRARIES = ["fastdfa", "torch.mm", "oneDNN"]
OVERHEAD = [mlp.Case(32, 16, 4), mlp.Case(4, 16, 4)]
SIDES = ["backprop", "PyTorch DFA loop", "layers one by one", "fastdfa"]
OPS = "the ops of the hidden layers alone"


class Case(NamedTuple):
    """`layers` layers in a row: products of [rows, inputs] with the weights [outputs, inputs]."""

    rows: int
    outputs: int
    inputs: int
    layers: int = 1

    @property
    def name(self) -> str:
        layers = f", {self.layers} layers" if self.layers > 1 else ""
        return f"{self.rows} x {self.outputs} x {self.inputs}{layers}"

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.outputs * self.inputs * self.layers


# A few rows, where packing weights does not pay; many rows of a narrow layer, where it does.
CASES = [
    Case(64, 128, 128),
    Case(64, 128, 128, layers=32),
    Case(2048, 64, 64),
    Case(128, 256, 256),
    Case(256, 512, 512),
    Case(32, 1024, 1024),
    Case(128, 1024, 1024),
    Case(512, 1024, 1024),
    Case(256, 2048, 2048),
    Case(256, 4096, 4096),
]
QUICK = CASES[:2]


def product_steps(case: Case) -> dict[str, Step]:
    """Makes each part by each library, named "part, library"."""
    torch.manual_seed(0)
    x, n = torch.randn(case.rows, case.inputs), case.layers
    weights = [torch.randn(case.outputs, case.inputs) * case.inputs**-0.5 for _ in range(n)]
    biases = [torch.randn(case.outputs) for _ in range(n)]
    inputs = [torch.randn(case.rows, case.inputs) for _ in range(n)]
    deltas = [torch.randn(case.rows, case.outputs) for _ in range(n)]

    def own(biases: list[Tensor] | list[None], kind: int) -> list[Tensor]:
        return torch.ops.fastdfa.linear_chain(x, weights, biases, [kind] * n, [0.0] * n)

    def by_onednn(biases: list[Tensor] | list[None], activation: str) -> list[Tensor]:
        outputs = [x]
        for weight, bias in zip(weights, biases, strict=True):
            outputs.append(onednn(outputs[-1], weight, bias, activation))
        return outputs[1:]

    def by_mm() -> list[Tensor]:
        outputs = [x]
        for weight in weights:
            outputs.append(torch.mm(outputs[-1], weight.t()))
        return outputs[1:]

    def by_addmm() -> list[Tensor]:
        outputs = [x]
        for weight, bias in zip(weights, biases, strict=True):
            outputs.append(torch.addmm(bias, outputs[-1], weight.t()).tanh_())
        return outputs[1:]

    def gradients_by_mm() -> list[Tensor]:
        return [torch.mm(d.t(), h) for d, h in zip(deltas, inputs, strict=True)]

    def gradients_by_onednn() -> list[Tensor]:
        return [onednn(d.t(), h.t()) for d, h in zip(deltas, inputs, strict=True)]

    steps: list[Step] = [
        partial(own, [None] * n, IDENTITY),
        by_mm,
        partial(by_onednn, [None] * n, "none"),
        partial(own, biases, TANH),
        by_addmm,
        partial(by_onednn, biases, "tanh"),
        lambda: torch.ops.fastdfa.weight_gradients(deltas, inputs),
        gradients_by_mm,
        gradients_by_onednn,
    ]
    names = [f"{part}, {library}" for part in PARTS for library in LIBRARIES]
    return dict(zip(names, steps, strict=True))


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"):
    """Computes f(x W^T + b), x [M, K], W [N, K]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def overhead_steps(case: mlp.Case) -> dict[str, Step]:
    """Makes the sides of mlp.py that multiply, the layers without a chain, and the ops alone."""
    made = mlp.steps_of(case, compiled=False, published=False)
    model = mlp.fused_network(case)
    model.looks_ahead = False  # each layer is computed as it is called
    x, y = torch.randn(case.batch, mlp.INPUTS), torch.randint(case.classes, (case.batch,))
    made["layers one by one"] = AutogradStep(model, model, x, y)
    return {name: made[name] for name in SIDES} | {OPS: ops_step(case, x)}


def ops_step(case: mlp.Case, x: Tensor) -> Step:
    """Makes outputs, deltas, bias and weight gradients of the hidden layers: one call of an op
    each."""
    weights = [torch.randn(n, k) * k**-0.5 for k, n in pairwise(case.widths[:-1])]
    biases = [torch.zeros(case.width) for _ in weights]
    error, feedback = torch.randn(case.batch, case.classes), torch.randn(case.classes, case.width)
    kinds, params, scales = ([value] * case.depth for value in (TANH, 0.0, 1.0))

    def call() -> tuple[list[Tensor], list[Tensor]]:
        outputs = ops.linear_chain(x, weights, biases, kinds, params)
        deltas, bias_grads = ops.project_gate(error, [feedback], outputs, kinds, params, scales)
        return ops.weight_gradients(deltas, [x, *outputs[:-1]]), bias_grads

    return call


def measure_products(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """Measures one row: GFLOP/s of every part by every library."""
    console.print(f"measuring {case.name} ...", style="dim")
    steps, failed = working(product_steps(case), case.name)
    times = interleaved(steps, rounds, seconds)
    rates = {n: spread([case.flop / t / 1e9 for t in ts])._asdict() for n, ts in times.items()}
    return {"case": case.name, **case._asdict(), "gflops": rates, "failed": failed}


def measure_overhead(case: mlp.Case, rounds: int, seconds: float) -> dict[str, Any]:
    """Measures milliseconds of a step, and its time relative to backprop's."""
    console.print(f"measuring steps of {case.name} ...", style="dim")
    times = interleaved(overhead_steps(case), rounds, seconds)
    return {
        "case": case.name,
        **case._asdict(),
        **beside_backprop(times),
    }


def show(rows: list[dict[str, Any]], overhead: list[dict[str, Any]]) -> None:
    for part in PARTS:
        products = Table(title=f"{part}, one core, GFLOP/s")
        products.add_column("M x N x K")
        for library in LIBRARIES:
            products.add_column(library, justify="right")
        for row in rows:
            rates = [row["gflops"].get(f"{part}, {library}") for library in LIBRARIES]
            cells = ["-" if rate is None else f"{rate['median']:.0f}" for rate in rates]
            products.add_row(row["case"], *cells)
        console.print(products)
    for row in overhead:
        steps = Table(title=f"A step of {row['case']}, one core")
        steps.add_column("")
        steps.add_column("ms", justify="right")
        steps.add_column("of backprop's", justify="right")
        for name, value in row["milliseconds"].items():
            ratio = row["to_backprop"][name]["median"]
            steps.add_row(name, f"{value['median']:.3f}", f"{ratio:.2f}")
        console.print(steps)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes: ten seconds")
    add_arguments(parser, rounds=9)
    options = parser.parse_args(argv)
    if options.device != "cpu":
        raise SystemExit(f"--device must be cpu: this measures its cores, got {options.device}")
    if missing := fastdfa.build_info()["fallback"].get("cpu"):
        raise SystemExit(f"no kernels to measure: {missing}")
    torch.set_num_threads(1)
    keep_freed_memory()
    seconds = options.seconds or (0.02 if options.quick else 0.05)
    budget, rows = Budget(options.budget), []
    for case in QUICK if options.quick else CASES:
        if budget.allows(case.name):
            rows.append(measure_products(case, options.rounds, seconds))
    overhead = [measure_overhead(case, options.rounds, 4 * seconds) for case in OVERHEAD]
    show(rows, overhead)
    name = result_name("one-core", "cpu", options.quick)
    path = save(name, rows, options.out, overhead=overhead, left_out=budget.left_out)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
