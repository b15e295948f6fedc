"""The matrix products of the fused layers, by the library that is faster on this processor.

On AMD processors `torch.mm` is MKL on a slow path: 161 to 190 GF on two Zen 5 cores at widths of
512 to 2048, where oneDNN, which PyTorch carries as well, reaches 305 to 422.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARIES = ("torch", "onednn")
# Below this many multiplications a call of oneDNN is not worth its set-up: a weight gradient took
# 24 us against torch.mm's 14 at 1 M, 68 against 90 at 8 M.
_FEWEST_MULTIPLICATIONS = 2**22
# oneDNN copies a transposed first operand; whole, the copy put the peak of a step above backprop's
# (291 against 288 MiB at 16x512, batch 8192).
_MOST_COPIED_BYTES = 4 * 2**20


@cache
def library() -> str:
    """Which library multiplies: "onednn" on AMD processors, else "torch" (`torch.mm`).

    The environment variable FASTDFA_GEMM overrides it. Not timed at run time, so that the same
    machine always gives the same bits.

    Raises:
        ValueError: for another value of FASTDFA_GEMM.
    """
    chosen = os.environ.get("FASTDFA_GEMM")
    if chosen is not None and chosen not in LIBRARIES:
        raise ValueError(f"FASTDFA_GEMM must be one of {', '.join(LIBRARIES)}, got {chosen!r}")
    if not torch.backends.mkldnn.is_available():
        return "torch"
    return chosen or ("onednn" if _made_by_amd() else "torch")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, [*rows, n], of a [*rows, k] and b [n, k]."""
    if not _by_onednn(a, b):
        return a @ b.t()
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, [n, k], of a [M, n] and b [M, k]."""
    if not _by_onednn(a.t(), b.t()):
        return a.t() @ b
    pieces = -(-a.numel() * a.element_size() // _MOST_COPIED_BYTES)
    if pieces == 1:
        return product(a.t(), b.t())
    return torch.cat([product(piece.t(), b.t()) for piece in a.chunk(pieces, dim=1)])


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    # A compiled step has its products from inductor, which knows `mm` and not this op.
    if torch.compiler.is_compiling() or a.dtype != torch.float32 or b.dtype != torch.float32:
        return False
    if a.device.type != "cpu" or a.numel() * b.shape[0] < _FEWEST_MULTIPLICATIONS:
        return False
    # Operands that do not fit each other: torch.mm says so in words that name the shapes.
    if a.shape[-1] != b.shape[1] or a.device != b.device:
        return False
    return library() == "onednn" and torch.backends.mkldnn.enabled


def _made_by_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flop(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
        rows = 1
        for size in a_shape:
            rows *= size
        return 2 * rows * b_shape[0]
