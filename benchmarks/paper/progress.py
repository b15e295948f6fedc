"""Shows how far all runs of a process are, by what their epochs cost."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.harness.command import console
from benchmarks.paper.table import Config, key


def cost(config: Config) -> float:
    """Counts the multiplications of a forward pass for an image: an epoch's cost beside
    another's."""
    if config.network == "cnn":
        return 75 * 1024 * 32 + 800 * 225 * 64 + 1600 * 49 * 64 + 576 * 128
    return 3072 * config.width + 2 * config.width**2


class Bar:
    """Shows the progress over all runs of this process, with the time left; lines without a
    terminal."""

    def __init__(self, runs: list[tuple[Config, int]]) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=console, disable=not console.is_terminal, refresh_per_second=2,
            speed_estimate_period=600,
        )  # fmt: skip
        total = sum(cost(config) * config.epochs for config, _ in runs)
        self.all = self.progress.add_task("all", total=total, text="")
        self.start = time.monotonic()
        self.trained = 0.0  # cost of the epochs of this process
        self.left = total

    def skip(self, config: Config, epochs: int) -> None:
        """Takes off epochs that are done, or left to another process."""
        self.left -= cost(config) * epochs
        self.progress.update(self.all, advance=cost(config) * epochs)

    def begin(self, config: Config, seed: int, done: int) -> None:
        self.config, self.seed, self.number = config, seed, done
        self.skip(config, done)
        self.progress.update(self.all, description=key(config, seed))

    def step(self, steps: int) -> None:
        self.progress.update(self.all, advance=cost(self.config) / steps)

    def epoch(self, scores: dict[str, float]) -> None:
        self.number += 1
        self.trained += cost(self.config)
        self.left -= cost(self.config)
        hours = (time.monotonic() - self.start) / self.trained * self.left / 3600
        text = f"epoch {self.number}/{self.config.epochs}  " + "  ".join(
            f"{name} {value:.1%}" for name, value in scores.items() if name in ("train", "test")
        )
        self.progress.update(self.all, text=text)
        if not console.is_terminal:
            line = f"{key(self.config, self.seed):34} {text}  {scores['seconds']:.1f} s"
            console.print(f"{line}  {hours:.1f} h left", highlight=False, soft_wrap=True)
