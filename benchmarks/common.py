"""What the benchmarks share: networks, interleaved timing, peak memory, and the result files."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch.utils.benchmark import Timer

import fastdfa

RESULTS = Path(__file__).parent / "results"
# Read between two calls it leaves nothing of the first in the L2 cache: 60 MB on an H200.
FLUSH_BYTES = 256 * 2**20
COLD_CALLS = 20  # of one step in one round, at most
# The GPU waits so many cycles, 1 ms, before a cold call: time for Python to launch all of it.
AHEAD_CYCLES = 2_000_000
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


# Seconds a call, of so many calls.
Timing = Callable[[int], float]


def interleaved(
    steps: dict[str, Step], rounds: int, seconds: float, device: str = "cpu", cold: bool = False
) -> dict[str, list[float]]:
    """Seconds a call for every step and round: in each round all steps run in turn.

    So a drift of the machine's speed meets all of them, and ratios are taken round by round. A
    step is repeated in a round for about `seconds`. On CUDA by events: `cold` times every call on
    its own, the GPU's work alone, with none of its data in the L2 cache, and takes the median of a
    round; else the calls of a round follow each other, as in training, and where launching them
    takes longer than running them, that is what shows.
    """
    make = _timing(device, cold)
    timings = {name: make(step) for name, step in steps.items()}
    repeats = {}
    for name, timing in timings.items():
        timing(2)  # warm-up: compilation, caches, the allocator
        repeats[name] = max(1, round(seconds / timing(1)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, timing in timings.items():
            times[name].append(timing(repeats[name]))
    return times


def _timing(device: str, cold: bool) -> Callable[[Step], Timing]:
    """What makes the timing of a step on this device."""
    if device == "cpu":
        return _cpu_timing
    return _cold_timing if cold else _warm_timing


def _cpu_timing(step: Step) -> Timing:
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return lambda calls: timer.timeit(calls).mean


def _warm_timing(step: Step) -> Timing:
    """Between two events, all calls."""

    def timing(calls: int) -> float:
        begin, end = _event(), _event()
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return timing


def _cold_timing(step: Step) -> Timing:
    """Between two events, each call; before them the cache is filled with something else.

    By reading: after writing, the cache would write back in the time of the call.
    """

    def timing(calls: int) -> float:
        events = [(_event(), _event()) for _ in range(min(calls, COLD_CALLS))]
        torch.cuda.synchronize()
        for begin, end in events:
            torch.cuda._sleep(AHEAD_CYCLES)
            _filler().sum()
            begin.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3

    return timing


@cache
def _filler() -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 4, device="cuda")


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def ratios(times: dict[str, list[float]], base: str) -> dict[str, Spread]:
    """Time relative to `base`, paired round by round."""
    return {
        name: spread([t / b for t, b in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }


def beside_backprop(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Milliseconds a call of every step, and its time relative to backprop's, of a result's row."""
    return {
        "milliseconds": {n: spread([1e3 * t for t in ts])._asdict() for n, ts in times.items()},
        "to_backprop": {n: r._asdict() for n, r in ratios(times, "backprop").items()},
    }


def peak_memory(step: Step, device: str = "cpu") -> int:
    """Bytes that the tensors of one call take at their peak, on top of what it leaves as it was.

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
    """The processor, threads, versions and, for CUDA, the GPU that a result belongs to."""
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


def save(
    name: str, rows: list[dict[str, Any]], folder: Path, device: str = "cpu", **facts: Any
) -> Path:
    """Writes rows and the machine as JSON; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"machine": machine(device), **facts, "rows": rows}, indent=1)
    path.write_text(text + "\n")
    return path


def result_name(name: str, device: str, quick: bool) -> str:
    """The file of a result, without ".json"."""
    parts = [name, *(["cuda"] if device == "cuda" else []), *(["quick"] if quick else [])]
    return "-".join(parts)


def working(steps: dict[str, Step], case: str) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps that run once without an error, and the error's first line of the others.

    One side that does not work (a compiler's, an allocation's) leaves the others to be measured.
    """
    good, failed = {}, {}
    for name, step in steps.items():
        try:
            step()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # an error in a kernel comes late
        except Exception as error:
            message = (str(error).strip().splitlines() or [""])[0]
            failed[name] = f"{type(error).__name__}: {message}"
            console.print(f"{case}: {name} failed: {failed[name]}", style="red", markup=False)
        else:
            good[name] = step
    return good, failed


class Budget:
    """Time for a whole benchmark: no further case is begun once it is spent."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, case: str) -> bool:
        if self._end is None or time.monotonic() < self._end:
            return True
        self.left_out.append(case)
        console.print(f"no time left for {case}", style="yellow")
        return False


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options that all benchmarks share."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds ({rounds})")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")


def usable_device(text: str) -> str:
    """The name of a device that can hold a number."""
    try:
        torch.zeros(1, device=text).item()
    # In this order: no such device, no driver or no kernels for it, or one that holds no numbers
    # ("meta"); CUDA in a PyTorch without it; a backend whose package is not installed ("hpu").
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return text


def check_device(device: str) -> None:
    """Exits with one line where the benchmark cannot run on this device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: PyTorch {torch.__version__} finds no CUDA GPU here")
    kernels = fastdfa.build_info()
    if device == "cuda" and "cuda" not in kernels["kernels"]:
        raise SystemExit(f"--device cuda: no CUDA kernels: {kernels['fallback'].get('cuda')}")


def gemm_rate(size: int = 2048) -> float:
    """Floating-point operations a second of torch's own matrix product, the best of ten."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10))


def gpu_rates(rounds: int, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What the GPU itself reaches: a device-to-device copy, and a square product of torch.

    The copy counts bytes read and bytes written. Medians of cold calls.
    """
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = interleaved(steps, rounds, 0.02, "cuda", cold=True)
    moved = 2 * source.numel() * source.element_size()
    return {
        "copy_gb_per_s": moved / spread(times["copy"]).median / 1e9,
        "product_tflops": 2 * size**3 / spread(times["product"]).median / 1e12,
        "product_size": size,
        "product_dtype": str(dtype).removeprefix("torch."),
    }
