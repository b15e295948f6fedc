"""Trains one network by direct feedback alignment and the same network by backprop, side by side:
by DFA with a B that is fitted to true gradients, and with a random one.

    python -m examples.training.train                               # digits, no download
    python -m examples.training.train --dataset mnist --data DIR    # also fashion-mnist, cifar10
    python -m examples.training.train --model cnn --data DIR        # resnet20, transformer, gcn
    python -m examples.training.train --model spiking               # digits, or any other images
    python -m examples.training.train --resume runs/mnist           # go on after Ctrl-C

All start from the same weights and see the same batches with the same dropout; they train in
turns, an epoch each, so that whatever else the machine does slows both. The backprop network is
made of plain torch.nn modules. `--methods dfa,bp` leaves the fitted B out; `--methods
dfa,bp,top,block` also trains, by backprop, the last layer alone, and the last block (or hidden
layer) with it, on top of what is frozen as it was initialised. `--rules all` trains by backprop,
the last layer alone, DFA and all of rules.py.
A run leaves in OUT/NAME:

    results.json    options, machine, versions, every epoch, summary
    curves.png      learning curves and alignment
    checkpoint.pt   after the last complete epoch: weights, optimizers, history

Exit status: 0 complete, 1 diverged, 2 bad options or data (one line says which), 130 Ctrl-C.
"""

import argparse
import dataclasses
import math
import os
import signal
import sys
import time
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console

import fastdfa
from fastdfa.activations import MODULES

from . import report, rules
from .data import DATASETS, IGNORED, IMAGES, DataError, load
from .measure import peak_memory, usable_device
from .models import MODELS, build, last_parts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
OPTIMIZERS = {  # fused: Adam on 1.9 M parameters takes 1.0 ms on one core instead of 9.8
    "sgd": lambda parameters, config: torch.optim.SGD(
        parameters,
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True,
    ),
    "adam": lambda parameters, config: torch.optim.Adam(
        parameters, config.lr, weight_decay=config.weight_decay, fused=True
    ),
    "adamw": lambda parameters, config: torch.optim.AdamW(
        parameters, config.lr, weight_decay=config.weight_decay, fused=True
    ),
}
TRAINED_PARTS = {"top": 1, "block": 2}  # the rest is frozen as it was initialised
PROBE_ROWS = 1000  # training samples on which the alignment is measured, at most
WARM_UP_STEPS = 3  # of each epoch, not counted: the other method has just used the caches

DEFAULTS = {
    "data": None,
    "activation": "tanh",
    "norm": "none",
    "optimizer": "adam",
    "lr": 1e-3,
    "schedule": "cosine",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "dropout": 0.0,
    "input_dropout": 0.0,
    "seed": 0,
    "methods": ["anchored", "dfa", "bp"],
    "rules": False,
    "feedback": "default",
    "feedback_scale": None,
    "device": "cpu",
    "dtype": "float32",
    "skip_checksum": False,
    "validate": False,
}
# Data sets that a model takes; the first is its default.
TAKES = {
    "mlp": IMAGES,
    "cnn": ("cifar10", "mnist", "fashion-mnist", "digits"),
    "resnet20": ("cifar10", "mnist", "fashion-mnist", "digits"),
    "transformer": ("shakespeare",),
    "gcn": ("cora",),
    "spiking": IMAGES,
}
# Chosen for DFA; backprop trains with the same. The figures given here are of data held out of the
# training set (--validate), never of the test set.
RECIPES = {
    # relu behind batch norm, as docs/paper.md found. DFA's accuracy on held-out data: CIFAR-10,
    # 3x800 without dropout, mirrored, after 10 epochs: relu 58.2% (backprop 61.3), tanh 53.0, tanh
    # without a norm 48.5; this recipe 57.4. MNIST, after 8: 98.63%, tanh without a norm 98.40.
    "mlp": {"width": 1024, "depth": 3, "epochs": 20, "batch": 128, "input_dropout": 0.2,
            "activation": "relu", "norm": "batch"},
    # Chosen on 3,000 images held out of the training set, after 4 epochs of 12,000 others. DFA's
    # accuracy there: three 5x5 convolutions of 32, 64, 64, tanh, lr 1e-3 51.9% (with one feedback
    # for all positions of a channel 42.7%); models.cnn 55.0% (lr 1e-3), with 96 and 128 channels
    # 57.2% (lr 2e-3), with 128 and 128 56.3% (lr 4e-3); of the last two layers alone 57.2%.
    "cnn": {"width": 96, "depth": 2, "epochs": 6, "batch": 128, "activation": "relu", "lr": 2e-3},
    # Hardly tuned: DFA's accuracy on 3,000 held-out images, after 3 epochs of 12,000 others, is
    # 34.7% with one feedback for a channel (loss 1.763), 35.0% with one for each position (1.792);
    # after 2 epochs with lr 1e-3 22.9 and 22.1%. Width 8, not 16, and three epochs are for the sake
    # of time: seven minutes on one core.
    "resnet20": {"width": 8, "depth": 9, "epochs": 3, "batch": 128, "activation": "relu",
                 "lr": 5e-3},
    # Chosen on the last tenth of the training text, after one epoch: see models.Transformer; DFA's
    # loss at 1e-2 2.35, 2e-2 2.52 (both with torch's embedding). Four epochs: six minutes.
    "transformer": {"width": 64, "depth": 4, "epochs": 4, "batch": 32, "activation": "gelu",
                    "lr": 1e-2},
    # Kipf and Welling's but for three things, chosen on the 500 validation nodes (seeds 0-2, DFA
    # 80.1%, backprop 78.9). A larger B: the loss is a mean, so by the default its feedback is
    # smaller than the weight decay (75.9%, without decay 78.1; scale 0.3 79.2, 3 79.6). relu: tanh
    # 79.5. No dropout of the input: with it backprop reached 78.7, in five times the time.
    "gcn": {"width": 64, "depth": 2, "epochs": 200, "batch": 1, "lr": 1e-2, "weight_decay": 5e-4,
            "dropout": 0.5, "activation": "relu", "feedback_scale": 1.0},
    # DFA's accuracy on 6,000 held-out images of MNIST, after 4 epochs: lr 5e-4 97.3%, 1e-3 97.6%,
    # 2e-3 97.8%; nothing else was tried. Six epochs are for the sake of time.
    "spiking": {"width": 512, "depth": 2, "epochs": 6, "batch": 128, "lr": 2e-3},
}  # fmt: skip
# Of one data set, over the model's.
DATASET_RECIPES = {
    # At 100% of the held-out images either way; without a norm steps are faster.
    ("mlp", "digits"): {"width": 512, "epochs": 30, "batch": 64, "activation": "tanh",
                        "norm": "none"},
    # Chosen on 10,000 images held out of the training set, never on the test set: DFA's error on
    # them, with tanh and no norm, at width 800 without dropout 1.97% (9 epochs), of the input 0.2
    # 1.68% (15), 0.3 1.51% (20); dropout between the layers did not help. The recipe trains on all.
    ("mlp", "mnist"): {"depth": 2, "input_dropout": 0.3},
    ("mlp", "fashion-mnist"): {"depth": 2, "input_dropout": 0.3},
    ("spiking", "digits"): {"epochs": 30, "batch": 64},
}  # fmt: skip


class UsageError(Exception):
    """Says that what was asked cannot be done, in one line."""


class Stopped(Exception):
    """Ends training before its last epoch: "interrupted" or "diverged"."""


# Options


class Parser(argparse.ArgumentParser):
    """Parses arguments, with errors of one line."""

    def error(self, message):
        raise UsageError(message)


def number(kind, low, high=math.inf, open_low=False):
    """Makes a parser for a number from low (itself excluded if `open_low`) to below high."""

    def parse(text):
        value = kind(text)
        if not low <= value < high or (open_low and value == low):
            above = "above" if open_low else "at least"
            raise argparse.ArgumentTypeError(f"must be {above} {low} and below {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's word for text that is no number
    return parse


def methods(text):
    chosen = text.split(",")
    if unknown := [m for m in chosen if m not in report.LABELS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(report.LABELS)}")
    return list(dict.fromkeys(chosen))


def parser():
    """Makes the parser. Every option defaults to None: not given, so the recipe of the data set
    decides."""
    p = Parser(
        prog="train.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    positive, rate = number(int, 1), number(float, 0, 1)
    p.add_argument("--model", choices=MODELS, help="default: mlp")
    p.add_argument("--dataset", choices=DATASETS, help="default: the model's, of mlp: digits")
    p.add_argument("--data", metavar="DIR", help="where the files of the data set lie")
    p.add_argument(
        "--skip-checksum",
        action="store_const",
        const=True,
        help="take other data of the same format",
    )
    p.add_argument(
        "--validate",
        action="store_const",
        const=True,
        help="to choose a recipe: score on data held out of the training set, not on the test set",
    )
    p.add_argument("--width", type=positive, help="units or channels of a hidden layer")
    p.add_argument("--depth", type=positive, help="hidden layers, convolutions or blocks")
    p.add_argument("--activation", choices=MODULES, metavar="NAME", help="of hidden layers")
    p.add_argument("--norm", choices=["none", "batch"], help="before each activation of an mlp")
    p.add_argument("--dropout", type=rate, help="after each hidden layer")
    p.add_argument("--input-dropout", type=rate, help="of the input")
    p.add_argument("--feedback", choices=["default", *fastdfa.PRESETS], help="rule of DFA")
    p.add_argument(
        "--feedback-scale",
        type=number(float, 0, open_low=True),
        help="standard deviation of B, over that of the rule",
    )
    p.add_argument("--optimizer", choices=OPTIMIZERS, help="default: adam")
    p.add_argument("--lr", type=number(float, 0, open_low=True), help="at the start")
    p.add_argument("--schedule", choices=["cosine", "constant"], help="of lr; default: cosine")
    p.add_argument("--momentum", type=rate, help="of sgd; default: 0.9")
    p.add_argument("--weight-decay", type=number(float, 0), help="default: 0")
    p.add_argument("--epochs", type=positive)
    p.add_argument("--batch", type=positive, help="samples of a step")
    p.add_argument("--seed", type=number(int, 0, 2**31), help="default: 0")
    p.add_argument(
        "--methods",
        type=methods,
        metavar="dfa,bp",
        help="default: anchored,dfa,bp; also top, block",
    )
    p.add_argument("--rules", metavar="all", help="beside dfa, bp: of " + ", ".join(rules.RULES))
    p.add_argument("--device", type=usable_device, help="cpu, cuda, cuda:1, ...; default: cpu")
    p.add_argument("--dtype", choices=DTYPES, help="bfloat16: by autocast; default: float32")
    p.add_argument("--threads", type=positive, help="default: torch's own choice")
    p.add_argument("--out", metavar="DIR", help="default: runs")
    p.add_argument("--name", help="folder in OUT; default: the data set, numbered if it exists")
    p.add_argument("--resume", metavar="RUN", help="go on with this folder, with its options")
    return p


def options(argv):
    """Returns the options of a run, its folder, and its checkpoint if it is resumed (else None).

    Options are those given, over the recipe of the data set, over the defaults. A resumed run has
    its own and no others: with another it would be another run.
    """
    given = {k: v for k, v in vars(parser().parse_args(argv)).items() if v is not None}
    if folder := given.pop("resume", None):
        if given:
            raise UsageError("--resume takes every option from the run, so it must stand alone")
        checkpoint = read_checkpoint(Path(folder))
        return argparse.Namespace(**checkpoint["options"]), Path(folder), checkpoint
    given |= by_rules(given)
    model = given.setdefault("model", "mlp")
    dataset = given.setdefault("dataset", TAKES[model][0])
    if dataset not in TAKES[model]:
        raise UsageError(f"--model {model} takes {' or '.join(TAKES[model])}, got {dataset}")
    if "norm" in given and model != "mlp":
        raise UsageError(f"--norm is for --model mlp, got --model {model}")
    given.setdefault("threads", torch.get_num_threads())
    name = dataset if model == "mlp" else f"{model}-{dataset}"
    folder = new_folder(Path(given.pop("out", "runs")), given.pop("name", None), name)
    recipe = RECIPES[model] | DATASET_RECIPES.get((model, dataset), {})
    config = argparse.Namespace(**{**DEFAULTS, **recipe, **given})
    if config.data is not None:
        config.data = str(Path(config.data).resolve())  # to be resumed from any directory
    return config, folder, None


def by_rules(given):
    """Returns the methods for `--rules`, which it takes from what is given."""
    names = given.pop("rules", None)
    if names is None:
        return {}
    if "methods" in given or given.get("model", "mlp") not in ("mlp", "cnn"):
        raise UsageError("--rules goes with --model mlp or cnn, and without --methods")
    try:
        return {"methods": ["bp", "top", "dfa", *rules.chosen(names)], "rules": True}
    except ValueError as error:
        raise UsageError(f"argument --rules: {error}") from None


def new_folder(out, name, default):
    """Names OUT/NAME, which must be new; without --name the first free one of digits, digits-2,
    ..."""
    if name is None:
        names = chain([default], (f"{default}-{i}" for i in count(2)))
        return next(out / name for name in names if not (out / name).exists())
    if (out / name).exists():
        raise UsageError(f"{out / name} exists: choose another --name, or --resume it")
    return out / name


# One method's network


def network(method, config, data):
    """Builds the same architecture and initial weights for every method."""
    model = build(config, data, dfa=method == "dfa" or method in rules.RULES)
    if method == "dfa":
        return fastdfa.DFA(model, feedback=feedback_rule(config))
    if method in TRAINED_PARTS:
        model.requires_grad_(False)
        last_parts(model, TRAINED_PARTS[method]).requires_grad_(True)
    return model


def feedback_rule(config):
    rule = fastdfa.Feedback() if config.feedback == "default" else fastdfa.PRESETS[config.feedback]
    scale = config.feedback_scale or rule.scale
    return dataclasses.replace(rule, scale=scale, seed=config.seed)


class Learner:
    """Trains one method: has its network, its optimizer, an epoch of training, an evaluation."""

    def __init__(self, method, config, data):
        dtype = DTYPES[config.dtype]
        self.config, self.data, self.method = config, data, method
        self.model = network(method, config, data)
        self.model.to(
            config.device, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        )
        self.rule, trained = None, list(self.model.parameters())
        if method in rules.RULES:
            batch = data.train_x[: config.batch]
            self.rule = rules.Learning(
                rules.RULES[method], self.model, feedback_rule(config), batch
            )
            self.model, trained = self.rule.model, self.rule.trained()
        trained = [p for p in trained if p.requires_grad]
        self.optimizer = OPTIMIZERS[config.optimizer](trained, config)
        self.autocast = torch.autocast(
            torch.device(config.device).type, dtype, enabled=dtype == torch.bfloat16
        )

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def loss(self, x, y):
        with self.autocast:
            return cross_entropy(self.model(x), y)

    def step(self, x, y):
        self.optimizer.zero_grad()
        loss = self.gradients(x, y)
        if self.rule:
            self.rule.update(x)
        self.optimizer.step()
        return loss

    def gradients(self, x, y):
        """Makes the gradients of the weights; returns the loss."""
        if self.rule:
            self.rule.give(y)
        loss = self.loss(x, y)
        loss.backward()
        return loss.detach()

    def peak_memory(self):
        """Measures the MiB that a forward and a backward pass take at their peak, with the
        gradients."""
        x, y = (part[: self.config.batch] for part in (self.data.train_x, self.data.train_y))

        def step():
            self.model.zero_grad()
            self.gradients(x, y)

        peak = peak_memory(step, torch.device(self.config.device).type) / 2**20
        self.model.zero_grad()
        return peak

    def train_epoch(self, epoch, before_step):
        """One pass over the training set; `before_step(method)` may end it by an exception.

        All its randomness, batches and dropout, comes from (seed, epoch): the methods share it,
        and a resumed run needs no generator's state.
        """
        torch.manual_seed(self.config.seed * 10_007 + epoch)
        self.model.train()
        batches = (
            torch.randperm(len(self.data.train_y)).to(self.config.device).split(self.config.batch)
        )
        losses, seconds = [], []
        for i, rows in enumerate(batches):
            before_step(self.method)
            self.set_lr((epoch - 1 + i / len(batches)) / self.config.epochs)
            x, y = self.data.train_x[rows], self.data.train_y[rows]
            start = self.clock()
            losses.append(self.step(x, y))
            seconds.append(self.clock() - start)
        return {
            "train_loss": torch.stack(losses).double().mean().item(),
            "step_ms": 1e3 * median(seconds[WARM_UP_STEPS:] or seconds),
            "train_seconds": sum(seconds),
        }

    def set_lr(self, progress):
        """Sets the learning rate after this fraction of the run."""
        factor = (1 + math.cos(math.pi * progress)) / 2 if self.config.schedule == "cosine" else 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor

    def clock(self):
        if self.config.device.startswith("cuda"):
            torch.cuda.synchronize(self.config.device)
        return time.perf_counter()

    def evaluate(self):
        """Measures test accuracy and loss; for DFA also its alignment with the true gradient."""
        self.model.eval()
        with torch.no_grad(), self.autocast:
            logits = torch.cat([self.model(x) for x in self.data.test_x.split(500)]).float()
        y = self.data.test_y
        scores = {
            "test_accuracy": (logits.argmax(-1) == y)[y != IGNORED].double().mean().item(),
            "test_loss": cross_entropy(logits, y).item(),
        }
        fed = isinstance(self.model, (fastdfa.DFA, fastdfa.LayerFeedback))
        if fed and math.isfinite(scores["test_loss"]):  # else it has none
            scores["alignment"] = self.alignment()
        return scores

    def alignment(self):
        """Measures the cosine between DFA's and the true gradient of each hidden layer's weight."""
        probe = min(PROBE_ROWS, 8 * self.config.batch)
        x, y = self.data.train_x[:probe], self.data.train_y[:probe]
        if self.rule:
            self.rule.give(y)
        with self.autocast:
            cosines = fastdfa.alignment(self.model, cross_entropy, x, y, weights=True).weights
        weights = [name for name, p in self.model.module.named_parameters() if p.ndim >= 2][:-1]
        return [cosines[name] for name in weights]


def cross_entropy(logits, y):
    """Returns the mean over the labels that count; logits [*rows, classes], y [*rows]."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORED)


# A run of all methods


class CtrlC:
    """Inside it Ctrl-C asks for a stop at the next step; pressed again, it stops at once."""

    asked = False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.previous)


class Run:
    """Holds the learners of a run, their history, and the files they leave."""

    def __init__(self, config, folder, checkpoint=None):
        torch.set_num_threads(config.threads)
        data = load(config.dataset, config.data, not config.skip_checksum, config.validate)
        data = on_device(data, config)
        self.config, self.folder, self.history = config, folder, []
        try:
            self.learners = {method: Learner(method, config, data) for method in config.methods}
        except RuntimeError as error:  # most likely out of memory
            raise UsageError(f"cannot make this network: {str(error).splitlines()[0]}") from None
        self.steps = math.ceil(len(data.train_y) / config.batch)
        self.peaks = {}  # by method; measured where many rules are compared
        if config.rules:
            self.peaks = {name: each.peak_memory() for name, each in self.learners.items()}
        if checkpoint:
            self.history = checkpoint["history"]
            for method, state in checkpoint["learners"].items():
                self.learners[method].load_state(state)

    def train(self, console, ctrl_c):
        """Train to the last epoch. Returns "complete", "interrupted" or "diverged"."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with report.LiveProgress(console, self) as progress:
            try:
                for epoch in range(len(self.history), self.config.epochs + 1):
                    self.history.append(self.train_epoch(epoch, ctrl_c, progress))
                    self.save_checkpoint()
            except Stopped as stopped:
                return str(stopped)
        return "complete"

    def train_epoch(self, epoch, ctrl_c, progress):
        """An epoch of each method in turn, the first one changing; epoch 0 only evaluates."""
        record = {"epoch": epoch}
        for method in self.config.methods[:: 1 if epoch % 2 else -1]:
            learner, scores = self.learners[method], {}
            if epoch:
                scores = learner.train_epoch(epoch, partial(self.before_step, ctrl_c, progress))
            record[method] = scores | learner.evaluate()
            if epoch and not math.isfinite(scores["train_loss"] + record[method]["test_loss"]):
                raise Stopped("diverged")
            progress.epoch(method, epoch, record[method])
        return record

    @staticmethod
    def before_step(ctrl_c, progress, method):
        if ctrl_c.asked:
            raise Stopped("interrupted")
        progress.step(method)

    def save_checkpoint(self):
        learners = {method: learner.state() for method, learner in self.learners.items()}
        content = {
            "options": vars(self.config),
            "history": self.history,
            "learners": learners,
        }
        write(self.folder / "checkpoint.pt", lambda path: torch.save(content, path))

    def save_report(self, status):
        write(self.folder / "results.json", lambda path: report.save_json(path, self, status))
        write(self.folder / "curves.png", lambda path: report.save_picture(path, self))


def on_device(data, config):
    """Moves the whole data set to the device, in float64 where the network is."""
    x = {name: getattr(data, name).to(config.device) for name in ("train_x", "test_x")}
    if config.dtype == "float64" and data.train_x.is_floating_point():
        x = {name: images.double() for name, images in x.items()}
    y = {name: getattr(data, name).to(config.device) for name in ("train_y", "test_y")}
    return dataclasses.replace(data, **x, **y)


def write(path, save):
    """Writes a file beside its place, then renames it: it is never there in part."""
    temporary = path.with_name(f".{path.name}")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(folder):
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise UsageError(f"--resume {folder}: no checkpoint.pt in it")
    try:
        checkpoint = torch.load(path, weights_only=True)
        return {key: checkpoint[key] for key in ("options", "history", "learners")}
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: not a checkpoint of this program ({reason})") from None


def main(argv=None):
    """Returns the exit status."""
    console = Console()
    try:
        run = Run(*options(argv))
        with CtrlC() as ctrl_c:
            status = run.train(console, ctrl_c)
            run.save_report(status)
    except (UsageError, DataError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: stopped", file=sys.stderr)
        return 130
    report.print_table(console, run)
    report.print_ending(console, run, status)
    return {"complete": 0, "diverged": 1, "interrupted": 130}[status]


if __name__ == "__main__":
    sys.exit(main())
