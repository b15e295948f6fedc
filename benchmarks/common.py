"""What the benchmarks share: networks, interleaved timing, peak memory, and the result files."""

from __future__ import annotations

import contextlib
import ctypes
import json
import platform
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.utils.benchmark import Timer

import fastdfa

RESULTS = Path(__file__).parent / "results"
console = Console()


def keep_freed_memory() -> None:
    """Tells glibc not to give freed memory back between steps, for all sides alike.

    By default it returns megabytes of freed gradients to the system and takes them again, page
    by page, as it happens to stand: the same kernel took 1.6 or 13 ms. Elsewhere: nothing done.
    """
    trim_threshold, mmap_threshold = -1, -3  # of mallopt(3); 32 MiB is the most that it takes
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


Step = Callable[[], Any]


class Spread(NamedTuple):
    """Median and quartiles of one quantity over the rounds."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """The median and the quartiles of at least two values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def interleaved(steps: dict[str, Step], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds a call for every step and round: in each round all steps run in turn.

    So a drift of the machine's speed meets all of them, and ratios are taken round by round. A
    step is repeated in a round for about `seconds`.
    """
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        for name, step in steps.items()
    }
    repeats = {}
    for name, timer in timers.items():
        timer.timeit(2)  # warm-up: compilation, caches, the allocator
        repeats[name] = max(1, round(seconds / timer.timeit(1).mean))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(repeats[name]).mean)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, Spread]:
    """Time relative to `base`, paired round by round."""
    return {
        name: spread([t / b for t, b in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }


def peak_memory(step: Step) -> int:
    """Bytes that the tensors of one call take at their peak, on top of what it leaves as it was.

    Counted from the allocator's events, so neither fragmentation nor the interpreter shows.
    """
    step()
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


def machine() -> dict[str, Any]:
    """The processor, threads and versions that a result belongs to."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastdfa": fastdfa.__version__,
        "cpu_capability": fastdfa.build_info().get("cpu_capability"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    cleaned = {key.strip(): value.strip() for key, value in fields.items()}
    model, family = cleaned.get("model name", platform.machine()), cleaned.get("cpu family", "?")
    return f"{model} (family {family})"


def save(name: str, rows: list[dict[str, Any]], folder: Path, **facts: Any) -> Path:
    """Writes rows and the machine as JSON; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"machine": machine(), **facts, "rows": rows}, indent=1)
    path.write_text(text + "\n")
    return path


def gemm_rate(size: int = 2048) -> float:
    """Floating-point operations a second of torch's own matrix product, the best of ten."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10))
