"""Times a training step: fastdfa beside backprop and the bare matrix products; its peak memory.

A step is forward, loss and backward, with fresh gradients on every side; the optimizer, the same
for all, is left out. *Fused backprop* is exact backprop by the layers and kernels of fastdfa, with
no cut: what fastdfa gains on that is DFA's own part. The limit is what no DFA step can avoid: the
matrix products of the forward pass and of the weight gradients, by bare `torch.mm` into fresh
outputs.

    python -m benchmarks.speed.step [--quick] [--device cuda]

On CUDA also with the whole step captured in a CUDA graph, which leaves launches out, and compiled
with CUDA graphs of its own (`reduce-overhead`) and with products chosen by measurement
(`max-autotune`). BioTorch (arXiv 2108.13446) is a side where it is installed.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness.command import Budget, add_arguments, check_device, console, working
from benchmarks.harness.rates import gemm_rate, gpu_rates
from benchmarks.harness.results import result_name, save
from benchmarks.harness.tables import OWN_PART, Cell, print_cases, quartiles, speed
from benchmarks.harness.timing import (
    FUSED,
    Step,
    beside_backprop,
    interleaved,
    keep_freed_memory,
    ratios,
    spread,
)
from benchmarks.speed.mlp import COLOURS, Case, steps_of
from examples.training.measure import machine, peak_memory

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
# Other dtypes: autocast with float32 weights, as bfloat16 is trained in; and double precision.
DTYPES = [
    Case(32, 128, 64, "bfloat16", autocast=True),
    Case(4, 1024, 256, "bfloat16", autocast=True),
    Case(8, 2048, 256, "bfloat16", autocast=True),
    Case(4, 1024, 256, "float64"),
]
QUICK = [Case(16, 256, 128), Case(4, 1024, 512)]
# Its peak memory is a target of its own.
MEMORY = [Case(16, 512, 8192)]
# The most important first: a budget of time may end the sweep.
CUDA_SWEEP = [
    Case(8, 4096, 4096, "bfloat16"),
    Case(32, 256, 128),
    Case(8, 2048, 2048, "bfloat16"),
    Case(4, 1024, 1024, "bfloat16"),
    Case(32, 1024, 256, "bfloat16"),
    Case(8, 4096, 4096),
]
CUDA_QUICK = CUDA_SWEEP[:2]
CUDA_MEMORY = [Case(16, 512, 8192), Case(16, 2048, 16384, "bfloat16")]


def measure(
    case: Case, rounds: int, seconds: float, compiled: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Measures one row: milliseconds, times relative to others and to the limit, peak memory."""
    steps, failed = working(steps_of(case, compiled, device), case.name)
    times = interleaved(steps, rounds, seconds, device)
    bases = {"to_limit": "limit", "to_graph": "backprop, graph"}
    return {
        "case": case.name,
        **case._asdict(),
        **beside_backprop(times),
        **{
            key: {n: v._asdict() for n, v in ratios(times, base).items()}
            for key, base in bases.items()
            if base in times
        },
        "limit_gflops": case.limit_flop / spread(times["limit"]).median / 1e9,
        "peak_mib": _memory(steps, device),
        "failed": failed,
    }


def measure_memory(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Measures a row of peak memory alone."""
    peaks = _memory(steps_of(case, False, device), device)
    return {"case": case.name, **case._asdict(), "peak_mib": peaks}


def _memory(steps: dict[str, Step], device: str) -> dict[str, float]:
    """Measures peaks. A replay allocates nothing, so graphs are left out: they hold what capture
    took."""
    measured = ["backprop", FUSED, "PyTorch DFA loop", "fastdfa"]
    if device != "cpu":
        measured += ["backprop compiled", "fastdfa compiled", "limit"]
    return {
        name: round(peak_memory(steps[name], device) / 2**20, 2)
        for name in measured
        if name in steps
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the speeds of all sides, with the quartiles of fastdfa; the limit; memory."""
    sides = dict.fromkeys(side for row in rows for side in row["to_backprop"])
    sides.pop("backprop")
    by_mm = "fastdfa, torch.mm" if "fastdfa, torch.mm" in sides else "fastdfa"
    title = "Speed of a training step, eager backprop = 1"
    lines: dict[str, Cell] = {
        "backprop, ms": lambda row: f"{row['milliseconds']['backprop']['median']:.2f}",
        **{side: partial(speed, side=side) for side in sides},
        "quartiles of fastdfa": quartiles,
        "DFA's own part": partial(speed, side="fastdfa", base="to_fused"),
        f"{by_mm}, of limit": partial(speed, side=by_mm, base="to_limit"),
        "peak MiB, backprop": lambda row: f"{row['peak_mib']['backprop']:.0f}",
        "peak MiB, fastdfa": lambda row: f"{row['peak_mib']['fastdfa']:.0f}",
    }
    print_cases(title, rows, lines)
    console.print(OWN_PART)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws bars of speed relative to eager backprop, one group a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in COLOURS if any(name in row["to_backprop"] for row in rows)]
    figure, axes = plt.subplots(figsize=(10, 0.55 * len(rows) + 1.6))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        lines = [line for line, row in enumerate(rows) if name in row["to_backprop"]]
        speed = [1 / rows[line]["to_backprop"][name]["median"] for line in lines]
        where = [line + index * height for line in lines]
        axes.barh(where, speed, height, label=name, color=COLOURS[name])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(rows))])
    axes.set_yticklabels([row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("speed of a training step, eager backprop = 1")
    axes.set_ylabel("depth x width / batch")
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_memory(memory: list[dict[str, Any]]) -> None:
    for row in memory:
        peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in row["peak_mib"].items())
        console.print(f"peak MiB of a step, {row['case']}: {peaks}")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, about two minutes")
    parser.add_argument(
        "--again", metavar="TEXT", help="on the CPU: measure the cases with this in their names "
        "anew (where other work disturbed them), and keep the other rows of the results",
    )  # fmt: skip
    parser.add_argument("--no-picture", action="store_true", help="write the numbers alone")
    add_arguments(parser, rounds=9)
    return parser.parse_args(argv)


def on_cpu(options: argparse.Namespace) -> None:
    keep_freed_memory()
    seconds = options.seconds or (0.1 if options.quick else 0.3)
    rate = gemm_rate()
    kept = _measured(options) if options.again else {"rows": []}
    rows = {row["case"]: row for row in kept["rows"]}
    for case in QUICK if options.quick else SWEEP + DTYPES:
        if options.again is None or options.again in case.name:
            console.print(f"measuring {case.name} ...", style="dim")
            rows[case.name] = measure(case, options.rounds, seconds, not options.no_compile)
    memory = kept["memory"] if options.again else [measure_memory(case) for case in MEMORY]
    finish(options, list(rows.values()), memory, gemm_gflops=rate / 1e9)


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the results of an earlier run, which must be of this machine."""
    path = options.out / f"{result_name('step', 'cpu', options.quick)}.json"
    results = json.loads(path.read_text())
    if results["machine"] != machine():
        raise SystemExit(f"--again: {path} is of another machine, version or day")
    return results


def on_cuda(options: argparse.Namespace) -> None:
    """Measures on a GPU; saves after every case, so that a run that is stopped leaves what it
    has."""
    rows: list[dict[str, Any]] = []
    budget, rates = Budget(options.budget), gpu_rates(options.rounds)
    name, seconds = result_name("step", "cuda", options.quick), options.seconds or 0.1
    for case in CUDA_QUICK if options.quick else CUDA_SWEEP:
        if budget.allows(case.name):
            console.print(f"measuring {case.name} ...", style="dim")
            rows.append(measure(case, options.rounds, seconds, not options.no_compile, "cuda"))
            save(name, rows, options.out, "cuda", memory=[], rates=rates)
    memory = [measure_memory(case, "cuda") for case in CUDA_MEMORY if budget.allows(case.name)]
    finish(options, rows, memory, rates=rates, left_out=budget.left_out)


def finish(
    options: argparse.Namespace, rows: list[dict[str, Any]], memory: list[Any], **facts: Any
) -> None:
    """Writes the tables, the file and the picture."""
    show(rows)
    show_memory(memory)
    name = result_name("step", options.device, options.quick)
    path = save(name, rows, options.out, options.device, memory=memory, **facts)
    if not options.no_picture:
        draw(rows, path.with_suffix(".png"))
    console.print(f"written: {path}")


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    check_device(options.device)
    on_cpu(options) if options.device == "cpu" else on_cuda(options)


if __name__ == "__main__":
    main()
