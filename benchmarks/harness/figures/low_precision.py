"""Steps under float16 autocast, and int8 weight gradients."""

from __future__ import annotations

from benchmarks.harness.figures.markdown import inverse, median, read, table, times, where

# Sides of low_precision.py, and what to call them.
INT8 = {
    "ops, bfloat16": "the ops, bfloat16",
    "int8": "**int8**",
    "int8, product alone": "int8, roundings free",
}


def int8_steps() -> str:
    """Writes the speed of a step with int8 weight gradients, beside bfloat16 by the same ops."""
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
    """Writes milliseconds and peak memory of a step under float16 autocast."""
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
    """Writes test errors of networks trained with int8 weight gradients."""
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
