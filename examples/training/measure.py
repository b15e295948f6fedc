"""What a run says of itself: its machine, the memory of a step, whether a device can be used."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fastdfa


def peak_memory(step: Callable[[], Any], device: str = "cpu") -> int:
    """Counts the bytes that the tensors of one call take at their peak, on top of what it leaves.

    Counted by the allocator, so neither fragmentation nor the interpreter shows. A step may have a
    method `clear`, which frees what its last call has left: its gradients.
    """
    step()
    if device != "cpu":
        getattr(step, "clear", lambda: None)()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    used = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        # What the step frees first, the gradients of the last, is not there to begin with.
        used = max(used + event.nbytes(), 0)
        peak = max(peak, used)
    return peak


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Says which processor, threads, versions and, for CUDA, which GPU a result belongs to."""
    facts = {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastdfa": fastdfa.__version__,
    }
    if torch.device(device).type != "cuda":
        return facts | {"cpu_capability": fastdfa.build_info().get("cpu_capability")}
    gpu = torch.cuda.get_device_properties(device)
    return facts | {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory_gib": round(gpu.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "kernels": fastdfa.build_info()["kernels"],
        "cuda_architectures": fastdfa.build_info().get("cuda_architectures"),
    }


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    cleaned = {key.strip(): value.strip() for key, value in fields.items()}
    model, family = cleaned.get("model name", platform.machine()), cleaned.get("cpu family", "?")
    return f"{model} (family {family})"


def usable_device(text: str) -> str:
    """Takes the name of a device that can hold a number, for argparse."""
    try:
        torch.zeros(1, device=text).item()
    # In this order: no such device, no driver or no kernels for it, or one that holds no numbers
    # ("meta"); CUDA in a PyTorch without it; a backend whose package is not installed ("hpu").
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return text
