"""Loads the libraries of compiled ops, and knows for which devices they run, or why they do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference

fallbacks: dict[str, str] = {}  # why plain PyTorch runs, by each device type for which it does
_loaded: set[str] = set()


def load() -> None:
    """Loads the op libraries that this process can use. Never raises: `fallbacks` has the reason.

    `FASTDFA_DISABLE_EXTENSION=1` in the environment leaves them out, as if never built.
    """
    _load("cpu", _missing())
    no_cuda = None if torch.version.cuda else f"PyTorch {torch.__version__} is built without CUDA"
    _load("cuda", no_cuda or fallbacks.get("cpu"))  # its ops are declared in the CPU library


def available(device_type: str) -> bool:
    """Tells whether compiled kernels run for tensors on a device of this type ("cpu", "cuda")."""
    return device_type in _loaded


def call(name: str, arguments: tuple[Any, ...], check: Callable[..., None]) -> Any:
    """Returns what the compiled op makes of these arguments, or its twin where there is none."""

    def compute(first: Tensor, *others: Any) -> Any:
        if first.device.type in _loaded:
            return getattr(torch.ops.fastdfa, name)(first, *others)
        with torch.no_grad():
            return getattr(reference, name)(first, *others)

    return checked(compute, arguments, check)


def checked(
    compute: Callable[..., Any], arguments: tuple[Any, ...], check: Callable[..., None]
) -> Any:
    """Returns what `compute` makes of these arguments, unless `check` refuses them.

    Compiled ops check their own, at a hundredth of the cost. Where they are loaded for the device
    of the first tensor, `check` is asked only after a failure, which it names in Python's kinds of
    errors. A traced call is checked by nobody, as Dynamo knows too little of the shapes.
    """
    first = arguments[0]
    if isinstance(first, list | tuple) and first:
        first = first[0]
    loaded = isinstance(first, Tensor) and first.device.type in _loaded
    if not loaded and not torch.compiler.is_compiling():
        check(*arguments)
    try:
        return compute(*arguments)
    except Exception:
        check(*arguments)
        raise


@cache
def multiplies_bfloat16() -> bool:
    """Tells whether the kernels of the CPU multiply bfloat16: on processors with AVX-512 BF16."""
    return available("cpu") and bool(facts().get("bfloat16_products"))


def facts() -> dict[str, Any]:
    """Returns how the extension was built, as its module `_ext` has it; nothing without one.

    Where only that module cannot be imported, `unknown` says why.
    """
    if _missing():
        return {}
    try:
        module = import_module("fastdfa._ext")
    except ImportError as error:  # not for this Python; the op libraries load in any version
        return {"unknown": str(error)}
    return dict(module.build_facts())


def _missing() -> str | None:
    """Says why there is no extension at all, if so."""
    if os.environ.get("FASTDFA_DISABLE_EXTENSION", "") not in ("", "0"):
        return "FASTDFA_DISABLE_EXTENSION is set"
    if not _library("cpu").exists():
        return "the extension is not built: reinstall fastdfa without FASTDFA_PURE_PYTHON, on Linux"
    return None


def _library(device_type: str) -> Path:
    return Path(__file__).parents[1] / f"_C_{device_type}.so"


def _load(device_type: str, reason: str | None) -> None:
    """Loads one library, unless there is a reason not to."""
    library = _library(device_type)
    if reason is None and not library.exists():
        reason = f"built without CUDA kernels: {facts().get('cuda_skipped')}"
    if reason is None:
        try:
            torch.ops.load_library(library)
            _loaded.add(device_type)
            return
        except (OSError, RuntimeError) as error:
            reason = f"{library.name} does not load: {error}"
    fallbacks[device_type] = reason
