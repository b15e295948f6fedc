"""Who multiplies in the fused layers: the kernels of this library (csrc/gemm.h), or torch.mm.

One core of a Zen 4 processor, in GFLOP/s of the forward pass and of the weight gradient, at sizes
from 64x128x128 to 256x4096x4096: these kernels 93 to 105 and 93 to 104, `torch.mm` (MKL) 82 to 98
and 72 to 96, oneDNN 61 to 108 and 48 to 97. On Zen 5, MKL ran at half of oneDNN's rate.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import build

LIBRARIES = ("torch", "fastdfa")
_DTYPES = (torch.float32, torch.float64)


@cache
def library() -> str:
    """Which library multiplies: "fastdfa" on AMD processors, else "torch" (`torch.mm`).

    The environment variable FASTDFA_GEMM overrides it. Not timed at run time, so that the same
    machine always gives the same bits.

    Raises:
        ValueError: for another value of FASTDFA_GEMM.
    """
    chosen = os.environ.get("FASTDFA_GEMM")
    if chosen is not None and chosen not in LIBRARIES:
        raise ValueError(f"FASTDFA_GEMM must be one of {', '.join(LIBRARIES)}, got {chosen!r}")
    if not build.available("cpu"):
        return "torch"
    return chosen or ("fastdfa" if _made_by_amd() else "torch")


def multiplies(x: Tensor) -> bool:
    """Whether the kernels of this library multiply matrices like x."""
    # A compiled step has its products from inductor, which knows `mm` and not these ops.
    if torch.compiler.is_compiling() or x.dtype not in _DTYPES or x.device.type != "cpu":
        return False
    return library() == "fastdfa"


def _made_by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
