"""Chooses who multiplies in the fused layers: this library (csrc/gemm.h), or torch.mm.

On Zen 4 these kernels are ahead of `torch.mm` (MKL) but in a single small product, and level with
oneDNN from 512 wide on: benchmarks/speed/one_core.py. On Zen 3 they are level with MKL one by one,
and a step takes 0.86 to 0.97 of its time. On Zen 5, MKL ran at half of oneDNN's rate.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from . import loading

LIBRARIES = ("torch", "fastdfa")
_DTYPES = (torch.float32, torch.float64)
# Elements of a dW up to which several are one batched product. On CUDA by count: 128 tiles of 128 x
# 128, and a GPU makes about as many at a time (an H100 132), so a larger product fills it alone. On
# the CPU (MKL, two Zen 4 cores) a step of 32x128, batch 64, takes 0.76 of its time with single
# products, one of 32x256, batch 256, 0.98, in bfloat16 0.71 and 0.93; but 16x512 1.03 and 0.99, and
# 4x1024, batch 128, 1.10 and 1.02, as two threads have three products there.
_BATCHED_ELEMENTS = {"cpu": 2**16, "cuda": 2**21}
# Bytes of outputs that may share one buffer, and so are freed together.
_BUFFER_BYTES = {"cpu": 2**20, "cuda": 32 * 2**20}


@cache
def library() -> str:
    """Names the library that multiplies: "fastdfa" on AMD processors, else "torch" (`torch.mm`).

    The environment variable FASTDFA_GEMM overrides it. Not timed at run time, so that the same
    machine always gives the same bits.

    Raises:
        ValueError: for another value of FASTDFA_GEMM.
    """
    chosen = os.environ.get("FASTDFA_GEMM")
    if chosen is not None and chosen not in LIBRARIES:
        raise ValueError(f"FASTDFA_GEMM must be one of {', '.join(LIBRARIES)}, got {chosen!r}")
    if not loading.available("cpu"):
        return "torch"
    return chosen or ("fastdfa" if _made_by_amd() else "torch")


def multiplies(x: Tensor, wide: bool = False) -> bool:
    """Tells whether the kernels of this library multiply matrices like x.

    `wide`: by weights in x's accumulation dtype, and into gradients in it, as autocast has them. So
    bfloat16 is multiplied, where the processor can, as no weight and no gradient is cast then: a
    step is 1.06 to 1.9 times as fast as with torch's products. With weights in bfloat16, where
    nothing is cast, it took 1.18 times as long at 4x1024, batch 128, and stays torch's.
    """
    # A compiled step has its products from inductor, which knows `mm` and not these ops.
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if x.dtype == torch.bfloat16:
        return wide and library() == "fastdfa" and loading.multiplies_bfloat16()
    return x.dtype in _DTYPES and library() == "fastdfa"


def widens(*matrices: Tensor) -> bool:
    """Tells whether products of these are made of copies in float32, and then rounded.

    So are those of float16 on an x86 processor without instructions for it: with torch's products
    a step of 4x1024, batch 128, took 179 ms there (two Zen 4 cores), and so 15 to 20; 12 in
    float32.
    """
    if torch.compiler.is_compiling():
        return False
    half = all(x.dtype == torch.float16 and x.device.type == "cpu" for x in matrices)
    return half and not _has_float16_products()


@cache
def _has_float16_products() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


# By torch.


def memory_of_outputs(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Allocates the outputs [M, n_l] of a chain: neighbours of one width in one buffer.

    So the inputs and (see ProjectGateWork) the deltas of their readers lie at equal distances, and
    one batched product makes the weight gradients. None stands for memory of its own.
    """
    if torch.compiler.is_compiling():  # inductor plans memory itself
        return [None] * len(weights)
    memory: list[Tensor | None] = []
    most = _BUFFER_BYTES.get(x.device.type, 0)
    for width, run in groupby(len(weight) for weight in weights):
        left = len(list(run))
        together = max(1, most // max(len(x) * width * x.itemsize, 1))
        while left > 0:
            count = min(left, together)
            memory += x.new_empty(count, len(x), width).unbind() if count > 1 else [None]
            left -= count
    return memory


def weight_gradients(deltas: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Computes every d_l^T x_l [n_l, k_l]: small ones that lie in a row in memory all at once.

    The gradients of those are parts of one tensor, contiguous each.
    """
    if torch.compiler.is_compiling():  # a traced call knows no addresses
        return [delta.t() @ x for delta, x in zip(deltas, inputs, strict=True)]
    grads: list[Tensor] = []
    while len(grads) < len(deltas):
        first = len(grads)
        count = _batched(deltas, inputs, first)
        if count == 1:
            grads.append(deltas[first].t() @ inputs[first])
        else:
            delta, x = (_stacked(matrices[first], count) for matrices in (deltas, inputs))
            grads += torch.bmm(delta.transpose(1, 2), x).unbind()
    return grads


def _batched(deltas: Sequence[Tensor], inputs: Sequence[Tensor], first: int) -> int:
    """Counts how many of these layers, from `first` on, one product serves."""
    count = _in_a_row(inputs, first, len(inputs))
    if count == 1:
        return 1
    count = _in_a_row(deltas, first, first + count)
    elements = deltas[first].shape[-1] * inputs[first].shape[-1]
    return count if elements <= _BATCHED_ELEMENTS.get(deltas[first].device.type, 0) else 1


def _in_a_row(matrices: Sequence[Tensor], first: int, end: int) -> int:
    """Counts how many lie one behind the other in one buffer, contiguous and of one shape.

    The same offset from the same address is the same buffer.
    """
    start = matrices[first]
    if not start.is_contiguous():
        return 1
    address, offset, size = start.data_ptr(), start.storage_offset(), start.numel()
    for i in range(first + 1, end):
        matrix, distance = matrices[i], (i - first) * size
        if (
            matrix.storage_offset() != offset + distance
            or matrix.data_ptr() != address + distance * start.itemsize
            or matrix.shape != start.shape
            or matrix.dtype != start.dtype
            or not matrix.is_contiguous()
        ):
            return i - first
    return end - first


def _stacked(first: Tensor, count: int) -> Tensor:
    """Returns a matrix and those that lie behind it as one tensor [count, M, n]."""
    return first.as_strided((count, *first.shape), (first.numel(), first.shape[1], 1))


def _made_by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
