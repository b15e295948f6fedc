"""What the commands share: their options, the console, a budget of time, sides that fail."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console

import fastdfa
from benchmarks.harness.results import RESULTS
from benchmarks.harness.timing import Step

console = Console()


def working(steps: dict[str, Step], case: str) -> tuple[dict[str, Step], dict[str, str]]:
    """Returns the steps that run once without an error, and of the others the error's first line.

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
    """Allows cases of a benchmark until its time is spent: none is begun after that."""

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
    """Adds the options that all benchmarks share."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds ({rounds})")
    parser.add_argument("--seconds", type=float, help="for which a side runs in a round")
    parser.add_argument("--budget", type=float, help="seconds after which no case is begun")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")


def check_device(device: str) -> None:
    """Exits with one line where the benchmark cannot run on this device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: PyTorch {torch.__version__} finds no CUDA GPU here")
    kernels = fastdfa.build_info()
    if device == "cuda" and "cuda" not in kernels["kernels"]:
        raise SystemExit(f"--device cuda: no CUDA kernels: {kernels['fallback'].get('cuda')}")
