"""Keeps runs as files: claimed by one process, resumed, recorded, collected with the others."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.data import Data
from benchmarks.paper.progress import Bar
from benchmarks.paper.table import RUNS, Config, key
from benchmarks.paper.training import Diverged, Run, plain


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Says whether this process has the run; the claim ends with the process, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def finished(path: Path, config: Config) -> bool:
    """Says whether this file is the record of this configuration, not of an earlier of its name."""
    return path.exists() and json.loads(path.read_text())["config"] == plain(config)


def resume(run: Run, path: Path) -> None:
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["config"] == plain(run.config):
            run.load_state(state)


def train(config: Config, seed: int, data: Data, folder: Path, quick: bool, bar: Bar) -> None:
    """Trains a run to its end, with a checkpoint after every epoch, and writes its record."""
    run = Run(config, seed, data, quick)
    checkpoint = folder / f"{key(config, seed)}.pt"
    resume(run, checkpoint)
    bar.begin(config, seed, len(run.history))
    status = "complete"
    try:
        while len(run.history) < config.epochs:
            for steps in run.epoch():
                bar.step(steps)
            bar.epoch(run.history[-1])
            temporary = checkpoint.with_suffix(".new")
            torch.save(run.state(), temporary)
            os.replace(temporary, checkpoint)
    except Diverged:
        status = "diverged"
    write(folder / f"{key(config, seed)}.json", json.dumps(run.record(status)))
    checkpoint.unlink(missing_ok=True)


def collect(folder: Path, results: Path) -> None:
    """Puts the finished runs of a folder into the results, over those of the same name and seed."""
    runs = json.loads(results.read_text())["runs"] if results.exists() else []
    found = {(run["name"], run["seed"]): run for run in runs}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        found[run["name"], run["seed"]] = run
    order = {name: place for place, name in enumerate(RUNS)}
    kept = [run for run in found.values() if run["name"] in order]
    kept.sort(key=lambda run: (order[run["name"]], run["seed"]))
    lines = ",\n".join(json.dumps(_rounded(run)) for run in kept)  # a line for each run
    write(results, f'{{"runs": [\n{lines}\n]}}\n')


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
