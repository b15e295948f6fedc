"""What a training run shows: live progress, the table, the picture and the JSON."""

import json
import shlex
import sys
from functools import partial
from statistics import median

import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastdfa

from .measure import machine
from .rules import RULES

METHODS = {"dfa": "DFA", "bp": "backprop", "top": "top layer", "block": "top block"}
LABELS = METHODS | {name: rule.label for name, rule in RULES.items()}
COLOURS = {"dfa": "#0068b8", "bp": "#e07b00", "top": "#7a7a7a", "block": "#b0b0b0"}
COLOURS |= {
    name: to_hex(colormaps["turbo"](0.1 + 0.85 * i / len(RULES))) for i, name in enumerate(RULES)
}
TRUE = ("bp", "top", "block")  # methods whose gradients are true ones
MOST_COSINES = 8  # rows of the table; more layers are summed up in one


class LiveProgress:
    """Shows a bar for each method on a terminal; a line for each epoch where output goes to a
    file."""

    def __init__(self, console, run):
        self.console, self.epochs = console, run.config.epochs
        self.bars = Progress(
            TextColumn("{task.description:9}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=4,  # drawing costs training time
        )
        done = max(len(run.history) - 1, 0)
        self.tasks = {
            method: self.bars.add_task(
                LABELS[method], total=self.epochs * run.steps, text="", completed=done * run.steps
            )
            for method in run.config.methods
        }

    def __enter__(self):
        self.bars.start()
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def step(self, method):
        self.bars.advance(self.tasks[method])

    def epoch(self, method, epoch, record):
        text = f"epoch {epoch:3}/{self.epochs}  test {record['test_accuracy']:7.2%}"
        if epoch:
            text += f"  loss {record['train_loss']:.4f}  {record['step_ms']:.2f} ms/step"
        self.bars.update(self.tasks[method], text=text)
        if not self.console.is_terminal:
            self.console.print(f"{LABELS[method]:9} {text}", soft_wrap=True)


def architecture(config):
    if config.model == "mlp":
        normed = {"none": "", "batch": " behind batch norm"}[config.norm]
        return f"{config.depth} hidden layers of {config.width} {config.activation}{normed}"
    if config.model == "spiking":  # its activation is the spike
        return f"{config.depth} layers of {config.width} spiking neurons"
    return f"{config.model} {config.depth}x{config.width} {config.activation}"


def describe(config):
    """Says what the run is, in one line."""
    names = ("input_dropout", "dropout", "weight_decay", "feedback_scale")
    values = {name.replace("_", " "): getattr(config, name) for name in names}
    regular = [f"{name} {value:g}" for name, value in values.items() if value]
    return ", ".join(
        [
            f"{config.dataset}: {architecture(config)}",
            *regular,
            f"{config.optimizer} {config.lr:g} {config.schedule}",
            f"batch {config.batch}",
            f"seed {config.seed}",
            config.dtype,
            config.device,
        ]
    )


def summarise(run):
    """Returns the last epoch of each method, and medians of its step and of their ratio.

    The ratio is taken within each epoch, where both methods met the same machine.
    """
    methods = {}
    for method in run.config.methods:
        records = [epoch[method] for epoch in run.history]
        steps = [record["step_ms"] for record in records[1:]]
        kept = ("test_accuracy", "test_loss", "train_loss", "alignment")
        methods[method] = {key: records[-1].get(key) for key in kept}
        methods[method]["step_ms"] = median(steps) if steps else None
        methods[method]["train_seconds"] = sum(r["train_seconds"] for r in records[1:])
        if method in run.peaks:
            methods[method]["peak_mib"] = run.peaks[method]
        if method in RULES and "dfa" in run.config.methods:
            methods[method]["to_dfa"] = _median_ratio(run.history[1:], method, "dfa")
        if "bp" in run.config.methods:
            methods[method]["speed"] = _median_ratio(run.history[1:], "bp", method)
    return {
        "methods": methods,
        "speed_against_backprop": methods.get("dfa", {}).get("speed"),
    }


def _median_ratio(epochs, method, other):
    """Divides the steps of two methods, epoch by epoch; returns the median."""
    ratios = [epoch[method]["step_ms"] / epoch[other]["step_ms"] for epoch in epochs]
    return median(ratios) if ratios else None


def print_table(console, run):
    """Prints the figures of the last complete epoch."""
    summary = summarise(run)
    console.print(describe(run.config), highlight=False)
    table = rules_table(run, summary) if run.peaks else methods_table(run, summary)
    console.print(table, highlight=False)


def rules_table(run, summary):
    """Makes a row for each rule."""
    table = Table("rule", title=f"after epoch {run.history[-1]['epoch']} of {run.config.epochs}")
    for name in ("test accuracy", "cosines", "ms a step", "of DFA's", "peak MiB"):
        table.add_column(name, justify="right")
    for method, each in summary["methods"].items():
        cosines = ", ".join(f"{cosine:.2f}" for cosine in each["alignment"] or [])
        ratio = {"dfa": 1.0, "bp": summary["speed_against_backprop"]}.get(method)
        ratio = each.get("to_dfa", ratio)
        table.add_row(
            LABELS[method], f"{each['test_accuracy']:.2%}", cosines or "-",
            "-" if each["step_ms"] is None else f"{each['step_ms']:.2f}",
            "-" if ratio is None else f"{ratio:.2f}", f"{each['peak_mib']:.1f}",
        )  # fmt: skip
    return table


def methods_table(run, summary):
    """Makes a column for each method."""
    columns = summary["methods"]
    table = Table()
    table.add_column(f"after epoch {run.history[-1]['epoch']} of {run.config.epochs}")
    for method in columns:
        table.add_column(LABELS[method], justify="right")

    def row(name, pattern, key):
        values = [c[key] for c in columns.values()]
        table.add_row(name, *("-" if v is None else pattern.format(v) for v in values))

    row("test accuracy", "{:.2%}", "test_accuracy")
    row("test loss", "{:.4f}", "test_loss")
    row("training loss", "{:.4f}", "train_loss")
    row("time a step", "{:.3f} ms", "step_ms")
    if "bp" in columns and len(columns) > 1:
        speeds = [None if m in TRUE else each["speed"] for m, each in columns.items()]
        cells = ["-" if speed is None else f"{speed:.2f}x" for speed in speeds]
        table.add_row("speed against backprop", *cells)
    cosines = {m: dict(labelled_cosines(c.get("alignment") or [])) for m, c in columns.items()}
    for label in dict.fromkeys(label for each in cosines.values() for label in each):
        found = [f"{each[label]:.3f}" if label in each else "-" for each in cosines.values()]
        table.add_row(f"cosine, {label}", *found)
    table.caption = "cosine: of a weight's gradient to the true one"
    return table


def labelled_cosines(cosines):
    if len(cosines) > MOST_COSINES:
        return [(f"mean of {len(cosines)} weights", sum(cosines) / len(cosines))]
    return [(f"layer {i}", cosine) for i, cosine in enumerate(cosines, 1)]


def print_ending(console, run, status):
    """Says what ran in place of missing kernels, where the files are, how to go on after an early
    end."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    fallback = fastdfa.build_info()["fallback"].get(torch.device(run.config.device).type)
    if fallback:
        say(f"Plain PyTorch ran in place of the kernels: {fallback}")
    say(f"{run.folder}/: results.json, curves.png, checkpoint.pt")
    if status == "interrupted":
        command = [sys.orig_argv[0], "-m", f"{__package__}.train", "--resume", str(run.folder)]
        say(f"Interrupted; to go on: {shlex.join(command)}")
    if status == "diverged":
        say("The loss is no longer finite: the results end before that epoch. Try a smaller --lr.")


def save_json(path, run, status):
    options = {key: value for key, value in vars(run.config).items() if key != "data"}
    content = {
        "status": status,
        "options": options,  # without the path, which is nobody else's business
        "machine": machine() | {"device": device_name(run.config.device)},
        "build": fastdfa.build_info(),
        "summary": summarise(run),
        "history": run.history,
    }
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def device_name(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def save_picture(path, run):
    """Draws test error, training loss and, for DFA, the alignment of each layer, over epochs."""
    panels = 3 if "dfa" in run.config.methods else 2
    figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")  # no window, no backend
    figure.suptitle(describe(run.config), fontsize=10)
    axes = figure.subplots(1, panels)
    for method in run.config.methods:
        draw_curve(axes[0], run, method, lambda record: 100 * (1 - record["test_accuracy"]))
        draw_curve(axes[1], run, method, lambda record: record["train_loss"])
    finish(axes[0], "test error, %", "log")
    finish(axes[1], "training loss", "log")
    if panels == 3:
        draw_alignment(axes[2], run.history)
        finish(axes[2], "cosine of DFA to the true gradient")
    figure.savefig(path, dpi=150)


def draw_curve(axis, run, method, value):
    epochs = [epoch["epoch"] for epoch in run.history[1:]]
    values = [value(epoch[method]) for epoch in run.history[1:]]
    axis.plot(epochs, values, ".-", markersize=4, color=COLOURS[method], label=LABELS[method])


def draw_alignment(axis, history):
    layers = list(zip(*(epoch["dfa"]["alignment"] for epoch in history), strict=True))
    for i, cosines in enumerate(layers):
        colour = colormaps["viridis"](0.85 * i / max(len(layers) - 1, 1))
        named = len(layers) <= 8 or i in (0, len(layers) - 1)  # of many only the first and last
        axis.plot(
            cosines, ".-", markersize=4, color=colour, label=f"layer {i + 1}" if named else None
        )
    axis.axhline(0, color="0.6", linewidth=0.8)


def finish(axis, title, scale="linear"):
    axis.set(xlabel="epoch", yscale=scale)
    axis.set_title(title, loc="left", fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if scale == "log":  # plain figures, and some within a decade
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9")
    axis.legend(frameon=False, fontsize=9 if len(axis.lines) <= 6 else 6)
