"""Which implementation runs, the compiled kernels or plain PyTorch, why, and how it was built."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["available", "build_info", "load"]

_loaded: set[str] = set()
_fallback: dict[str, str] = {}  # device type -> why its kernels do not run


def load() -> None:
    """Loads the op libraries that this process can use. Never raises: `build_info` has the reason.

    `FASTDFA_DISABLE_EXTENSION=1` in the environment leaves them out, as if never built.
    """
    _load("cpu", _missing())
    if not torch.version.cuda:
        _fallback["cuda"] = f"PyTorch {torch.__version__} is built without CUDA"
    else:  # its ops are declared in the CPU library
        _load("cuda", _fallback.get("cpu"))


def available(device_type: str) -> bool:
    """Whether compiled kernels run for tensors on a device of this type ("cpu", "cuda")."""
    return device_type in _loaded


@cache
def multiplies_bfloat16() -> bool:
    """Whether the kernels of the CPU multiply bfloat16: on processors with AVX-512 BF16."""
    return available("cpu") and bool(_facts().get("bfloat16_products"))


def build_info() -> dict[str, Any]:
    """What runs and how it was built.

    Returns a dict:
        fastdfa, torch, python: the running versions.
        matrix_products: what multiplies float32 and float64 matrices in the fused layers on the
            CPU, "fastdfa" or "torch"; bfloat16 with it where `bfloat16_products`.
        kernels: the device types that compiled kernels serve.
        fallback: device type -> why plain PyTorch runs there instead.
        cpu_capability: the instruction set in use ("baseline", "avx2", "avx512").
        bfloat16_products: whether this processor multiplies bfloat16 (AVX-512 BF16).
        cpu_capabilities: each one compiled in -> its compiler flags.
        compiler, build_type, flags: of the C++ library.
        torch_target, torch_built_against: the oldest PyTorch it loads on; whose headers it used.
        cuda, cuda_architectures: version of nvcc and what the CUDA library is compiled for, None
            where it was not built; `cuda_skipped` says why.
    Everything from `cpu_capability` on is absent where the extension is; where only the module
    that knows it is, `unknown` says why.
    """
    from .. import __version__
    from .products import library

    info = {
        "fastdfa": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "matrix_products": library(),
        "kernels": sorted(_loaded),
        "fallback": dict(_fallback),
    }
    return info | _facts()


def _missing() -> str | None:
    """Why there is no extension at all, if so."""
    if os.environ.get("FASTDFA_DISABLE_EXTENSION", "") not in ("", "0"):
        return "FASTDFA_DISABLE_EXTENSION is set"
    if not _library("cpu").exists():
        return "the extension is not built: reinstall fastdfa without FASTDFA_PURE_PYTHON, on Linux"
    return None


def _library(device_type: str) -> Path:
    return Path(__file__).parents[1] / f"_C_{device_type}.so"


def _load(device_type: str, reason: str | None) -> None:
    library = _library(device_type)
    if reason is None and not library.exists():
        reason = f"built without CUDA kernels: {_facts().get('cuda_skipped')}"
    if reason is None:
        try:
            torch.ops.load_library(library)
        except (OSError, RuntimeError) as error:
            reason = f"{library.name} does not load: {error}"
    if reason is None:
        _loaded.add(device_type)
    else:
        _fallback[device_type] = reason


def _facts() -> dict[str, Any]:
    if _missing():
        return {}
    try:
        from .. import _ext
    except ImportError as error:  # not for this Python; the op libraries load in any version
        return {"unknown": str(error)}
    return _ext.build_facts()
