"""Times steps side by side, in interleaved rounds, and gives their ratios round by round."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark import Timer

# Read between two calls it leaves nothing of the first in the L2 cache: 60 MB on an H200.
FLUSH_BYTES = 256 * 2**20
COLD_CALLS = 20  # of one step in one round, at most
# The GPU waits so many cycles, 1 ms, before a cold call: time for Python to launch all of it.
AHEAD_CYCLES = 2_000_000

Step = Callable[[], Any]
# Exact backprop by the layers of fastdfa, none of them cut: what is faster than that is DFA's part.
FUSED = "fused backprop"

# Seconds a call, of so many calls.
Timing = Callable[[int], float]


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


class Spread(NamedTuple):
    """Holds the median and the quartiles of one quantity over the rounds."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Returns the median and the quartiles of at least two values."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def interleaved(
    steps: dict[str, Step], rounds: int, seconds: float, device: str = "cpu", cold: bool = False
) -> dict[str, list[float]]:
    """Times a call of every step in every round, in seconds: in a round all steps run in turn.

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
    """Returns what makes the timing of a step on this device."""
    if device == "cpu":
        return _cpu_timing
    return _cold_timing if cold else _warm_timing


def _cpu_timing(step: Step) -> Timing:
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return lambda calls: timer.timeit(calls).mean


def _warm_timing(step: Step) -> Timing:
    """Times all calls between two events."""

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
    """Times each call between two events of its own; before them it fills the cache with others.

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
    """Divides the times by those of `base`, round by round."""
    return {
        name: spread([t / b for t, b in zip(values, times[base], strict=True)])
        for name, values in times.items()
    }


def beside_backprop(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Returns, for a result's row, milliseconds and the times relative to what they stand beside.

    That is backprop by torch, and by the kernels of fastdfa where it was timed: FUSED.
    """
    bases = {"to_backprop": "backprop", "to_fused": FUSED}
    return {
        "milliseconds": {n: spread([1e3 * t for t in ts])._asdict() for n, ts in times.items()},
        **{
            key: {n: r._asdict() for n, r in ratios(times, base).items()}
            for key, base in bases.items()
            if base in times
        },
    }
