"""Says which implementation runs, compiled or plain PyTorch, why, and how it was built."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .ops import loading, products
from .version import __version__


def build_info() -> dict[str, Any]:
    """Says what runs and how it was built.

    Returns:
        A dict of

        - fastdfa, torch, python: the running versions.
        - matrix_products: what multiplies float32 and float64 matrices in the fused layers on the
          CPU, "fastdfa" or "torch"; bfloat16 with it where `bfloat16_products`.
        - kernels: the device types that compiled kernels serve.
        - fallback: device type -> why plain PyTorch runs there instead.
        - cpu_capability: the instruction set in use ("baseline", "avx2", "avx512").
        - bfloat16_products: whether this processor multiplies bfloat16 (AVX-512 BF16).
        - cpu_capabilities: each one compiled in -> its compiler flags.
        - compiler, build_type, flags: of the C++ library.
        - torch_target, torch_built_against: the oldest PyTorch it loads on; whose headers it used.
        - cuda, cuda_architectures: the version of nvcc and what the CUDA library is compiled for,
          None where it was not built; `cuda_skipped` says why.

        Everything from `cpu_capability` on is absent where the extension is; where only the module
        that knows it is, `unknown` says why.
    """
    info = {
        "fastdfa": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matrix_products": products.library(),
        "kernels": [device for device in ("cpu", "cuda") if loading.available(device)],
        "fallback": dict(loading.fallbacks),
    }
    return info | loading.facts()
