"""Peak memory and time of a training step over depth."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.figures.markdown import measured, median, read, table, where


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
    """Writes peak memory and time of a streaming step over depth, beside backprop and
    checkpointing."""
    results = read("memory")
    return memory_table(results, where(results["machine"]))


def one_pass() -> str:
    """Writes the same of streaming with the target in place of the error, beside streaming."""
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
