"""Speed of the kernels alone, and what one core does."""

from __future__ import annotations

from benchmarks.harness.figures.markdown import (
    inverse,
    measured,
    median,
    read,
    table,
    times,
    where,
    where_gpu,
)


def kernels() -> str:
    """Writes the speed of project_gate beside eager and compiled PyTorch."""
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
    """Writes the rates of matrix products on one core, by library."""
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
    "layers one by one": "fastdfa, layers one by one",
    "fastdfa": "**fastdfa**",
    "the ops of the hidden layers alone": "its three ops for the hidden layers alone",
}


def overhead() -> str:
    """Writes the time of a step in which there is nothing to compute."""
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


def kernels_cuda() -> str:
    """Writes the speed of project_gate on a GPU, beside PyTorch and what the GPU itself reaches."""
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
