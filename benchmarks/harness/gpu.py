"""Builds, tests and measures on a machine with a CUDA GPU; what `make gpu` runs.

    python3 -m benchmarks.harness.gpu [PART ...] [--out DIR]

Uses the Python environment that is active and needs no network: nothing is installed. Every part
has a log and a limit of time, and one that fails stops no other, but for `build`. What is measured
goes into the tracked results by `python3 -m benchmarks.harness.collect DIR`.

    build      the extension, for this GPU's architecture, in place
    test       the tests of the CUDA kernels; in the time that is left, the rest of the suite
    sanitize   compute-sanitizer's four tools over the tests marked `sanitize`
    kernels    benchmarks.speed.kernels --device cuda
    step       benchmarks.speed.step --device cuda
    kinds      benchmarks.speed.kinds --device cuda
    memory     benchmarks.speed.memory --device cuda
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CUDA_TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_cuda*.py"))
LIMIT = 470  # seconds a part, so that each ends within 8 minutes
MOST_LOG_BYTES = 8 * 2**20
TIMED_OUT, NO_TIME, SANITIZER_ERROR = 124, 125, 86

# Runs in a process of its own: this one must not hold a CUDA context, and torch may be missing.
PROBE = """
import importlib.util, json, os, shutil, sys, sysconfig
found = importlib.util.find_spec
facts = {"python": sys.version.split()[0], "executable": sys.executable}
names = ["torch", "numpy", "setuptools", "pytest", "rich"]
facts["missing"] = [name for name in names if found(name) is None]
tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
facts["missing"] += [name for name in ("cmake", "ninja") if shutil.which(name, path=tools) is None]
try:
    import pybind11
    pybind11.get_cmake_dir()
except Exception as error:
    facts["missing"].append(f"pybind11 (with its CMake files: {error})")
facts["xdist"] = found("xdist") is not None
if "setuptools" not in facts["missing"]:
    import setuptools
    if int(setuptools.__version__.split(".")[0]) < 77:
        facts["missing"].append(f"setuptools 77 or later (it has {setuptools.__version__})")
if "torch" not in facts["missing"]:
    import torch
    facts["torch"], facts["cuda"] = torch.__version__, torch.version.cuda
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["capability"] = list(torch.cuda.get_device_capability(0))
    import fastdfa
    info = fastdfa.build_info()
    facts["kernels"] = info["kernels"]
    facts["why_not"] = info["fallback"].get("cuda")
    facts["cuda_architectures"] = info.get("cuda_architectures")
print(json.dumps(facts))
"""
NEEDS = {
    "build": ["torch", "numpy", "setuptools", "cmake", "ninja", "pybind11"],
    "test": ["torch", "numpy", "pytest"],
    "sanitize": ["torch", "numpy", "pytest"],
    "kernels": ["torch", "numpy", "rich"],
    "step": ["torch", "numpy", "rich"],
    "kinds": ["torch", "numpy", "rich"],
    "memory": ["torch", "numpy", "rich"],
}
MEASURED = {  # the parts that measure: a module and its options
    "kernels": ["benchmarks.speed.kernels"],
    "step": ["benchmarks.speed.step", "--no-picture"],
    "kinds": ["benchmarks.speed.kinds"],
    "memory": ["benchmarks.speed.memory", "--no-picture"],
}


class Command(NamedTuple):
    """Holds a command, and the environment variables that it needs besides those of all."""

    words: list[str]
    environment: dict[str, str] | None = None


class Result(NamedTuple):
    """Says what became of a part: "ok", "failed", or "skipped" with the reason in `note`."""

    part: str
    state: str
    seconds: float
    note: str = ""


def probe() -> dict[str, Any]:
    """Asks what this machine and its Python have; an `error` where not even that could be asked."""
    command = [sys.executable, "-c", PROBE]
    run = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    try:
        return json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"missing": [], "error": run.stderr.strip()[-2000:] or f"exit code {run.returncode}"}


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    shown = {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "COLUMNS": "200"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **shown, **(extra or {})}


def architecture(capability: list[int]) -> str:
    """Names a GPU for TORCH_CUDA_ARCH_LIST, from Hopper on with the instructions of that one
    alone."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def commands(part: str, facts: dict[str, Any], out: Path, limit: float) -> list[Command]:
    """Lists what a part runs, one after the other, whether or not the one before it failed."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "--tb=short", "-ra", "-p", "no:cacheprovider"]
    several = ["-n", "4"] if facts.get("xdist") else []
    measured = ["--device", "cuda", "--out", str(out), "--budget", str(round(0.7 * limit))]
    if part == "build":
        settings = {
            "FASTDFA_CUDA": "1",
            "TORCH_CUDA_ARCH_LIST": architecture(facts["capability"]),
        }
        return [Command([python, "setup.py", "build_ext", "--inplace"], settings)]
    if part == "test":
        rest = ["-m", "not slow", *(f"--ignore={path}" for path in CUDA_TESTS), "tests"]
        return [
            Command([*pytest, *several, "--durations=10", *CUDA_TESTS]),
            Command([*pytest, *several, *rest]),
        ]
    if part == "sanitize":
        tool = sanitizer()
        return [] if tool is None else sanitizing(tool, [*pytest, "-m", "sanitize"])
    return [Command([python, "-m", *MEASURED[part], *measured])]


def sanitizer() -> str | None:
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=places)


def sanitizing(tool: str, pytest: list[str]) -> list[Command]:
    """Runs every tool over our kernels; initcheck over all, as it must see who wrote the memory."""
    text = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    ours = ["--kernel-regex", "kns=fastdfa"] if "--kernel-regex" in text else []
    options = ["--error-exitcode", str(SANITIZER_ERROR), "--print-limit", "20"]
    # PyTorch and its libraries try calls that fail; our launches are checked by the library.
    quiet = ["--report-api-errors", "no"]
    return [
        Command(
            [tool, "--tool", check, *options, *selection, *CUDA_TESTS],
            # Every tensor has an allocation of its own: what is read beside it is found.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for check, selection in (
            ("memcheck", [*quiet, *ours, *pytest]),
            ("racecheck", [*ours, *pytest]),
            ("synccheck", [*ours, *pytest]),
            ("initcheck", [*pytest, "-k", "every_kernel"]),  # no cuBLAS
        )
    ]


def run(command: Command, log: Path, seconds: float) -> int:
    """Runs a command and returns its code; after `seconds` it is killed, with all that it has
    started."""
    with log.open("a") as file:
        settings = [f"{name}={value}" for name, value in (command.environment or {}).items()]
        file.write(f"\n$ {' '.join([*settings, *command.words])}\n")
        file.flush()
        if seconds <= 0:
            file.write("no time left\n")
            return NO_TIME
        # A process group and no session of its own, which would outlive a kill of this one.
        process = subprocess.Popen(
            command.words, cwd=ROOT, env=environment(command.environment), stdout=file,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=os.setpgrp,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            file.write(f"\nkilled after {seconds:.0f} s\n")
            code = TIMED_OUT
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.write(f"exit code {code}\n")
        return code


def run_part(part: str, facts: dict[str, Any], out: Path, limit: float) -> Result:
    begin = time.monotonic()
    log = out / f"{part}.log"
    log.write_text(json.dumps(facts, indent=1) + "\n")
    reason = obstacle(part, facts)
    if reason:
        return Result(part, "failed", time.monotonic() - begin, reason)
    todo = commands(part, facts, out, limit)
    if not todo:
        return Result(part, "skipped", 0.0, "compute-sanitizer is not installed")
    codes = []
    for index, command in enumerate(todo):
        left = limit - (time.monotonic() - begin)
        # The tools of the sanitizer share the time; the tests that matter most may take all.
        share = left / (len(todo) - index) if part == "sanitize" else left
        codes.append(run(command, log, share))
    shorten(log)
    state = "failed" if any(codes) else "ok"
    words = [meaning(code) for code in codes] if any(codes) else []
    return Result(part, state, time.monotonic() - begin, ", ".join(words))


def obstacle(part: str, facts: dict[str, Any]) -> str:
    """Says why a part cannot run here, in one line; nothing if it can."""
    if "error" in facts:
        return f"python cannot say what it has: {facts['error'].splitlines()[-1]}"
    lacking = [name for name in facts["missing"] if name.split()[0] in NEEDS[part]]
    if lacking:
        return f"missing in {facts['executable']}: {', '.join(lacking)}"
    if "gpu" not in facts:
        return f"PyTorch {facts['torch']} (CUDA {facts['cuda']}) finds no GPU"
    if part != "build" and "cuda" not in facts["kernels"]:
        return f"no CUDA kernels: {facts['why_not']}"
    return ""


def meaning(code: int) -> str:
    names = {
        0: "ok",
        TIMED_OUT: "out of time",
        NO_TIME: "no time left",
        SANITIZER_ERROR: "sanitizer errors",
    }
    return names.get(code, f"exit code {code}")


def shorten(log: Path) -> None:
    """Keeps both ends of a log that has grown out of hand."""
    if log.stat().st_size > MOST_LOG_BYTES:
        content, half = log.read_bytes(), MOST_LOG_BYTES // 2
        log.write_bytes(content[:half] + b"\n... left out ...\n" + content[-half:])


def tail(log: Path, characters: int) -> str:
    return log.read_text("utf-8", errors="replace")[-characters:].partition("\n")[2].rstrip()


def store(out: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """Writes summary.json, where what earlier calls wrote of other parts stays."""
    path = out / "summary.json"
    before = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts = before | {result.part: result._asdict() for result in results}
    content = {"date": date.today().isoformat(), "machine": facts, "parts": parts}
    path.write_text(json.dumps(content, indent=1) + "\n")


def report(out: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """Prints what was measured, the ends of the logs that failed, and the summary last."""
    for result in results:
        failed, measures = result.state == "failed", result.part in MEASURED
        if failed or measures:
            print(f"\n== {result.part}: the end of {out / result.part}.log")
            print(tail(out / f"{result.part}.log", 5000 if measures else 3500))
    gpu = facts.get("gpu", "no GPU")
    print(f"\n== {gpu}, PyTorch {facts.get('torch')}, Python {facts.get('python')}; logs in {out}")
    for result in results:
        print(line(result))


def line(result: Result) -> str:
    part, state, seconds, note = result
    return f"{part:9} {state:8} {seconds:5.0f} s  {note}".rstrip()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all, in this order")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds a part ({LIMIT})")
    options = parser.parse_args(argv)
    unknown = [part for part in options.parts if part not in NEEDS]
    if unknown:
        parser.error(f"PART must be among {', '.join(NEEDS)}, got {', '.join(unknown)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    sys.stdout.reconfigure(errors="replace")  # the logs' tables, on a terminal of any encoding
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended too
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    facts = probe()
    # All is written and said part by part, as a machine that is lent may be gone at any time.
    for part in options.parts or NEEDS:
        print(f"{part}: writing {out / part}.log", flush=True)
        result = run_part(part, facts, out, options.limit)
        if part == "build" and result.state == "ok":
            facts = probe()
            note = obstacle("test", facts)
            result = result._replace(state="failed", note=note) if note else result
        results.append(result)
        store(out, facts, results)
        print(line(result), flush=True)
        if part == "build" and result.state == "failed":
            break
    report(out, facts, results)
    return int(any(result.state == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
