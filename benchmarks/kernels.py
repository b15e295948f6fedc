"""Time of the kernels: `project_gate` beside eager and compiled PyTorch, and the filling of B.

The PyTorch versions do the same work for every layer: e B, tanh's derivative, and the sum over
rows. Where all layers share B and have one width, e B once is enough: "eager, e B once".

    python benchmarks/kernels.py [--quick]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, Step, console, interleaved, keep_freed_memory, ratios, save, spread
from rich.table import Table

from fastdfa import ops
from fastdfa.activations import KINDS
from fastdfa.ops.reference import accumulation_dtype

TANH = KINDS.index("tanh")


class Case(NamedTuple):
    """`layers` layers of `width` features, `rows` rows, an error of `classes` features."""

    layers: int
    width: int
    rows: int
    classes: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.layers}x{self.width}, M={self.rows}, C={self.classes}, {dtype}"


SWEEP = [
    Case(4, 1024, 512, 10, torch.float32),
    Case(4, 1024, 512, 100, torch.float32),
    Case(4, 1024, 512, 1000, torch.float32),
    Case(32, 128, 64, 10, torch.float32),
    Case(8, 4096, 256, 10, torch.float32),
    Case(1, 1024, 512, 10, torch.float32),
    Case(4, 1024, 512, 10, torch.bfloat16),
    Case(4, 1024, 512, 1000, torch.bfloat16),
    Case(4, 1024, 512, 10, torch.float64),
]
QUICK = SWEEP[:3]


def eager(error: torch.Tensor, matrix: torch.Tensor, saved: list[torch.Tensor]) -> list[Any]:
    results = []
    for h in saved:
        delta = torch.ops.aten.tanh_backward(error @ matrix, h)
        results += [delta, delta.sum(0)]
    return results


def eager_once(error: torch.Tensor, matrix: torch.Tensor, saved: list[torch.Tensor]) -> list[Any]:
    projection = error @ matrix
    results = []
    for h in saved:
        delta = torch.ops.aten.tanh_backward(projection, h)
        results += [delta, delta.sum(0)]
    return results


def steps_of(case: Case) -> dict[str, Step]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    error = torch.randn(case.rows, case.classes).to(case.dtype)
    saved = [torch.randn(case.rows, case.width).tanh().to(case.dtype) for _ in range(case.layers)]
    wide = ops.feedback(case.classes, case.width, seed=1, dtype=accumulation_dtype(case.dtype))
    matrix = wide.to(case.dtype)
    compiled = torch.compile(eager_once)
    kinds, params, scales = [[x] * case.layers for x in (TANH, 0.0, 0.01)]
    return {
        "eager": lambda: eager(error, matrix, saved),
        "eager, e B once": lambda: eager_once(error, matrix, saved),
        "compiled, e B once": lambda: compiled(error, matrix, saved),
        "fastdfa": lambda: ops.project_gate(error, [wide], saved, kinds, params, scales),
        "fastdfa, B generated": lambda: ops.project_gate(
            error, [], saved, kinds, params, scales, seed=1, streams=[0]
        ),
    }


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    times = interleaved(steps_of(case), rounds, seconds)
    return {
        "case": case.name,
        "milliseconds": {n: spread([1e3 * t for t in v])._asdict() for n, v in times.items()},
        "to_eager": {n: v._asdict() for n, v in ratios(times, "eager").items()},
    }


def measure_filling(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Numbers a second of a dense B, beside torch's own generator."""
    out = torch.empty(1000, 4096)
    rows = []
    for distribution in ops.DISTRIBUTIONS:
        steps: dict[str, Step] = {
            "fastdfa": lambda d=distribution: ops.fill_feedback_(out, 1, 0, d),
            "torch": out.normal_ if distribution == "normal" else out.uniform_,
        }
        times = interleaved(steps, rounds, seconds)
        rate = {n: out.numel() / spread(t).median / 1e9 for n, t in times.items()}
        rows.append({"distribution": distribution, "giga_numbers_a_second": rate})
    return rows


def show(rows: list[dict[str, Any]], filling: list[dict[str, Any]]) -> None:
    table = Table(title="project_gate: how many times faster than eager PyTorch")
    others = ["eager, e B once", "compiled, e B once"]
    for column in ("case", "eager ms", *others, "fastdfa", "quartiles", "B generated"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        speed = {name: 1 / value["median"] for name, value in row["to_eager"].items()}
        mine = row["to_eager"]["fastdfa"]
        table.add_row(
            row["case"],
            f"{row['milliseconds']['eager']['median']:.3f}",
            *[f"{speed[name]:.2f}" for name in others],
            f"{speed['fastdfa']:.2f}",
            f"{1 / mine['high']:.2f}-{1 / mine['low']:.2f}",
            f"{speed['fastdfa, B generated']:.2f}",
        )
    console.print(table)
    for row in filling:
        rate = row["giga_numbers_a_second"]
        console.print(
            f"filling B, {row['distribution']}: {rate['fastdfa']:.2f} G numbers a second "
            f"(torch {rate['torch']:.2f})"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three sizes")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (15)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    keep_freed_memory()
    rows = [measure(c, options.rounds, 0.05) for c in (QUICK if options.quick else SWEEP)]
    filling = measure_filling(options.rounds, 0.05)
    show(rows, filling)
    name = "kernels-quick" if options.quick else "kernels"
    console.print(f"written: {save(name, rows, options.out, filling=filling)}")


if __name__ == "__main__":
    main()
