"""What networks reach by DFA and by every rule, and the time to an accuracy."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from benchmarks.harness.figures.markdown import measured, read, table, times, where
from examples.training import rules


def seconds_to(rows: list[dict[str, Any]], target: int) -> tuple[str, float | None]:
    """Writes the mean seconds and epochs of a side to a target, over the seeds; returns seconds
    too."""
    there = [(row["epochs"][n - 1]["seconds"], n) for row in rows if (n := row["reached"][target])]
    if len(there) < len(rows):
        return f"not in {len(rows) - len(there)} of {len(rows)} runs", None
    seconds, epochs = (mean(values) for values in zip(*there, strict=True))
    return f"{seconds:.1f} s ({epochs:.1f})", seconds


def accuracy() -> str:
    """Writes the seconds of training until a test accuracy, of every data set that was measured."""
    names = ["backprop", "backprop compiled", "PyTorch DFA loop", "fastdfa"]
    lines, runs = [], []
    for key, title in (("mnist", "MNIST"), ("cifar10", "CIFAR-10")):
        if not measured(f"accuracy-{key}"):
            continue
        results = read(f"accuracy-{key}")
        by_side = {n: [row for row in results["rows"] if row["side"] == n] for n in names}
        rates = " and ".join(f"{by_side[n][0]['lr']:g}" for n in ("fastdfa", "backprop"))
        seeds = len(by_side["fastdfa"])
        runs.append(
            f"{title} {results['network']}, {seeds} seed{'s' * (seeds > 1)}, at most "
            f"{results['epochs']} epochs, learning rates of DFA and backprop {rates}"
        )
        for index, target in enumerate(results["targets"]):
            cells = {name: seconds_to(by_side[name], index) for name in names}
            backprop, fast = cells["backprop"][1], cells["fastdfa"][1]
            ratio = times(backprop / fast) if backprop and fast else "-"
            lines.append([f"{title}, {target:.1%}", *[cells[n][0] for n in names], ratio])
    if not lines:
        return "Time to an accuracy: not measured yet."
    head = ["test accuracy", "backprop", "backprop, compiled", "PyTorch loop", "**fastdfa**"]
    return (
        "Seconds of training, in brackets epochs, until the test accuracy first reaches a target; "
        f"the mean over seeds ({'; '.join(runs)}; {where(results['machine'])}):\n\n"
        f"{table([*head, 'fastdfa against backprop'], lines)}"
    )


# Results, what to call them, the figure, published figures of DFA and of backprop.
TRAINED = [
    ("train-digits", "digits, MLP", "error", "-"),
    ("train-mnist", "MNIST, MLP", "error", "1.45 to 1.61% / 0.91 to 1.29%"),
    ("train-cnn", "CIFAR-10, CNN", "accuracy", "58.4, 62.4% / 75.2, 84.1%"),
    ("train-resnet20", "CIFAR-10, ResNet-20", "accuracy", "67.8% / 90.0%"),
    ("train-gcn", "Cora, GCN", "accuracy", "close to each other"),
    ("train-transformer", "Shakespeare, transformer", "loss", "-"),
    ("train-spiking-digits", "digits, spiking", "error", "-"),
    ("train-spiking", "MNIST, spiking", "error", "-"),
]
FIGURE: dict[str, Callable[[dict[str, Any]], float]] = {
    "error": lambda scores: 100 - 100 * scores["test_accuracy"],
    "accuracy": lambda scores: 100 * scores["test_accuracy"],
    "loss": lambda scores: scores["test_loss"],
}


def trained(runs: list[dict[str, Any]], method: str, figure: str) -> str:
    """Writes the figure of a method after its last epoch; of several seeds mean and deviation."""
    if method not in runs[0]["methods"]:
        return "-"
    values = [FIGURE[figure](run["methods"][method]) for run in runs]
    unit, digits = ("", 3) if figure == "loss" else ("%", 2 if figure == "error" else 1)
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}{unit}"


def cosines(alignment: list[float]) -> str:
    """Writes the cosine of each layer, or the mean of many."""
    if len(alignment) > 5:
        return f"mean {mean(alignment):.2f}"
    return ", ".join(f"{cosine:.2f}" for cosine in alignment)


def train() -> str:
    """Writes what every network of examples/training reaches, its cosines, the time of a step."""
    rows = []
    for name, network, figure, published in TRAINED:
        results = read(name)
        options, runs = results["options"], results.get("runs", [results.get("summary")])
        methods = runs[0]["methods"]
        epochs = f"{options['epochs']} epochs" + (f", {len(runs)} seeds" if len(runs) > 1 else "")
        rows.append(
            [
                f"{network}, {options['depth']}x{options['width']}, {epochs}: {figure}",
                *(trained(runs, method, figure) for method in ("dfa", "bp", "block", "top")),
                published,
                cosines(methods["dfa"]["alignment"]),
                times(mean(run["speed_against_backprop"] for run in runs)),
                f"{methods['dfa']['step_ms']:.1f}",
            ]
        )
    head = ["network: test figure", "**DFA**", "backprop", "top block alone", "head alone"]
    head += ["published, DFA / backprop", "cosine", "speed of a step", "ms, DFA"]
    return table(head, rows)


ANCHORED = {
    "anchored-mnist": "MNIST, MLP",
    "anchored-cifar10": "CIFAR-10, MLP with batch norm",
    "anchored-cnn": "CIFAR-10, CNN",
    "anchored-resnet20": "CIFAR-10, ResNet-20",
}


def seconds_of(history: list[dict[str, Any]], method: str, target: float) -> str:
    """Writes the seconds of training until a method first reaches a test accuracy."""
    seconds = 0.0
    for epoch in history[1:]:
        seconds += epoch[method]["train_seconds"]
        if epoch[method]["test_accuracy"] >= target:
            return f"{seconds:.0f} s"
    return "never"


def anchored() -> str:
    """Writes accuracy and speed of anchored feedback, beside backprop and plain DFA."""
    rows, places = [], []
    for name, label in ANCHORED.items():
        if not measured(name):
            continue
        results = read(name)
        options, methods = results["options"], results["summary"]["methods"]
        size = f"{options['depth']}x{options['width']}, {options['epochs']} epochs"
        accuracies = [f"{methods[m]['test_accuracy']:.1%}" for m in ("bp", "anchored", "dfa")]
        speeds = [times(methods[m]["speed"]) for m in ("anchored", "dfa")]
        found = [cosines(methods[m]["alignment"]) for m in ("anchored", "dfa")]
        target = 0.99 * methods["bp"]["test_accuracy"]
        seconds = [seconds_of(results["history"], m, target) for m in ("bp", "anchored")]
        rows.append([f"{label}, {size}", *accuracies, *speeds, " / ".join(seconds), *found])
        places.append(where(results["machine"]))
    if not rows:
        return "Anchored feedback: not measured yet."
    head = ["network", "backprop", "**anchored**", "plain DFA", "step, anchored", "step, DFA"]
    head += ["99% of backprop's, backprop / anchored", "cosines, anchored", "cosines, DFA"]
    return (
        "Test accuracy, one seed; speed of a step with the optimizer, backprop = 1; seconds of "
        "training until 99% of backprop's last accuracy is reached "
        f"({', '.join(dict.fromkeys(places))}):\n\n{table(head, rows)}"
    )


def family(name: str) -> str:
    """Writes every rule beside each other, by one network and one budget."""
    if not measured(name):
        return "Rules beside each other: not measured yet."
    results = read(name)
    options, methods = results["options"], results["summary"]["methods"]
    on_mnist = options["dataset"] == "mnist"  # what is published is of it
    rows = []
    for method, each in methods.items():
        rule = rules.RULES.get(method)
        label, source, published = {
            "bp": ("backprop", "-", "0.91% (BioTorch)"), "top": ("last layer alone", "-", "-"),
            "dfa": ("**DFA**", "1609.01596", "1.61% (BioTorch)"),
        }.get(method) or (rule.label, rule.source or "-", rule.published or "-")  # fmt: skip
        ratio = 1.0 if method == "dfa" else each.get("to_dfa")
        if method == "bp":
            ratio = results["summary"]["speed_against_backprop"]
        cosines = ", ".join(f"{cosine:.2f}" for cosine in each["alignment"] or []) or "-"
        accuracy = each["test_accuracy"]
        score = [f"{1 - accuracy:.2%}", published] if on_mnist else [f"{accuracy:.1%}"]
        rows.append(
            [label, source, *score, cosines, "-" if ratio is None else f"{ratio:.2f}",
             f"{each['peak_mib']:.1f}"]
        )  # fmt: skip
    score = ["test error", "published"] if on_mnist else ["test accuracy"]
    head = ["rule", "arXiv", *score, "cosine", "step, DFA = 1", "peak MiB"]
    layers = f"{options['depth']} hidden layers of {options['width']} {options['activation']}"
    network = f"MNIST, {layers}" if on_mnist else "CIFAR-10, the CNN above"
    return (
        f"{network}, {options['epochs']} epochs, one seed, the same recipe for all "
        f"({where(results['machine'])}):\n\n{table(head, rows)}"
    )
