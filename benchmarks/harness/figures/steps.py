"""Speed of training steps: over sizes, dtypes, what grows, kinds of network, on a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.figures.markdown import (
    by_side,
    inverse,
    measured,
    median,
    read,
    table,
    times,
    where,
    where_gpu,
)
from benchmarks.harness.timing import FUSED

SIZE = "hidden layers x width / batch"
# Sides of torch and of others, and their headings.
BY_TORCH = {
    "backprop compiled": "backprop, compiled",
    "PyTorch DFA loop": "PyTorch loop",
    "BioTorch": "BioTorch",
}


# Of step and kinds, what the first page shows: small and large, and where nothing is gained.
HEADLINE = {
    "step": ["4x128 / 128", "32x128 / 64", "4x1024 / 128", "4x1024 / 1024", "8x2048 / 256"],
    "kinds": [
        "CNN of make train, 2x96 / 128",
        "ResNet-20 / 128, per block",
        "transformer 4x128 / 32, norm first, per block",
        "GCN 2x64 / Cora",
    ],
}


def headline() -> str:
    """Writes the speed of a step for some networks of every kind."""
    results = {name: read(name) for name in HEADLINE}
    found = []
    for name, cases in HEADLINE.items():
        named = {row["case"]: row for row in results[name]["rows"]}
        mlp = "MLP " if name == "step" else ""
        found += [named[case] | {"case": mlp + case} for case in cases if case in named]
    heads, speeds = by_side(found, {
        "backprop compiled": "backprop, compiled", "fastdfa compiled": "fastdfa, compiled",
        FUSED: FUSED, "fastdfa": "**fastdfa**",
    })  # fmt: skip
    rows = [[row["case"], *speed] for row, speed in zip(found, speeds, strict=True)]
    measured_at = " and ".join(dict.fromkeys(where(each["machine"]) for each in results.values()))
    return (
        "Speed of a training step, eager backprop by PyTorch = 1 (float32; medians of interleaved "
        f"rounds; {measured_at}):\n\n{table(['network / batch', *heads], rows)}{of_before(found)}"
    )


def of_before(rows: list[dict[str, Any]]) -> str:
    """Writes what results from before fused backprop was timed are of."""
    if any(FUSED in row["to_backprop"] for row in rows):
        return ""
    return (
        "\n\nMeasured before one mechanism made every gradient (CHANGELOG.md) and before fused "
        "backprop was timed beside it: not yet anew."
    )


def step() -> str:
    """Writes the speed of a step over sizes, and the peak memory of one."""
    results = read("step")
    found = [row for row in results["rows"] if row["dtype"] == "float32"]
    heads, speeds = by_side(found, BY_TORCH | {
        "limit": "limit", "fastdfa, torch.mm": "fastdfa, `torch.mm`", FUSED: FUSED,
        "fastdfa": "**fastdfa**",
    })  # fmt: skip
    rows = [
        [
            row["case"],
            *speed,
            f"{1 / row['to_limit']['fastdfa, torch.mm']['median']:.2f}",
            f"{row['peak_mib']['fastdfa']:.0f} / {row['peak_mib']['backprop']:.0f}",
        ]
        for row, speed in zip(found, speeds, strict=True)
    ]
    head = [SIZE, *heads, "`torch.mm`, of limit", "peak MiB, fastdfa / backprop"]
    big = results["memory"][0]
    return (
        "Speed of a training step, eager backprop = 1 (784 inputs, 10 classes, tanh, float32; "
        f"medians of interleaved rounds; {where(results['machine'])}):\n\n"
        f"{table(head, rows)}\n\n"
        f"Peak memory of a step at {big['case']}: fastdfa {big['peak_mib']['fastdfa']:.0f} MiB, "
        f"backprop {big['peak_mib']['backprop']:.0f}, "
        f"the loop {big['peak_mib']['PyTorch DFA loop']:.0f}.{of_before(found)}"
    )


def dtypes() -> str:
    """Writes the speed of a step in other dtypes than float32, where backprop in the same is 1."""
    found = [row for row in read("step")["rows"] if row["dtype"] != "float32"]
    if not found:
        return "Steps in other dtypes: not measured yet."
    sides = BY_TORCH | {"limit": "limit", FUSED: FUSED, "fastdfa": "**fastdfa**"}
    heads, speeds = by_side(found, sides)
    rows = [[row["case"], *speed] for row, speed in zip(found, speeds, strict=True)]
    return (
        "In other dtypes, eager backprop in the same one = 1 (*autocast*: float32 weights, as one "
        f"trains in bfloat16):\n\n{table([SIZE, *heads], rows)}"
    )


def growth() -> str:
    """Writes the speed over what grows, and where backprop is faster."""
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


def recipe() -> str:
    """Writes the speed of a step where norms and activations are modules of their own."""
    results = read("recipe")
    heads, speeds = by_side(results["rows"], {
        "backprop compiled": "backprop, compiled", FUSED: FUSED,
        "layers one by one": "every module called", "fastdfa": "**fastdfa**",
    })  # fmt: skip
    rows = [[row["case"], *speed] for row, speed in zip(results["rows"], speeds, strict=True)]
    return (
        f"Eager backprop = 1 ({where(results['machine'])}):\n\n{table([SIZE, *heads], rows)}"
        f"{of_before(results['rows'])}"
    )


def versions() -> str:
    """Writes the speed of a step before and after the engine was redesigned."""
    results = read("versions")
    rows = [
        [
            row["case"],
            f"{row['backprop_ms']:.2f}",
            times(row["before"]),
            f"**{times(row['now'])}**",
            f"{row['ratio']:.2f}",
            times(row["fused_backprop"]),
            f"{row['peak_mib_before']:.1f} / {row['peak_mib_now']:.1f}",
        ]
        for row in results["rows"]
    ]
    head = [SIZE, "backprop, ms", "before", "now", "now / before", "fused backprop",
            "peak MiB, before / now"]  # fmt: skip
    return (
        f"Eager backprop = 1; *before* is commit {results['before']} "
        f"({where(results['machine'])}):\n\n{table(head, rows)}"
    )


def kinds_table(results: dict[str, Any]) -> str:
    """Writes the speed of a step of every kind of network beside its bound."""
    heads, speeds = by_side(results["rows"], {
        "limit": "limit", "backprop compiled": "backprop, compiled", FUSED: FUSED,
        "fastdfa compiled": "fastdfa, compiled", "fastdfa, torch.mm": "fastdfa, `torch.mm`",
        "fastdfa": "**fastdfa**",
    })  # fmt: skip
    rows = [
        [
            row["case"],
            times(row["bound"]),
            *speed,
            f"{1 / row['to_backprop']['fastdfa']['median'] / row['bound']:.2f}",
            f"{row['peak_mib']['fastdfa']:.1f} / {row['peak_mib']['backprop']:.1f}",
        ]
        for row, speed in zip(results["rows"], speeds, strict=True)
    ]
    head = ["network / batch", "bound", *heads, "of the bound", "peak MiB, fastdfa / backprop"]
    return table(head, rows)


def kinds() -> str:
    results = read("kinds")
    return (
        "Speed of a training step, eager backprop = 1 (float32; medians of interleaved rounds; "
        f"{where(results['machine'])}):\n\n{kinds_table(results)}{of_before(results['rows'])}"
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


def step_cuda() -> str:
    """Writes the speed of a step on a GPU: eager, compiled and in CUDA graphs."""
    if not measured("step-cuda"):
        return "Training steps: not measured on a GPU yet."
    results = read("step-cuda")
    found = results["rows"]
    heads, speeds = by_side(found, {
        "backprop compiled": "backprop, compiled", "PyTorch DFA loop": "PyTorch loop",
        "limit": "limit", FUSED: FUSED, "fastdfa": "**fastdfa**",
        "fastdfa compiled": "fastdfa, compiled",
    })  # fmt: skip
    rows = [
        [
            row["case"],
            f"{row['milliseconds']['backprop']['median']:.2f}",
            *speed,
            median(row["to_limit"], "fastdfa", lambda ratio: f"{1 / ratio:.2f}"),
            median(row.get("to_graph", {}), "fastdfa, graph", inverse),
            f"{row['peak_mib']['fastdfa']:.0f} / {row['peak_mib']['backprop']:.0f}",
        ]
        for row, speed in zip(found, speeds, strict=True)
    ]
    head = [SIZE, "backprop, ms", *heads, "fastdfa, of limit", "both in CUDA graphs"]
    head += ["peak MiB, fastdfa / backprop"]
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
