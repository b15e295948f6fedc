"""The tables of docs/paper.md and its pictures, from the tracked results."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.harness.figures import markdown
from benchmarks.harness.results import RESULTS
from benchmarks.paper.table import BOTTLENECKS, PUBLISHED, RUNS, Config

NOT_YET = "not measured yet"
SEEDS = 3  # of a complete row

Runs = dict[str, list[dict[str, Any]]]  # by name, those of several seeds


def results(folder: Path = RESULTS) -> Runs:
    path, found = folder / "paper.json", defaultdict(list)
    if path.exists():
        for run in json.loads(path.read_text())["runs"]:
            found[run["name"]].append(run)
    return found


def table(name: str, found: Runs) -> str:
    """Writes the rows of one table of table.py."""
    head = ["run", "training, %", "test, %", "held out, %", "cosine, layers from the input"]
    rows = [
        [f"`{config.name}`{_marked(config, found[config.name])}", *_row(found[config.name])]
        for config in RUNS.values()
        if config.table == name
    ]
    return markdown.table(head, rows)


def _row(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return [NOT_YET, *["-"] * 3]
    accuracies = [_accuracy(runs, split) for split in ("train", "test", "held_out")]
    return [*accuracies, ", ".join(_cosines(runs).values()) or "-"]


def _marked(config: Config, runs: list[dict[str, Any]]) -> str:
    """Says what is less than the table asks for."""
    lacking = []
    if runs and len(runs) < SEEDS:
        lacking.append(f"{len(runs)} seed{'s' * (len(runs) > 1)}")
    lacking += sorted({
        f"{run['config']['epochs']} epochs"
        for run in runs if run["config"]["epochs"] != config.epochs
    })  # fmt: skip
    diverged = sum(run["status"] == "diverged" for run in runs)
    lacking += [f"{diverged} diverged"] * bool(diverged)
    return f" ({', '.join(lacking)})" if lacking else ""


def _accuracy(runs: list[dict[str, Any]], split: str) -> str:
    """Writes mean and, of several seeds, standard deviation over complete runs."""
    values = [
        100 * run["accuracy"][split]
        for run in runs
        if run["status"] == "complete" and split in run["accuracy"]
    ]
    return _spread(values, 1)


def _cosines(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Writes the cosines by the number of a layer."""
    values = defaultdict(list)
    for run in runs:
        for layer, cosine in (run["cosines"] or {}).items():
            values[layer].append(cosine["mean"])
    return {layer: _spread(of, 3) for layer, of in sorted(values.items())}


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def bottleneck(found: Runs) -> str:
    """Writes test accuracy and cosine of layer 2 over b, beside the published column."""
    head = ["b", "published: test", "ours, same cuts", "ours, all cuts"]
    head += ["published: cosine 2", "ours, same cuts", "ours, all cuts"]
    rows = []
    for b in BOTTLENECKS:
        names = (f"bottleneck-{b}-published", _all_cuts(b))
        published = PUBLISHED[names[0]]
        tests = [_accuracy(found[name], "test") if found[name] else NOT_YET for name in names]
        cosines = [_cosines(found[name]).get("2", "-") for name in names]
        rows.append(
            [str(b), f"{published['test']:.1f}", *tests, f"{published['cosines'][1]:.3f}", *cosines]
        )
    return markdown.table(head, rows)


def _all_cuts(b: int) -> str:
    return f"bottleneck-{b}" if b < max(BOTTLENECKS) else "fc"


def published_row(found: Runs) -> str:
    """Writes the published run whose training accuracy and three cosines are known."""
    name = "bottleneck-800-published"
    known = PUBLISHED[name]
    cosines = ", ".join(f"{cosine:.3f}" for cosine in known["cosines"])
    rows = [
        ["published", f"{known['train']:.1f}", f"{known['test']:.1f}", cosines],
        [f"`{name}`{_marked(RUNS[name], found[name])}", *_without_held_out(_row(found[name]))],
        *(
            [
                f"`{all_cuts}`{_marked(RUNS[all_cuts], found[all_cuts])}",
                *_without_held_out(_row(found[all_cuts])),
            ]
            for all_cuts in ("fc-float32", "fc")
        ),
    ]
    return markdown.table(["run", "training, %", "test, %", "cosine, layers 1, 2, 3"], rows)


def _without_held_out(row: list[str]) -> list[str]:
    return row[:2] + row[3:]


def cost(folder: Path = RESULTS) -> str:
    path = folder / "paper-cost.json"
    if not path.exists():
        return NOT_YET
    content = json.loads(path.read_text())
    (row,), machine = content["rows"], content["machine"]
    names = {"published": "the published way", "backprop": "backprop", "fastdfa": "fastdfa"}
    rows = [
        [label, f"{row['run_seconds'][name]:.0f}", f"{row['to_published'][name]['median']:.2f}"]
        for name, label in names.items()
    ]
    return (
        f"{row['steps']:,} steps of the run `fc` with their updates ({machine['processor']}, "
        f"{machine['threads']} threads, PyTorch {machine['torch']}, {machine['date']}; medians of "
        "interleaved rounds, times the number of steps):\n\n"
        + markdown.table(["a step", "seconds a run", "of the published way"], rows)
    )


def sections() -> dict[str, str]:
    """Returns the figures by the names of the markers in docs/paper.md."""
    found = results()
    names = dict.fromkeys(config.table for config in RUNS.values())
    tables = {f"paper {name}": table(name, found) for name in names if name != "bottleneck"}
    return {
        **tables,
        "paper bottleneck": bottleneck(found),
        "paper published row": published_row(found),
        "paper cost": cost(),
    }


# Pictures


def draw(folder: Path = RESULTS) -> None:
    """Draws what there are results for: the bottleneck, and the course of training."""
    found = results(folder)
    if all(found[f"bottleneck-{b}-published"] for b in BOTTLENECKS):
        _draw_bottleneck(found, folder / "paper-bottleneck.png")
    if found["fc"]:
        _draw_curves(found, folder / "paper-curves.png")


def _draw_bottleneck(found: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    published = {b: f"bottleneck-{b}-published" for b in BOTTLENECKS}
    corrected = {b: _all_cuts(b) for b in BOTTLENECKS}
    for names, label in ((published, "same cuts as published"), (corrected, "all cuts")):
        complete = [(b, found[name]) for b, name in names.items() if found[name]]
        for axes, values in (
            (left, [[100 * run["accuracy"]["test"] for run in runs] for _, runs in complete]),
            (right, [[run["cosines"]["2"]["mean"] for run in runs] for _, runs in complete]),
        ):
            spreads = [stdev(of) if len(of) > 1 else 0 for of in values]
            numbers = [b for b, _ in complete]
            axes.errorbar(numbers, list(map(mean, values)), spreads, marker=".", label=label)
    known = [PUBLISHED[f"bottleneck-{b}-published"] for b in BOTTLENECKS]
    left.plot(BOTTLENECKS, [each["test"] for each in known], "k--", label="published")
    right.plot(BOTTLENECKS, [each["cosines"][1] for each in known], "k--", label="published")
    for axes, title in ((left, "test accuracy, %"), (right, "cosine at layer 2")):
        axes.set(xscale="log", xlabel="b of 800 weights of layer 2 are trained")
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _draw_curves(found: Runs, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in ("fc", "fc-bp", "fc-top"):
        for run in found[name][:1]:
            course = {
                split: [100 * a for a in run["history"][split]] for split in ("test", "train")
            }
            epochs = range(1, len(course["test"]) + 1)
            (line,) = axes.plot(epochs, course["test"], label=f"{name}, test")
            colour = line.get_color()
            axes.plot(epochs, course["train"], ":", color=colour, label=f"{name}, training")
    axes.set(xlabel="epoch")
    axes.set_title("accuracy, %", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
