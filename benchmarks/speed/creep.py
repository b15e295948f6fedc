"""Whether memory or time creep: 5,000 steps of every way to train, each in a process of its own.

    python -m benchmarks.speed.creep [--quick] [--only NAME ...]

After a warm-up the garbage collector is off. At the end a row says by how much the resident memory
has grown, how many objects there are more, how many of them only the collector can free, and how
long a step of the last fifth takes beside one of the first. A step of backprop by PyTorch alone
runs after each, and its times are divided by, as the speed of a machine drifts as well.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import fastdfa
from benchmarks.harness.command import Budget, add_arguments, check_device, console
from benchmarks.harness.results import result_name, save
from benchmarks.harness.steps import AutogradStep, autocast
from benchmarks.harness.timing import Step, keep_freed_memory
from fastdfa import signals

WIDTH, CLASSES, BATCH, DEPTH = 64, 10, 32, 4
STEPS, QUICK_STEPS = 5000, 500
# What may be lost or gained: one allocation more of glibc's arena is 132 KiB.
MIB, SLOWER = 1.0, 1.02


def layers(activation: str | None = "tanh") -> list[nn.Module]:
    hidden = [fastdfa.Linear(WIDTH, WIDTH, activation=activation) for _ in range(DEPTH)]
    return [*hidden, fastdfa.Linear(WIDTH, CLASSES)]


class Steps(nn.Module):
    """Layers that are called one after the other, each under a checkpoint where that is asked."""

    def __init__(self, parts: list[nn.Module], checkpointed: bool = False) -> None:
        super().__init__()
        self.parts, self.checkpointed = nn.ModuleList(parts), checkpointed

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            h = checkpoint(part, h, use_reentrant=False) if self.checkpointed else part(h)
        return h


def normed() -> list[nn.Module]:
    return [nn.Sequential(layer, nn.LayerNorm(WIDTH), nn.ReLU()) for layer in layers(None)[:-1]]


def blocks() -> nn.Sequential:
    inner = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)) for _ in range(2)]
    parts = [part for block in inner for part in (block, fastdfa.FeedbackPoint())]
    return nn.Sequential(*parts, nn.Linear(WIDTH, CLASSES))


def images() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), fastdfa.Conv2d(1, 8, 3, padding=1, activation="relu"),
        fastdfa.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        fastdfa.Linear(512, CLASSES),
    )  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))


def ordinary(
    network: Callable[[], nn.Module],
    forward: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = lambda model: model,
    **options: Any,
) -> Step:
    """Makes forward, loss and backward of the DFA of a network."""
    x, y = batch()
    model = fastdfa.DFA(network(), **options)
    return AutogradStep(model, forward(model), x, y)


def with_target() -> Step:
    x, y = batch()
    model = fastdfa.DFA(Steps(layers()), fastdfa.Feedback(signal="target"))
    step = AutogradStep(model, model, x, y)

    def targeted() -> None:
        model.target = y
        step()

    return targeted


def learning() -> Step:
    x, y = batch()
    model = fastdfa.DFA(Steps(layers()))
    model(x)
    model.learn_feedback()
    optimizer = SGD(model.parameters(), 1e-3)
    step = AutogradStep(model, model, x, y)

    def learn() -> None:
        step()
        optimizer.step()

    return learn


def true_gradients() -> Step:
    x, y = batch()
    model = fastdfa.DFA(Steps(layers()))
    step = AutogradStep(model, model, x, y)

    def uncut() -> None:
        with fastdfa.backprop(model):
            step()
        step()

    return uncut


def streaming(signal: str | signals.Signal) -> Step:
    x, y = batch()
    model = fastdfa.DFA(Steps(layers()), fastdfa.Feedback(signal=signal))
    step = fastdfa.StreamingStep(model, SGD(model.parameters(), 1e-3))

    def stream() -> None:
        model.target = y if model.feedback.sends.needs_target else None
        step(lambda: F.cross_entropy(model(x), y))

    return stream


def changing(change: Callable[[fastdfa.DFA, int], Callable[[], Any] | None]) -> Step:
    """Makes a step before which something of the model is changed, and maybe after it again."""
    x, y = batch()
    model = fastdfa.DFA(nn.Sequential(*layers()))
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        undo = change(model, count)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if undo is not None:
            undo()

    return step


def hooked(model: fastdfa.DFA, count: int) -> Callable[[], None]:
    """Registers a hook of every kind that does nothing, on one layer after the other."""
    layer = model.module[count % DEPTH]
    kinds = ("forward_pre", "forward", "full_backward_pre", "full_backward")
    handles = [getattr(layer, f"register_{kind}_hook")(lambda *_: None) for kind in kinds]
    handles.append(layer.weight.register_hook(lambda _: None))
    return lambda: [handle.remove() for handle in handles] and None


def replaced(model: fastdfa.DFA, count: int) -> None:
    model.module[count % DEPTH] = fastdfa.Linear(WIDTH, WIDTH, activation="tanh")


def another_rule(model: fastdfa.DFA, count: int) -> None:
    model.feedback = replace(model.feedback, scale=1.0 + count % 7, shared=count % 2 == 0)


def another_seed(model: fastdfa.DFA, count: int) -> None:
    model.seed.fill_(count)


def another_cut(model: fastdfa.DFA, count: int) -> None:
    model.cut = ("all", 2, ())[count % 3]


def frozen(model: fastdfa.DFA, count: int) -> None:
    model.module[count % DEPTH].weight.requires_grad_(count % 2 == 0)


def other_rows(model: fastdfa.DFA, count: int) -> None:
    model(torch.randn(1 + count % BATCH, WIDTH)).sum().backward()


PATHS: dict[str, Callable[[], Step]] = {
    "network": lambda: ordinary(lambda: nn.Sequential(*layers())),
    "network, norms": lambda: ordinary(lambda: nn.Sequential(*normed(), *layers()[-1:])),
    "network, cut nowhere": lambda: ordinary(lambda: nn.Sequential(*layers()), cut=()),
    "layers": lambda: ordinary(lambda: Steps(layers())),
    "layers, cut=2": lambda: ordinary(lambda: Steps(layers()), cut=2),
    "layers, norms": lambda: ordinary(lambda: Steps([*normed(), *layers()[-1:]])),
    "layers, checkpoints": lambda: ordinary(lambda: Steps(layers(), checkpointed=True)),
    "layers, autocast": lambda: ordinary(
        lambda: Steps(layers()), lambda model: autocast(model, torch.bfloat16)
    ),
    "blocks": lambda: ordinary(blocks),
    "convolutions": lambda: ordinary(images),
    "sign": lambda: ordinary(
        lambda: Steps(layers()), feedback=fastdfa.Feedback(signal="sign", error="sum")
    ),
    "target": with_target,
    "low rank": lambda: ordinary(lambda: Steps(layers()), feedback=fastdfa.Feedback(rank=2)),
    "generated B": lambda: ordinary(
        lambda: Steps(layers()), feedback=fastdfa.Feedback(dense=False, shared=False)
    ),
    "anchored": lambda: ordinary(
        lambda: nn.Sequential(*layers()), feedback=fastdfa.Feedback(anchor=10)
    ),
    "learning B": learning,
    "backprop and DFA in turn": true_gradients,
    "streaming": lambda: streaming("error"),
    "streaming in one pass": lambda: streaming(signals.Target(raw=True)),
    "hooks come and go": lambda: changing(hooked),
    "layers are replaced": lambda: changing(replaced),
    "rules are replaced": lambda: changing(another_rule),
    "seeds are written": lambda: changing(another_seed),
    "cuts are set": lambda: changing(another_cut),
    "layers are frozen": lambda: changing(frozen),
    "batches differ": lambda: changing(other_rows),
    "compiled": lambda: ordinary(lambda: nn.Sequential(*layers()), torch.compile),
    "compiled, norms": lambda: ordinary(
        lambda: nn.Sequential(*normed(), *layers()[-1:]), torch.compile
    ),
    "compiled, convolutions": lambda: ordinary(images, torch.compile),
}
WITHOUT_COMPILE = [name for name in PATHS if not name.startswith("compiled")]


def plain_step() -> Step:
    """Makes a step of backprop, to whose time others are compared."""
    x, y = batch()
    hidden = [part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))
    return AutogradStep(model, model, x, y)


def resident() -> int:
    """Returns the bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, steps: int) -> dict[str, Any]:
    """Runs a path so many times; call it in a process that has run no other."""
    torch.set_num_threads(1)
    keep_freed_memory()
    step, plain = PATHS[name](), plain_step()
    times, plain_times = (array("d", bytes(8 * steps)) for _ in range(2))

    def run(count: int) -> None:
        for number in range(count):
            start = time.perf_counter()
            step()
            middle = time.perf_counter()
            plain()
            times[number], plain_times[number] = middle - start, time.perf_counter() - middle

    run(max(steps // 10, 50))
    gc.collect()
    gc.disable()
    objects, memory = len(gc.get_objects()), resident()
    run(steps)
    grown, more = resident() - memory, len(gc.get_objects()) - objects
    return {
        "case": name,
        "steps": steps,
        "grown_mib": round(grown / 2**20, 3),
        "objects": more,
        "cyclic": gc.collect(),
        "milliseconds": round(1e3 * statistics.median(times), 4),
        "end_to_start": round(_end_to_start(times, plain_times), 4),
    }


def _end_to_start(times: array[float], plain: array[float]) -> float:
    """Returns the time of a step of the last fifth, that of the first being 1."""
    fifth = len(times) // 5
    first, last = (
        statistics.median(times[part]) / statistics.median(plain[part])
        for part in (slice(fifth), slice(-fifth, None))
    )
    return last / first


def holds(row: dict[str, Any]) -> bool:
    """Tells whether nothing creeps."""
    # Some objects more are those of a cache that fills; one a step is a leak.
    kept = row["objects"] < row["steps"] / 10
    return (
        row["grown_mib"] <= MIB
        and row["end_to_start"] <= SLOWER
        and row["cyclic"] < row["steps"] / 10
        and kept
    )


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="From the end of the warm-up to the last step")
    table.add_column("path")
    for name in ("steps", "MiB more", "objects more", "in cycles", "ms", "end / start", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = (row["steps"], row["grown_mib"], row["objects"], row["cyclic"])
        times = (f"{row['milliseconds']:.3f}", f"{row['end_to_start']:.3f}")
        table.add_row(row["case"], *map(str, numbers), *times, "" if holds(row) else "creeps")
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps of each")
    parser.add_argument("--steps", type=int, help=f"of each path ({STEPS})")
    parser.add_argument("--only", nargs="+", choices=PATHS, metavar="NAME", help="some paths")
    add_arguments(parser, rounds=1)
    options = parser.parse_args(argv)
    if options.device != "cpu":
        raise SystemExit("--device: the memory that is measured is the CPU's")
    check_device(options.device)
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    names = options.only or (WITHOUT_COMPILE if options.no_compile else PATHS)
    budget, rows = Budget(options.budget), []
    processes = multiprocessing.get_context("fork")  # this one computes nothing
    for name in names:
        if not budget.allows(name):
            continue
        console.print(f"running {name} ...", style="dim")
        with processes.Pool(1) as pool:
            rows.append(pool.apply(measure, (name, steps)))
        # After every path: a run that is stopped leaves what it has measured.
        path = save(
            result_name("creep", options.device, options.quick), rows, options.out,
            left_out=budget.left_out, creeping=[row["case"] for row in rows if not holds(row)],
        )  # fmt: skip
    show(rows)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
