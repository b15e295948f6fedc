"""Writes the figures of README.md and docs/ from the tracked results, between their markers.

python benchmarks/readme.py [--check]    --check: change nothing, exit 1 if they differ
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import paper_report
import rules

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["README.md", "docs/performance.md", "docs/paper.md"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times(value: float) -> str:
    return f"{value:.2f}x"


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def threads(machine: dict[str, Any]) -> str:
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def where(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {threads(machine)}, {machine['cpu_capability']}, "
        f"PyTorch {machine['torch']}, {machine['date']}"
    )


def speed_of(ratio: dict[str, float] | None) -> str:
    """Of a time relative to backprop's; a dash where it was not measured."""
    return "-" if ratio is None else times(1 / ratio["median"])


def step() -> str:
    """Speed of a step over sizes, and the peak memory of one."""
    results = read("step")
    names = ["backprop compiled", "PyTorch DFA loop", "BioTorch", "limit", "fastdfa, torch.mm"]
    names += ["fastdfa", "fastdfa, direct"]
    rows = []
    for row in results["rows"]:
        if row["dtype"] != "float32":
            continue
        speed = [speed_of(row["to_backprop"].get(name)) for name in names]
        of_limit = f"{1 / row['to_limit']['fastdfa, torch.mm']['median']:.2f}"
        memory = f"{row['peak_mib']['fastdfa']:.0f} / {row['peak_mib']['backprop']:.0f}"
        rows.append([row["case"], *speed, of_limit, memory])
    head = ["hidden layers x width / batch", "backprop, compiled", "PyTorch loop", "BioTorch"]
    head += ["limit", "fastdfa, `torch.mm`", "**fastdfa**", "direct", "`torch.mm`, of limit"]
    head += ["peak MiB, fastdfa / backprop"]
    big = results["memory"][0]
    return (
        "Speed of a training step, eager backprop = 1 (784 inputs, 10 classes, tanh, float32; "
        f"medians of interleaved rounds; {where(results['machine'])}):\n\n"
        f"{table(head, rows)}\n\n"
        f"Peak memory of a step at {big['case']}: fastdfa {big['peak_mib']['fastdfa']:.0f} MiB, "
        f"backprop {big['peak_mib']['backprop']:.0f}, "
        f"the loop {big['peak_mib']['PyTorch DFA loop']:.0f}."
    )


def dtypes() -> str:
    """Speed of a step in other dtypes than float32, each relative to backprop in its own."""
    names = ["backprop compiled", "PyTorch DFA loop", "BioTorch", "limit", "fastdfa"]
    rows = [
        [row["case"], *[speed_of(row["to_backprop"].get(name)) for name in names]]
        for row in read("step")["rows"]
        if row["dtype"] != "float32"
    ]
    if not rows:
        return "Steps in other dtypes: not measured yet."
    head = ["hidden layers x width / batch", "backprop, compiled", "PyTorch loop", "BioTorch"]
    return (
        "In other dtypes, eager backprop in the same one = 1 (*autocast*: float32 weights, as one "
        f"trains in bfloat16):\n\n{table([*head, 'limit', '**fastdfa**'], rows)}"
    )


def growth() -> str:
    """Speed over what grows, and where backprop is faster."""
    if not measured("growth"):
        return "How the cost grows: not measured yet."
    results = read("growth")
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        sweeps.setdefault(row["sweep"], []).append(row)
    rows = []
    for sweep, points in sweeps.items():
        speed = {f"{row[sweep]:,}": 1 / row["to_backprop"]["fastdfa"]["median"] for row in points}
        loses = [value for value, times_as_fast in speed.items() if times_as_fast < 1]
        listed = ", ".join(f"{value}: {times(x)}" for value, x in speed.items())
        rows.append([sweep, listed, "; ".join(loses) or "nowhere"])
    text = table(["what grows", "speed of fastdfa", "backprop is faster at"], rows)
    return (
        "Speed of a training step, eager backprop = 1 (784 inputs, tanh, float32; medians of "
        f"interleaved rounds; {where(results['machine'])}):\n\n{text}"
    )


def seconds_to(rows: list[dict[str, Any]], target: int) -> tuple[str, float | None]:
    """Of one side: mean seconds and epochs to a target over the seeds; the seconds as a number."""
    there = [(row["epochs"][n - 1]["seconds"], n) for row in rows if (n := row["reached"][target])]
    if len(there) < len(rows):
        return f"not in {len(rows) - len(there)} of {len(rows)} runs", None
    seconds, epochs = (mean(values) for values in zip(*there, strict=True))
    return f"{seconds:.1f} s ({epochs:.1f})", seconds


def accuracy() -> str:
    """Seconds of training until a test accuracy, of every data set that was measured."""
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


def kernels() -> str:
    """Speed of project_gate beside eager and compiled PyTorch."""
    results = read("kernels")
    rows = []
    for row in results["rows"]:
        speed = {name: times(1 / value["median"]) for name, value in row["to_eager"].items()}
        names = ["eager, e B once", "compiled, e B once", "fastdfa", "fastdfa, B generated"]
        rows.append([row["case"], *[speed[name] for name in names]])
    head = ["layers x width, rows M, classes C", "eager, `e B` once", "compiled, `e B` once"]
    head += ["**project_gate**", "B generated in the kernel"]
    return (
        "The kernel alone. Eager PyTorch with a product `e B` for each layer = 1; where the layers "
        f"share B and have one width, one product serves all:\n\n{table(head, rows)}"
    )


def products() -> str:
    """Rates of matrix products on one core, by library."""
    results = read("one-core")
    parts = ["forward", "with bias and tanh", "weight gradient"]
    columns = [f"{part}, {name}" for part in parts for name in ("fastdfa", "torch.mm", "oneDNN")]
    rows = [
        [row["case"], *[median(row["gflops"], name, "{:.0f}".format) for name in columns]]
        for row in results["rows"]
    ]
    others = ["`torch.mm`", "oneDNN"]
    head = ["M x N x K", "forward, **own**", *others, "bias and tanh, **own**", *others]
    head += ["weight gradient, **own**", *others]
    return f"GFLOP/s ({where(results['machine'])}):\n\n{table(head, rows)}"


# Sides of one_core.py, and what to call them.
OVERHEAD = {
    "backprop": "backprop",
    "PyTorch DFA loop": "DFA written by hand, without autograd",
    "layers one by one": "fastdfa, layers one by one (no chain)",
    "fastdfa": "**fastdfa**",
    "fastdfa, direct": "with `direct_gradients=True`",
    "the ops of the hidden layers alone": "its three ops for the hidden layers alone",
}


def overhead() -> str:
    """Time of a step in which there is nothing to compute."""
    results = read("one-core")
    columns = [
        (case, key) for case in results["overhead"] for key in ("milliseconds", "to_backprop")
    ]
    rows = [
        [label, *(median(case[key], name, "{:.2f}".format) for case, key in columns)]
        for name, label in OVERHEAD.items()
    ]
    head = [
        f"{case['case']}, ms" if key == "milliseconds" else "of backprop's" for case, key in columns
    ]
    return f"({where(results['machine'])}):\n\n{table(['a step', *head], rows)}"


# Sides of low_precision.py, and what to call them.
INT8 = {
    "ops, bfloat16": "the ops, bfloat16",
    "int8": "**int8**",
    "int8, product alone": "int8, roundings free",
}


def int8_steps() -> str:
    """Speed of a step with int8 weight gradients, beside bfloat16 by the same ops."""
    results = read("low-precision-steps")
    names = ["backprop, bfloat16", "fastdfa, bfloat16", *INT8]
    rows = []
    for row in results["rows"]:
        ratios = row["to_float32"]
        narrow = ratios["ops, bfloat16"]["median"]
        gains = [times(narrow / ratios[name]["median"]) for name in list(INT8)[1:]]
        rows.append([row["case"], *[median(ratios, name, inverse) for name in names], *gains])
    head = ["hidden layers x width / batch", "backprop, bfloat16", "fastdfa, bfloat16"]
    head += [*INT8.values(), "**int8 over bfloat16**", "roundings free"]
    return (
        "Speed of a training step, fastdfa in float32 = 1; in the last two columns the ops in "
        f"bfloat16 = 1 (784 inputs, 10 classes; {where(results['machine'])}):\n\n"
        f"{table(head, rows)}"
    )


def float16_steps() -> str:
    """Milliseconds and peak memory of a step under float16 autocast."""
    results = read("low-precision-float16")
    names = ["backprop, float32", "fastdfa, float32", "backprop, float16"]
    names += ["fastdfa, float16 by torch", "fastdfa, float16"]
    rows = [
        [
            row["case"],
            *[median(row["milliseconds"], name, "{:.1f}".format) for name in names],
            *[f"{row['peak_mib'][name]:.1f}" for name in names[3:]],
        ]
        for row in results["rows"]
    ]
    head = ["hidden layers x width / batch", "backprop, float32, ms", "fastdfa, float32"]
    head += ["backprop, float16", "fastdfa, torch's float16", "**fastdfa, float16**"]
    head += ["peak MiB, torch's float16", "**fastdfa**"]
    return f"({where(results['machine'])}):\n\n{table(head, rows)}"


def int8_accuracy() -> str:
    """Test errors of networks trained with int8 weight gradients."""
    rows = [
        [
            f"{row['dataset']}, {'-'.join(map(str, row['widths']))}, {row['epochs']} epochs",
            row["scheme"],
            ", ".join(f"{error:.2f}%" for error in row["errors"]),
            f"{row['difference']:.1%}",
        ]
        for row in read("low-precision-accuracy")["rows"]
    ]
    head = ["network", "weight gradients", "test error of each seed", "gradients off by"]
    return table(head, rows)


def recipe() -> str:
    """Speed of a step where norms and activations are modules of their own."""
    results = read("recipe")
    names = ["backprop compiled", "layers one by one", "fastdfa"]
    rows = [
        [row["case"], *[median(row["to_backprop"], name, inverse) for name in names]]
        for row in results["rows"]
    ]
    head = ["hidden layers x width / batch", "backprop, compiled", "every module called"]
    return (
        f"Eager backprop = 1 ({where(results['machine'])}):\n\n"
        f"{table([*head, '**fastdfa**'], rows)}"
    )


def kinds_table(results: dict[str, Any]) -> str:
    """Speed of a step of every kind of network beside its bound."""
    names = ["limit", "backprop compiled", "fastdfa compiled", "fastdfa, torch.mm", "fastdfa"]
    rows = []
    for row in results["rows"]:
        speed = [median(row["to_backprop"], name, inverse) for name in names]
        of_bound = 1 / row["to_backprop"]["fastdfa"]["median"] / row["bound"]
        memory = f"{row['peak_mib']['fastdfa']:.1f} / {row['peak_mib']['backprop']:.1f}"
        rows.append([row["case"], times(row["bound"]), *speed, f"{of_bound:.2f}", memory])
    head = ["network / batch", "bound", "limit", "backprop, compiled", "fastdfa, compiled"]
    head += ["fastdfa, `torch.mm`", "**fastdfa**", "of the bound"]
    return table([*head, "peak MiB, fastdfa / backprop"], rows)


def kinds() -> str:
    results = read("kinds")
    return (
        "Speed of a training step, eager backprop = 1 (float32; medians of interleaved rounds; "
        f"{where(results['machine'])}):\n\n{kinds_table(results)}"
    )


def kinds_cuda() -> str:
    if not measured("kinds-cuda"):
        return "Kinds of network: not measured on a GPU yet."
    results = read("kinds-cuda")
    machine = results["machine"]
    return (
        "Training steps of every kind of network on a GPU, eager backprop = 1 (float32, "
        f"convolutions in tf32 on both sides; {machine['gpu']}, CUDA {machine['cuda']}, PyTorch "
        f"{machine['torch']}, {machine['date']}):\n\n{kinds_table(results)}"
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
    """The figure of a method after its last epoch; of several seeds the mean and deviation."""
    if method not in runs[0]["methods"]:
        return "-"
    values = [FIGURE[figure](run["methods"][method]) for run in runs]
    unit, digits = ("", 3) if figure == "loss" else ("%", 2 if figure == "error" else 1)
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}{unit}"


def cosines(alignment: list[float]) -> str:
    """Layer by layer, or the mean of many."""
    if len(alignment) > 5:
        return f"mean {mean(alignment):.2f}"
    return ", ".join(f"{cosine:.2f}" for cosine in alignment)


def train() -> str:
    """What every network of train.py reaches, with the cosines, and the time of a step."""
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


def where_gpu(results: dict[str, Any]) -> str:
    machine, rates = results["machine"], results["rates"]
    return (
        f"{machine['gpu']}, CUDA {machine['cuda']}, PyTorch {machine['torch']}, {machine['date']}; "
        f"a copy moves {rates['copy_gb_per_s'] / 1000:.2f} TB/s there, a bf16 product of torch "
        f"reaches {rates['product_tflops']:.0f} TFLOP/s"
    )


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def median(values: dict[str, Any], name: str, form: Callable[[float], str]) -> str:
    """A side's median, or a dash where it was not measured."""
    return form(values[name]["median"]) if name in values else "-"


def inverse(value: float) -> str:
    return times(1 / value)


def step_cuda() -> str:
    """Speed of a step on a GPU: eager, compiled and in CUDA graphs."""
    if not measured("step-cuda"):
        return "Training steps: not measured on a GPU yet."
    results = read("step-cuda")
    names = ["backprop compiled", "PyTorch DFA loop", "limit", "fastdfa", "fastdfa compiled"]
    rows = []
    for row in results["rows"]:
        speed = [median(row["to_backprop"], name, inverse) for name in names]
        of_limit = median(row["to_limit"], "fastdfa", lambda ratio: f"{1 / ratio:.2f}")
        graph = median(row.get("to_graph", {}), "fastdfa, graph", inverse)
        memory = f"{row['peak_mib']['fastdfa']:.0f} / {row['peak_mib']['backprop']:.0f}"
        milliseconds = f"{row['milliseconds']['backprop']['median']:.2f}"
        rows.append([row["case"], milliseconds, *speed, of_limit, graph, memory])
    head = ["hidden layers x width / batch", "backprop, ms", "backprop, compiled"]
    head += ["PyTorch loop", "limit", "**fastdfa**", "fastdfa, compiled", "fastdfa, of limit"]
    head += ["both in CUDA graphs", "peak MiB, fastdfa / backprop"]
    peaks = [
        f"{big['case']}: fastdfa {big['peak_mib']['fastdfa']:.0f} MiB, "
        f"backprop {big['peak_mib']['backprop']:.0f}"
        for big in results["memory"]
    ]
    memory = f"\n\nPeak memory of a step at {'; at '.join(peaks)}." if peaks else ""
    return (
        "Speed of a training step on a GPU, eager backprop = 1 (784 inputs, 10 classes, tanh, "
        f"float32 where nothing else is said, no tf32; {where_gpu(results)}):\n\n"
        f"{table(head, rows)}{memory}"
    )


def kernels_cuda() -> str:
    """project_gate on a GPU, beside PyTorch and beside what the GPU itself reaches."""
    if not measured("kernels-cuda"):
        return "Kernels: not measured on a GPU yet."
    results = read("kernels-cuda")
    rows = []
    for row in results["rows"]:
        compiled = "compiled" if "compiled" in row["to_eager"] else "compiled, e B once"
        names = ["eager, e B once", compiled, "fastdfa", "fastdfa, B generated"]
        speed = [median(row["to_eager"], name, inverse) for name in names]
        ceilings = [
            median(row[ceiling], name, "{:.2f}".format)
            for name in names[2:]
            for ceiling in ("of_copy", "of_product")
        ]
        mine = row["milliseconds"].get("fastdfa", row["milliseconds"]["fastdfa, B generated"])
        peak = f"{row['peak_mib']['fastdfa, B generated']:.0f}"
        rows.append([row["case"], f"{mine['median']:.3f}", *speed, *ceilings, peak])
    head = ["layers x width, rows M, classes C", "ms", "eager, `e B` once", "compiled"]
    head += ["**project_gate**", "B generated", "of a copy", "of a product"]
    head += ["generated: of a copy", "of a product", "peak MiB, generated"]
    return (
        "The kernel alone on a GPU, with nothing in the L2 cache. Eager PyTorch with a product "
        "`e B` for each layer = 1. *Of a copy*: bytes that must move in the time it took, against "
        "a device-to-device copy of that size in the same rounds; *of a product*: operations done "
        "(a shared B needs one product for all layers), against one plain product for all layers. "
        "*With launches*: calls that follow each other, bound by launching them "
        f"({where_gpu(results)}):\n\n{table(head, rows)}"
    )


def memory_table(results: dict[str, Any], where: str) -> str:
    names = ["backprop", "checkpointed", "checkpointed, updates in backward"]
    names += ["fastdfa", "streaming"]
    timed = [*names[1:], "streaming, own products"]
    rows = [
        [
            row["case"],
            *[f"{row['peak_mib'][name]:.1f}" if name in row["peak_mib"] else "-" for name in names],
            *[median(row["to_backprop"], name, "{:.2f}".format) for name in timed],
        ]
        for row in results["rows"] + results["narrow"]
    ]
    head = ["hidden layers x width / batch", "backprop, MiB", "checkpointed"]
    head += ["and updated in backward", "fastdfa", "**streaming**"]
    head += ["checkpointed, time", "and updated in backward", "fastdfa", "**streaming**"]
    head += ["streaming, own products"]
    return (
        "Peak MiB of a training step with its gradients, and its time, eager backprop = 1 (10 "
        "classes, tanh, float32, SGD with momentum, by `torch.mm` but for the last; medians of "
        f"interleaved rounds; {where}):\n\n{table(head, rows)}"
    )


def memory() -> str:
    """Peak memory and time of a streaming step over depth, beside backprop and checkpointing."""
    results = read("memory")
    return memory_table(results, where(results["machine"]))


def one_pass() -> str:
    """Streaming with the target in place of the error, beside streaming."""
    results = read("memory-one-pass")
    sides = ["backprop", "fastdfa", "streaming", "one pass"]
    timed = [*sides[1:], "streaming, own products", "one pass, own products"]
    rows = [
        [
            row["case"],
            *[f"{row['peak_mib'][name]:.1f}" for name in sides],
            *[median(row["to_backprop"], name, "{:.2f}".format) for name in timed],
        ]
        for row in results["rows"] + results["narrow"]
    ]
    head = ["hidden layers x width / batch", "backprop, MiB", "fastdfa", "streaming"]
    head += ["**one pass**", "fastdfa, time", "streaming", "**one pass**"]
    head += ["streaming, own products", "**one pass**, own products"]
    return f"({where(results['machine'])}; backprop's time = 1):\n\n{table(head, rows)}"


def memory_cuda() -> str:
    if not measured("memory-cuda"):
        return "Memory over depth: not measured on a GPU yet."
    results = read("memory-cuda")
    machine = results["machine"]
    facts = f"{machine['gpu']}, CUDA {machine['cuda']}, PyTorch {machine['torch']}"
    return memory_table(results, f"{facts}, {machine['date']}")


def family(name: str) -> str:
    """Every rule beside each other, by one network and one budget."""
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


FIGURES: dict[str, Callable[[], str]] = {
    "step": step,
    "dtypes": dtypes,
    "growth": growth,
    "accuracy": accuracy,
    "memory": memory,
    "one-pass": one_pass,
    "kernels": kernels,
    "products": products,
    "overhead": overhead,
    "float16": float16_steps,
    "int8-steps": int8_steps,
    "int8-accuracy": int8_accuracy,
    "kinds": kinds,
    "recipe": recipe,
    "train": train,
    "family": partial(family, "rules-mnist"),
    "family-cnn": partial(family, "rules-cnn"),
    "step-cuda": step_cuda,
    "kernels-cuda": kernels_cuda,
    "kinds-cuda": kinds_cuda,
    "memory-cuda": memory_cuda,
}


def filled(text: str) -> str:
    """A page with every section between markers written anew."""
    pattern = r"(<!-- figures: ([\w -]+) -->\n).*?(<!-- end -->)"
    of_paper = paper_report.sections()

    def section(marked: re.Match[str]) -> str:
        name = marked[2]
        figures = of_paper[name] if name in of_paper else FIGURES[name]()
        return f"{marked[1]}{figures}\n{marked[3]}"

    return re.sub(pattern, section, text, flags=re.DOTALL)


def main() -> int:
    changed = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        new = filled(text)
        if new != text:
            changed.append(page)
            if sys.argv[1:] != ["--check"]:
                (ROOT / page).write_text(new)
    if changed and sys.argv[1:] == ["--check"]:
        print(f"{', '.join(changed)}: figures differ from benchmarks/results; run `make readme`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
