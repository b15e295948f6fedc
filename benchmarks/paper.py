"""Every experiment of "Principled Training of Neural Networks with Direct Feedback Alignment"
(arXiv 1906.04554) on CIFAR-10, and the search for the best fully connected network.

    python benchmarks/paper.py --data DIR                      # all of paper_table.RUNS, for hours
    python benchmarks/paper.py --data DIR --only 'fc*' --seeds 3
    python benchmarks/paper.py --data DIR --quick              # one short epoch each
    python benchmarks/paper.py --data DIR --device cuda        # on a GPU
    python benchmarks/paper.py --data DIR --cost               # a step beside the published way
    python benchmarks/paper.py --figures                       # pictures from the results

A run goes on after its last complete epoch whenever the same command is given again, after Ctrl-C
or `kill` too. Several processes (`--threads 1` each) share the table: each takes a run that none
has. What is finished is collected in benchmarks/results/paper.json.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    RESULTS,
    console,
    interleaved,
    keep_freed_memory,
    machine,
    ratios,
    result_name,
    save,
    spread,
    usable_device,
)
from data import DataError, load
from paper_networks import build, hidden_layers, prealign
from paper_table import RUNS, Config
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import fastdfa

PROBE_ROWS = 1000  # test images on which the cosines are measured; published: 128
QUICK_IMAGES = 1280
CURVES = ("baselines", "best")  # tables whose first seed is scored after every epoch
OPTIMIZERS = {
    "sgd": lambda p, config: torch.optim.SGD(p, config.lr, fused=True),
    "momentum": lambda p, config: torch.optim.SGD(p, config.lr, momentum=0.9, fused=True),
    "adam": lambda p, config: torch.optim.Adam(p, config.lr, fused=True),
    "adamw": lambda p, config: torch.optim.AdamW(
        p, config.lr, weight_decay=config.weight_decay, fused=True
    ),
}


# The data


class Split(NamedTuple):
    x: Tensor  # [N, 3, 32, 32] float32
    y: Tensor


class Data(NamedTuple):
    train: Split
    test: Split


# The published code normalises each channel by these; the deviations are those of an image, on
# average, so that the inputs are 1.2 times as large as at a deviation of 1.
_MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
_STD = torch.tensor((0.2023, 0.1994, 0.2010)).view(3, 1, 1)


def read(directory: str, quick: bool, device: str) -> Data:
    """CIFAR-10 as the published code normalises it, all of it on the device."""
    data = load("cifar10", directory)
    low, high = data.train_x.min(), data.train_x.max()  # the pixels 0 and 255
    for x in (data.train_x, data.test_x):
        x.sub_(low).div_(high - low).sub_(_MEAN).div_(_STD)
    count = QUICK_IMAGES if quick else None
    train = Split(data.train_x[:count].to(device), data.train_y[:count].to(device))
    return Data(train, Split(data.test_x[:count].to(device), data.test_y[:count].to(device)))


def split(data: Data, config: Config, quick: bool) -> dict[str, Split]:
    """What is trained on, the test set and, for choices, what is held out: the last images."""
    held_out = min(config.held_out, len(data.train.y) // 10) if quick else config.held_out
    if not held_out:
        return {"train": data.train, "test": data.test}
    kept = len(data.train.y) - held_out
    held = Split(data.train.x[kept:], data.train.y[kept:])
    return {
        "train": Split(data.train.x[:kept], data.train.y[:kept]), "held_out": held,
        "test": data.test,
    }  # fmt: skip


def augmented(x: Tensor, kinds: tuple[str, ...]) -> Tensor:
    """Images mirrored at random, and shifted by up to 4 pixels within zeros, all drawn anew."""
    n, device = len(x), x.device
    if "flip" in kinds:
        mirrored = torch.rand(n, device=device) < 0.5
        x = torch.where(mirrored.view(n, 1, 1, 1), x.flip(3), x)
    if "shift" in kinds:
        x = F.pad(x, (4, 4, 4, 4))
        pixels, images = (torch.arange(of, device=device) for of in (32, n))
        rows, columns = (torch.randint(9, (n, 1), device=device) + pixels for _ in range(2))
        images = images.view(n, 1, 1)
        x = x.movedim(1, 3)[images, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
    return x


# One run


def precision(config: Config, device: torch.device) -> str:
    """Of training, "bfloat16" or "float32": without instructions for its products a CPU takes 4
    times as long for bfloat16 as for float32, with them 0.6 of the time."""
    if config.precision != "fast":
        return config.precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = fastdfa.build_info().get("bfloat16_products")
    return "bfloat16" if fast else "float32"


class Diverged(Exception):
    """The loss is no longer finite."""


class Run:
    """A configuration with a seed: the network, its training, and what it has reached."""

    def __init__(self, config: Config, seed: int, data: Data, quick: bool) -> None:
        self.config, self.seed = config, seed
        self.splits = split(data, config, quick)
        self.device = data.train.x.device
        # A CPU pools many channels at a time then: 5 ms a step of the CNN in place of 58.
        self.model = build(config, seed).to(self.device, memory_format=torch.channels_last)
        if config.prealigned:
            prealign(self.model, config, *self._batch(torch.arange(config.batch)))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[config.optimizer](trained, config)
        self.precision = precision(config, self.device)
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "history": self.history, "config": _plain(self.config)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]

    def epoch(self) -> Iterator[int]:
        """Trains for an epoch, yielding before every step how many there are.

        It is scored where curves are kept alone: an eighth of an epoch's time.
        Its randomness comes from (seed, epoch) alone, so a resumed run is the run. The last batch
        is left out if it is not full, as published.
        """
        config, x_and_y = self.config, self.splits["train"]
        number = len(self.history)
        torch.manual_seed(self.seed * 10_007 + number + 1)
        self.model.train()
        batches = torch.randperm(len(x_and_y.y)).to(self.device).split(config.batch)
        batches = [rows for rows in batches if len(rows) == config.batch]
        correct, losses = [], []
        start = time.perf_counter()
        for i, rows in enumerate(batches):
            yield len(batches)
            self._set_rate((number + i / len(batches)) / config.epochs)
            x, y = self._batch(rows)
            self.optimizer.zero_grad()
            with self._autocast():
                logits = self.model(x).float()
            loss = F.cross_entropy(logits, y)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            correct.append((logits.detach().argmax(1) == y).sum())
        finite = torch.stack(losses).isfinite().all().item()  # waits for the device
        seconds = time.perf_counter() - start
        if not finite:
            raise Diverged
        curve = self.seed == 0 and config.table in CURVES
        of = [name for name in self.splits if name != "train" and curve]
        scored = {name: self.accuracy(name) for name in of}
        running = torch.stack(correct).sum().item() / (len(batches) * config.batch)
        loss = torch.stack(losses).double().mean().item()
        self.history.append({"train": running, **scored, "loss": loss, "seconds": seconds})

    @torch.no_grad()
    def accuracy(self, name: str) -> float:
        self.model.eval()
        x, y = self.splits[name]
        found = torch.cat([self.model(self._shaped(part)).argmax(1) for part in x.split(1000)])
        return (found == y).double().mean().item()

    def record(self, status: str) -> dict[str, Any]:
        """What is kept of a finished run."""
        scores = {name: self.accuracy(name) for name in self.splits}
        columns = {name: [e[name] for e in self.history] for name in (self.history or [{}])[0]}
        return {
            "name": self.config.name,
            "seed": self.seed,
            "status": status,
            "config": _plain(self.config),
            "precision": self.precision,
            "accuracy": scores,
            "cosines": self.cosines() if status == "complete" else None,
            "seconds_per_epoch": median(columns["seconds"]) if columns else None,
            "machine": machine(self.device),
            "history": columns,
        }

    def cosines(self) -> dict[str, dict[str, float]] | None:
        """Of every hidden layer, at its output, mean and deviation over test images."""
        if self.config.method != "dfa":
            return None
        self.model.eval()
        x, y = (part[:PROBE_ROWS] for part in self.splits["test"])
        x = self._shaped(x)
        measured = list(fastdfa.alignment(self.model, F.cross_entropy, x, y).points)
        layers = hidden_layers(self.model)
        cut = [name for name in layers if name != self._without_cut()]
        found = {
            name: {"mean": point.mean, "std": point.std}
            for name, point in zip(cut, measured, strict=True)
        }
        for name in layers.keys() - found.keys():
            found[name] = _cosine_behind(self.model, layers[name], x, y)
        return dict(sorted(found.items()))

    def _without_cut(self) -> str | None:
        if not self.config.published_cuts:
            return None
        return "1" if self.config.network == "fc" else "4"

    def _set_rate(self, progress: float) -> None:
        cosine = self.config.schedule == "cosine"
        factor = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor

    def _autocast(self) -> torch.autocast:
        """Of a training step; what is measured is measured in float32."""
        lowered = self.precision == "bfloat16"
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=lowered, cache_enabled=False
        )

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.splits["train"]
        return self._shaped(augmented(x[rows], self.config.augment)), y[rows]

    def _shaped(self, x: Tensor) -> Tensor:
        if self.config.network == "fc":
            return x.flatten(1)
        return x.contiguous(memory_format=torch.channels_last)


def _plain(config: Config) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(asdict(config)))


def _cosine_behind(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The same where no point is: between what arrives at a layer's output, and the true gradient.

    In two passes, which agree as the model is in evaluation mode.
    """

    def gradient() -> Tensor:
        seen: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(seen.append)

        hook = layer.register_forward_hook(watch)
        try:
            F.cross_entropy(model(x), y).backward()
        finally:
            hook.remove()
            model.zero_grad()
        return seen[0].flatten(1)

    received = gradient()
    with fastdfa.backprop(model):
        cosines = F.cosine_similarity(received, gradient())
    return {"mean": cosines.mean().item(), "std": cosines.std(correction=0).item()}


# All runs: claimed, resumed, written


def key(config: Config, seed: int) -> str:
    return f"{config.name}-seed{seed}"


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process has the run; the claim ends with the process, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write(path: Path, content: str | bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def finished(path: Path, config: Config) -> bool:
    """Whether this file is the record of this configuration, not of an earlier one of its name."""
    return path.exists() and json.loads(path.read_text())["config"] == _plain(config)


def resume(run: Run, path: Path) -> None:
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["config"] == _plain(run.config):
            run.load_state(state)


def train(config: Config, seed: int, data: Data, folder: Path, quick: bool, bar: Bar) -> None:
    """Trains a run to its end, with a checkpoint after every epoch, and writes its record."""
    run = Run(config, seed, data, quick)
    checkpoint = folder / f"{key(config, seed)}.pt"
    resume(run, checkpoint)
    bar.begin(config, seed, len(run.history))
    status = "complete"
    try:
        while len(run.history) < config.epochs:
            for steps in run.epoch():
                bar.step(steps)
            bar.epoch(run.history[-1])
            temporary = checkpoint.with_suffix(".new")
            torch.save(run.state(), temporary)
            os.replace(temporary, checkpoint)
    except Diverged:
        status = "diverged"
    write(folder / f"{key(config, seed)}.json", json.dumps(run.record(status)))
    checkpoint.unlink(missing_ok=True)


def collect(folder: Path, results: Path) -> None:
    """The finished runs in a folder, over those of the same name and seed in the results."""
    runs = json.loads(results.read_text())["runs"] if results.exists() else []
    found = {(run["name"], run["seed"]): run for run in runs}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["name"], run["seed"]] = run
    order = {name: place for place, name in enumerate(RUNS)}
    kept = [run for run in found.values() if run["name"] in order]
    kept.sort(key=lambda run: (order[run["name"]], run["seed"]))
    lines = ",\n".join(json.dumps(_rounded(run)) for run in kept)  # a line for each run
    write(results, f'{{"runs": [\n{lines}\n]}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value


# Progress


def cost(config: Config) -> float:
    """Of an epoch, relative to another: multiplications of a forward pass for an image."""
    if config.network == "cnn":
        return 75 * 1024 * 32 + 800 * 225 * 64 + 1600 * 49 * 64 + 576 * 128
    return 3072 * config.width + 2 * config.width**2


class Bar:
    """Progress over all runs of this process, with the time left; lines where no terminal is."""

    def __init__(self, runs: list[tuple[Config, int]]) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console, disable=not console.is_terminal, refresh_per_second=2,
            speed_estimate_period=600,
        )  # fmt: skip
        total = sum(cost(config) * config.epochs for config, _ in runs)
        self.all = self.progress.add_task("all", total=total, text="")
        self.start = time.monotonic()
        self.trained = 0.0  # cost of the epochs of this process
        self.left = total

    def skip(self, config: Config, epochs: int) -> None:
        """Epochs that are done, or left to another process."""
        self.left -= cost(config) * epochs
        self.progress.update(self.all, advance=cost(config) * epochs)

    def begin(self, config: Config, seed: int, done: int) -> None:
        self.config, self.seed, self.number = config, seed, done
        self.skip(config, done)
        self.progress.update(self.all, description=key(config, seed))

    def step(self, steps: int) -> None:
        self.progress.update(self.all, advance=cost(self.config) / steps)

    def epoch(self, scores: dict[str, float]) -> None:
        self.number += 1
        self.trained += cost(self.config)
        self.left -= cost(self.config)
        hours = (time.monotonic() - self.start) / self.trained * self.left / 3600
        text = f"epoch {self.number}/{self.config.epochs}  " + "  ".join(
            f"{name} {value:.1%}" for name, value in scores.items() if name in ("train", "test")
        )
        self.progress.update(self.all, text=text)
        if not console.is_terminal:
            line = f"{key(self.config, self.seed):34} {text}  {scores['seconds']:.1f} s"
            console.print(f"{line}  {hours:.1f} h left", highlight=False, soft_wrap=True)


# The cost beside the published way


def published_way(model: fastdfa.DFA, x: Tensor, y: Tensor) -> Any:
    """A step as the published code makes it: layers cut by detach, so that autograd makes the
    gradient of every layer's input, which nothing reads."""
    layers = [layer for layer in model.module if isinstance(layer, nn.Linear)]
    matrices = [model.feedback_matrix(name) for name in model.feedback_points]

    def step() -> None:
        model.zero_grad()
        h, outputs = x, []
        for layer in layers[:-1]:
            outputs.append(torch.tanh(F.linear(h, layer.weight, layer.bias)))
            h = outputs[-1].detach().requires_grad_()
        logits = F.linear(h, layers[-1].weight, layers[-1].bias)
        error = torch.softmax(logits.detach(), 1) - F.one_hot(y, len(logits[0]))
        feedback = error @ matrices[0]  # one for all, as all layers have one width
        for output in outputs:
            output.backward(feedback)
        F.cross_entropy(logits, y).backward()

    return step


def measure_cost(data: Data, rounds: int, out: Path) -> Path:
    """The step of the run `fc` with its optimizer, beside the published way and backprop."""
    config = RUNS["fc"]
    run = Run(config, 0, data, quick=False)
    x, y = run._batch(torch.arange(config.batch))
    run.model(x)  # so that the points have their names
    published = published_way(run.model, x, y)

    def ours() -> None:
        run.model.zero_grad()
        F.cross_entropy(run.model(x), y).backward()

    def backprop() -> None:
        with fastdfa.backprop(run.model):
            ours()

    def trained(step: Any) -> Any:
        def with_update() -> None:
            step()
            run.optimizer.step()

        return with_update

    check_same(run.model, ours, published)
    sides = {"published": published, "backprop": backprop, "fastdfa": ours}
    device = run.device.type
    times = interleaved({name: trained(step) for name, step in sides.items()}, rounds, 1.0, device)
    steps = len(data.train.y) // config.batch * config.epochs
    row = {
        "case": config.name,
        "to_published": {
            name: value._asdict() for name, value in ratios(times, "published").items()
        },
        "run_seconds": {name: steps * spread(values).median for name, values in times.items()},
        "steps": steps,
    }
    return save(result_name("paper-cost", device, quick=False), [row], out, device)


def check_same(model: nn.Module, ours: Any, published: Any) -> None:
    """Both ways must make the same gradients, or the ratio means nothing."""
    ours()
    expected = [p.grad.clone() for p in model.parameters()]
    published()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)


# The command


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    """Runs and seeds, the first seed of every run first."""
    patterns = args.only or ["*"]
    configs = [c for name, c in RUNS.items() if any(fnmatch(name, p) for p in patterns)]
    if not configs:
        raise SystemExit(f"paper.py: --only {' '.join(patterns)} matches none of {', '.join(RUNS)}")
    epochs = 1 if args.quick else args.epochs
    if epochs:
        configs = [replace(config, epochs=epochs) for config in configs]
    return [(config, seed) for seed in range(args.seeds) for config in configs]


def lacking(runs: list[tuple[Config, int]], results: Path) -> list[tuple[Config, int]]:
    """Those of which the results have no record of the same configuration."""
    records = json.loads(results.read_text())["runs"] if results.exists() else []
    known = [(run["name"], run["seed"], run["config"]) for run in records]
    return [(c, seed) for c, seed in runs if (c.name, seed, _plain(c)) not in known]


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
        from paper_report import draw

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
        raise SystemExit("paper.py: --data DIR is needed: where CIFAR-10 lies")
    try:
        if args.cost:
            data = read(args.data, False, args.device)
            console.print(measure_cost(data, args.rounds, args.out))
        else:
            train_all(args, runs)
    except DataError as error:
        print(f"paper.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paper.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
