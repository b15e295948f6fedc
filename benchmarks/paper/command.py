"""Every experiment of "Principled Training of Neural Networks with Direct Feedback Alignment"
(arXiv 1906.04554) on CIFAR-10, and the search for the best fully connected network.

    python -m benchmarks.paper --data DIR                      # all of table.RUNS, for hours
    python -m benchmarks.paper --data DIR --only 'fc*' --seeds 3
    python -m benchmarks.paper --data DIR --quick              # one short epoch each
    python -m benchmarks.paper --data DIR --device cuda        # on a GPU
    python -m benchmarks.paper --data DIR --cost               # a step beside the published way
    python -m benchmarks.paper --figures                       # pictures from the results

A run goes on after its last complete epoch whenever the same command is given again, after Ctrl-C
or `kill` too. Several processes (`--threads 1` each) share the table: each takes a run that none
has. What is finished is collected in benchmarks/results/paper.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

from benchmarks.harness.command import console
from benchmarks.harness.results import RESULTS
from benchmarks.harness.timing import keep_freed_memory
from benchmarks.paper.cost import measure_cost
from benchmarks.paper.data import read
from benchmarks.paper.progress import Bar
from benchmarks.paper.records import claimed, collect, finished, train
from benchmarks.paper.report import draw
from benchmarks.paper.table import RUNS, Config, key
from benchmarks.paper.training import plain
from examples.training.data import DataError
from examples.training.measure import usable_device


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", metavar="DIR", help="where CIFAR-10 lies")
    parser.add_argument("--only", metavar="NAME", action="append", help="runs, by names with *")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds of each run (3)")
    parser.add_argument("--missing", action="store_true", help="leave out what the results have")
    parser.add_argument("--epochs", type=int, help="in place of those of the table; recorded")
    parser.add_argument("--quick", action="store_true", help="one epoch of a few images")
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), help="of checkpoints")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--list", action="store_true", help="the runs, and do nothing")
    parser.add_argument("--cost", action="store_true", help="a step beside the published way")
    parser.add_argument("--rounds", type=int, default=15, help="of --cost")
    parser.add_argument("--figures", action="store_true", help="pictures from the results")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> list[tuple[Config, int]]:
    """Lists runs and seeds, the first seed of every run first."""
    patterns = args.only or ["*"]
    configs = [c for name, c in RUNS.items() if any(fnmatch(name, p) for p in patterns)]
    if not configs:
        raise SystemExit(f"paper: --only {' '.join(patterns)} matches none of {', '.join(RUNS)}")
    epochs = 1 if args.quick else args.epochs
    if epochs:
        configs = [replace(config, epochs=epochs) for config in configs]
    return [(config, seed) for seed in range(args.seeds) for config in configs]


def lacking(runs: list[tuple[Config, int]], results: Path) -> list[tuple[Config, int]]:
    """Lists those of which the results have no record of the same configuration."""
    records = json.loads(results.read_text())["runs"] if results.exists() else []
    known = [(run["name"], run["seed"], run["config"]) for run in records]
    return [(c, seed) for c, seed in runs if (c.name, seed, plain(c)) not in known]


def train_all(args: argparse.Namespace, runs: list[tuple[Config, int]]) -> None:
    folder = args.runs.with_name(f"{args.runs.name}-quick") if args.quick else args.runs
    folder.mkdir(parents=True, exist_ok=True)
    data = read(args.data, args.quick, args.device)
    bar = Bar(runs)
    with bar.progress:
        for config, seed in runs:
            name = key(config, seed)
            with claimed(folder / f"{name}.claim") as ours:
                if not ours or finished(folder / f"{name}.json", config):
                    bar.skip(config, config.epochs)
                    continue
                train(config, seed, data, folder, args.quick, bar)
            if not args.quick:
                collect(folder, args.out / "paper.json")


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.figures:
        draw(args.out)
        return 0
    runs = chosen(args)
    if args.missing:
        runs = lacking(runs, args.out / "paper.json")
    if args.list:
        for config, seed in runs:
            console.print(f"{key(config, seed):40} {config.table}, {config.epochs} epochs")
        return 0
    if args.data is None:
        raise SystemExit("paper: --data DIR is needed: where CIFAR-10 lies")
    try:
        if args.cost:
            data = read(args.data, False, args.device)
            console.print(measure_cost(data, args.rounds, args.out))
        else:
            train_all(args, runs)
    except DataError as error:
        print(f"paper: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paper: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0
