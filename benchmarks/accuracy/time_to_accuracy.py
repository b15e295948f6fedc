"""Seconds of training until the test accuracy first reaches a target: a step is not the goal.

    python -m benchmarks.accuracy.time_to_accuracy mnist --data DIR    also cifar10, digits
    python -m benchmarks.accuracy.time_to_accuracy mnist --data DIR --rates

The second line chooses the learning rates, and goes first.

One network is trained by every side, from the same weights and on the same batches, in turns, an
epoch each. What counts is the time of the steps, optimizer included; evaluation after each epoch
and compilation do not. An epoch counts as so many steps of its median, which another program that
runs for a while does not change. A side ends when it has reached all targets.

`--rates` trains for RATE_EPOCHS epochs by DFA and by backprop with every rate of RATES, scores on
the last tenth of the training set, never on the test set, and keeps for each method the rate that
gets furthest, soonest: four minutes a set. A seed takes two to four minutes, on two cores;
`--seeds` adds to those that were measured before on the same machine.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness.command import console
from benchmarks.harness.results import RESULTS, save
from benchmarks.harness.timing import keep_freed_memory
from benchmarks.speed.mlp import COLOURS, Loop
from examples.training import train
from examples.training.data import DataError, Dataset, load
from examples.training.measure import machine

RATES = (3e-4, 1e-3, 3e-3)
RATE_EPOCHS = 5


class Task(NamedTuple):
    """Holds targets of the accuracy, epochs after which no one goes on, options of train.py."""

    targets: tuple[float, ...]
    epochs: int
    options: str


COMMON = "--schedule constant --batch 128 --activation tanh --norm none --depth 2"
TASKS = {
    "digits": Task((0.93, 0.96), 20, f"{COMMON} --width 256 --input-dropout 0.1"),
    "mnist": Task((0.97, 0.98, 0.983), 10, f"{COMMON} --width 1024 --input-dropout 0.3"),
    "cifar10": Task((0.45, 0.48, 0.5), 8, f"{COMMON} --width 1024 --input-dropout 0.2"),
}


class Compiled(train.Learner):
    """Trains by backprop under torch.compile."""

    def __init__(self, method: str, config: argparse.Namespace, data: Dataset):
        super().__init__(method, config, data)
        self.model = torch.compile(self.model)

    def warm_up(self) -> float:
        """Compiles for whole batches and for the last one; returns the seconds that took."""
        start = time.perf_counter()
        count = len(self.data.train_y)
        for rows in (self.config.batch, count % self.config.batch):
            if rows:
                self.loss(self.data.train_x[:rows], self.data.train_y[:rows]).backward()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


class ByHand(train.Learner):
    """Trains by the loop of speed/mlp.py, with fastdfa's matrix: so it learns what fastdfa does."""

    def __init__(self, method: str, config: argparse.Namespace, data: Dataset):
        super().__init__("bp", config, data)  # plain modules
        fed = train.network(method, config, data)
        fed(data.train_x[:2])
        layers = [m for m in self.model if isinstance(m, nn.Linear)]
        self.stem = self.model[: list(self.model).index(layers[0])]  # Flatten, Dropout
        self.loop = Loop(layers, fed.feedback_matrix(fed.feedback_points[0]), torch.float32)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss, grads = self.loop(self.stem(x), y)
        for parameter, grad in zip(self.model.parameters(), grads, strict=True):
            parameter.grad = grad
        self.optimizer.step()
        return loss


# Which learner, and the method, which has a learning rate of its own.
SIDES: dict[str, tuple[type[train.Learner], str]] = {
    "backprop": (train.Learner, "bp"),
    "backprop compiled": (Compiled, "bp"),
    "PyTorch DFA loop": (ByHand, "dfa"),
    "fastdfa": (train.Learner, "dfa"),
}


def configured(dataset: str, options: argparse.Namespace, *more: str) -> argparse.Namespace:
    """Returns the options of train.py for this task."""
    data = ["--data", str(options.data)] if options.data else []
    line = ["--dataset", dataset, *data, *TASKS[dataset].options.split(), *more]
    return train.options(line)[0]


def loaded(config: argparse.Namespace) -> Dataset:
    data = load(config.dataset, config.data, validate=config.validate)
    return train.on_device(data, config)


def run(
    learners: dict[str, train.Learner], task: Task, progress: str
) -> dict[str, list[dict[str, float]]]:
    """Trains every learner; returns its epochs: accuracy, and seconds of training until then.

    In turns, the first one changing.
    """
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in learners}
    for epoch in range(1, task.epochs + 1):
        for name in list(learners)[:: 1 if epoch % 2 else -1]:
            curve, learner = curves[name], learners[name]
            before = curve[-1]["seconds"] if curve else 0.0
            if curve and max(point["accuracy"] for point in curve) >= task.targets[-1]:
                continue
            trained = learner.train_epoch(epoch, lambda method: None)
            steps = math.ceil(len(learner.data.train_y) / learner.config.batch)
            seconds = before + steps * trained["step_ms"] / 1e3
            accuracy = learner.evaluate()["test_accuracy"]
            curve.append({"accuracy": accuracy, "seconds": seconds})
            console.print(
                f"{progress}, epoch {epoch:2}, {name:17} {accuracy:7.2%}  {seconds:6.1f} s",
                style="dim",
            )
    return curves


def reached(curve: list[dict[str, float]], target: float) -> int | None:
    """Returns the first epoch, from 1 on, after which the accuracy is at least the target."""
    epochs = (n for n, point in enumerate(curve, 1) if point["accuracy"] >= target)
    return next(epochs, None)


# The learning rates --------------------------------------------------------------------------


def measure_rates(dataset: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a row for each method and rate, scored on data held out of the training set."""
    task, rows = TASKS[dataset]._replace(epochs=RATE_EPOCHS), []
    data = loaded(configured(dataset, options, "--validate"))
    for method in ("dfa", "bp"):
        for rate in RATES:
            config = configured(dataset, options, "--validate", "--lr", str(rate))
            learner = train.Learner(method, config, data)
            (curve,) = run({method: learner}, task, f"{dataset}, rate {rate:g}").values()
            accuracies = [point["accuracy"] for point in curve]
            rows.append({"method": method, "lr": rate, "accuracies": accuracies})
    return rows


def best_rate(rows: list[dict[str, Any]], method: str, targets: tuple[float, ...]) -> float:
    """Returns the rate of the most targets reached, then the one that reached the last of them
    first, then that of the highest accuracy."""

    def rank(row: dict[str, Any]) -> tuple[float, ...]:
        curve = [{"accuracy": accuracy} for accuracy in row["accuracies"]]
        epochs = [epoch for t in targets if (epoch := reached(curve, t)) is not None]
        return len(epochs), -epochs[-1] if epochs else 0, max(row["accuracies"])

    return max((row for row in rows if row["method"] == method), key=rank)["lr"]


def choose(dataset: str, options: argparse.Namespace) -> None:
    rows = measure_rates(dataset, options)
    path = save(f"rates-{dataset}", rows, options.out, targets=TASKS[dataset].targets)
    console.print(f"written: {path}")


def chosen(dataset: str, folder: Path) -> dict[str, float]:
    """Reads the learning rate of each method.

    Raises:
        SystemExit: where none was chosen.
    """
    path = folder / f"rates-{dataset}.json"
    if not path.exists():
        raise SystemExit(f"{path} is missing: choose the learning rates first, with --rates")
    rows = json.loads(path.read_text())["rows"]
    return {method: best_rate(rows, method, TASKS[dataset].targets) for method in ("dfa", "bp")}


# Measuring -----------------------------------------------------------------------------------


def measure(dataset: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns one row for each side."""
    task, rates = TASKS[dataset], chosen(dataset, options.out)
    sides = [name for name in SIDES if not (options.no_compile and "compiled" in name)]
    data = loaded(configured(dataset, options))
    learners, compiling = {}, {}
    for name in sides:
        learner, method = SIDES[name]
        lr = str(rates[method])
        config = configured(dataset, options, "--seed", str(seed), "--lr", lr)
        learners[name] = learner(method, config, data)
        compiling[name] = getattr(learners[name], "warm_up", lambda: 0.0)()
    curves = run(learners, task, f"{dataset}, seed {seed}")
    return [
        {
            "side": name,
            "seed": seed,
            "lr": rates[SIDES[name][1]],
            "compile_seconds": compiling[name],
            "epochs": curves[name],
            "reached": [reached(curves[name], target) for target in task.targets],
        }
        for name in sides
    ]


def kept(path: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Reads the rows of other seeds that were measured on this machine."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    same = all(earlier["machine"].get(k) == v for k, v in machine().items() if k != "date")
    return [row for row in earlier["rows"] if same and row["seed"] not in seeds]


def show(rows: list[dict[str, Any]], targets: tuple[float, ...]) -> None:
    """Prints seconds and epochs to each target, for each seed."""
    table = Table(title="Seconds of training (epochs) to a test accuracy")
    for name in ("side", "seed", "rate", *[f"{target:.1%}" for target in targets]):
        table.add_column(name, justify="right" if name != "side" else "left")
    for row in rows:
        cells = [
            "never" if n is None else f"{row['epochs'][n - 1]['seconds']:.1f} ({n})"
            for n in row["reached"]
        ]
        table.add_row(row["side"], str(row["seed"]), f"{row['lr']:g}", *cells)
    console.print(table)


def draw(rows: list[dict[str, Any]], targets: tuple[float, ...], path: Path) -> None:
    """Draws test accuracy over seconds of training, a line for each side and seed."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    colours = COLOURS | {"backprop": "#e07b00"}
    named = set()
    for row in rows:
        points, side = row["epochs"], row["side"]
        seconds = [point["seconds"] for point in points]
        accuracy = [100 * point["accuracy"] for point in points]
        label = side if side not in named else None
        axes.plot(seconds, accuracy, ".-", color=colours[side], label=label, linewidth=1)
        named.add(side)
    for target in targets:
        axes.axhline(100 * target, color="0.7", linewidth=0.8, zorder=0)
    axes.set_ylim(100 * targets[0] - 100 * (targets[-1] - targets[0]), None)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=TASKS)
    parser.add_argument("--data", type=Path, help="where the files of the data set lie")
    parser.add_argument("--rates", action="store_true", help="choose the learning rates instead")
    parser.add_argument("--seeds", default="0,1,2", help="of weights, batches and B (0,1,2)")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of rates and results")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    keep_freed_memory()
    try:
        if options.rates:
            return choose(options.dataset, options)
        seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
        task = TASKS[options.dataset]
        name = f"accuracy-{options.dataset}{'-quick' * options.quick}"
        config = configured(options.dataset, options)
        network = f"{config.depth}x{config.width}"
        rows = kept(options.out / f"{name}.json", seeds)
        for seed in seeds:
            rows += measure(options.dataset, seed, options)
            rows.sort(key=lambda row: (row["seed"], list(SIDES).index(row["side"])))
            # After every seed: a run that is stopped leaves what it has measured.
            path = save(name, rows, options.out, network=network, **task._asdict())
    except (DataError, train.UsageError, ValueError) as error:
        raise SystemExit(f"time_to_accuracy: {error}") from None
    show(rows, task.targets)
    draw(rows, task.targets, path.with_suffix(".png"))
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
