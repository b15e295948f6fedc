"""How the time of a training step grows with width, depth, batch and classes, all else fixed.

    python -m benchmarks.speed.growth [--quick] [--device cuda]

Three minutes on two cores.

The sides are those of mlp.py, eager. Where the loss and the head take most of the time, as with
50,000 classes, DFA has nothing to leave out: the projection e B costs what the gradient of the last
hidden layer would.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.harness.command import Budget, add_arguments, check_device, console, working
from benchmarks.harness.results import result_name, save
from benchmarks.harness.timing import beside_backprop, interleaved, keep_freed_memory
from benchmarks.speed.mlp import COLOURS, Case, steps_of

SIDES = ["backprop", "PyTorch DFA loop", "fastdfa, torch.mm", "fastdfa"]
# What grows, and the cases: the field of that name is the horizontal axis.
SWEEPS = {
    "width": [Case(8, width, 128) for width in (16, 32, 64, 128, 256, 512, 1024, 2048)],
    "depth": [Case(depth, 256, 128) for depth in (1, 2, 4, 8, 16, 32, 64, 128)],
    "batch": [Case(8, 512, batch) for batch in (1, 4, 16, 64, 256, 1024, 4096)],
    "classes": [
        Case(4, 512, 64, classes=classes) for classes in (2, 10, 100, 1000, 10_000, 50_000)
    ],
}
QUICK = {name: [cases[0], cases[-2]] for name, cases in SWEEPS.items()}
LABELS = {
    "width": "width, of 8 layers, batch 128",
    "depth": "hidden layers of 256, batch 128",
    "batch": "batch, 8 layers of 512",
    "classes": "classes, 4 layers of 512, batch 64",
}


def measure(sweep: str, case: Case, rounds: int, seconds: float, device: str) -> dict[str, Any]:
    """Measures one row: milliseconds, and time relative to backprop."""
    name = f"{sweep} {getattr(case, sweep)}"
    console.print(f"measuring {name} ...", style="dim")
    made = steps_of(case, compiled=False, device=device, published=False)
    steps, failed = working({side: made[side] for side in SIDES if side in made}, name)
    times = interleaved(steps, rounds, seconds, device)
    return {
        "sweep": sweep,
        "case": name,
        **case._asdict(),
        **beside_backprop(times),
        "failed": failed,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints speeds, eager backprop = 1."""
    table = Table(title="Speed of a training step, eager backprop = 1")
    table.add_column("")
    for name in ["backprop ms", *SIDES[1:]]:
        table.add_column(name, justify="right")
    for row in rows:
        ratio = row["to_backprop"]
        speeds = [
            f"{1 / ratio[side]['median']:.2f}" if side in ratio else "-" for side in SIDES[1:]
        ]
        table.add_row(row["case"], f"{row['milliseconds']['backprop']['median']:.2f}", *speeds)
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Four panels of speed; what lies below 1, where backprop is faster, is grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(10, 7), sharey=True)
    for sweep, axes in zip(SWEEPS, panels.flat, strict=True):
        for side in SIDES[1:]:
            found = [r for r in rows if r["sweep"] == sweep and side in r["to_backprop"]]
            where = [row[sweep] for row in found]
            ratio = [row["to_backprop"][side] for row in found]
            speed = [1 / r["median"] for r in ratio]
            axes.plot(where, speed, "o-", markersize=4, label=side, color=COLOURS[side])
            low, high = [1 / r["high"] for r in ratio], [1 / r["low"] for r in ratio]
            axes.fill_between(where, low, high, color=COLOURS[side], alpha=0.2, linewidth=0)
        axes.axhspan(0, 1, color="0.93", zorder=0)
        axes.axhline(1, color="0.3", linewidth=0.8)
        axes.set_xscale("log", base=10 if sweep == "classes" else 2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(LABELS[sweep])
        axes.set_ylim(0, None)
    for axes in panels[:, 0]:
        axes.set_ylabel("speed of a step, eager backprop = 1")
    panels[0, 0].text(0.02, 0.03, "backprop is faster", transform=panels[0, 0].transAxes, size=8)
    panels[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two points of each, half a minute")
    add_arguments(parser, rounds=7)
    options = parser.parse_args(argv)
    check_device(options.device)
    keep_freed_memory()
    seconds = options.seconds or (0.05 if options.quick else 0.1)
    budget, rows = Budget(options.budget), []
    name = result_name("growth", options.device, options.quick)
    for sweep, cases in (QUICK if options.quick else SWEEPS).items():
        for case in cases:
            if not budget.allows(f"{sweep} {getattr(case, sweep)}"):
                continue
            rows.append(measure(sweep, case, options.rounds, seconds, options.device))
            # After every case: a run that is stopped leaves what it has measured.
            path = save(name, rows, options.out, options.device, left_out=budget.left_out)
    show(rows)
    draw(rows, path.with_suffix(".png"))
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
