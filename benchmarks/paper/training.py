"""Trains one configuration with one seed: its network, its epochs, its accuracy and cosines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdfa
from benchmarks.paper.data import Data, augmented, split
from benchmarks.paper.networks import build, hidden_layers, prealign
from benchmarks.paper.table import Config
from examples.training.measure import machine

PROBE_ROWS = 1000  # test images on which the cosines are measured; published: 128
CURVES = ("baselines", "best")  # tables whose first seed is scored after every epoch
OPTIMIZERS = {
    "sgd": lambda p, config: torch.optim.SGD(p, config.lr, fused=True),
    "momentum": lambda p, config: torch.optim.SGD(p, config.lr, momentum=0.9, fused=True),
    "adam": lambda p, config: torch.optim.Adam(p, config.lr, fused=True),
    "adamw": lambda p, config: torch.optim.AdamW(
        p, config.lr, weight_decay=config.weight_decay, fused=True
    ),
}


def precision(config: Config, device: torch.device) -> str:
    """Chooses "bfloat16" or "float32" for training: without instructions for its products a CPU
    takes 4 times as long for bfloat16 as for float32, with them 0.6 of the time."""
    if config.precision != "fast":
        return config.precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = fastdfa.build_info().get("bfloat16_products")
    return "bfloat16" if fast else "float32"


class Diverged(Exception):
    """Says that the loss is no longer finite."""


class Run:
    """Trains a configuration with a seed: holds the network and what it has reached."""

    def __init__(self, config: Config, seed: int, data: Data, quick: bool) -> None:
        self.config, self.seed = config, seed
        self.splits = split(data, config, quick)
        self.device = data.train.x.device
        # A CPU pools many channels at a time then: 5 ms a step of the CNN in place of 58.
        self.model = build(config, seed).to(self.device, memory_format=torch.channels_last)
        if config.prealigned:
            prealign(self.model, config, *self._batch(torch.arange(config.batch)))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = OPTIMIZERS[config.optimizer](trained, config)
        self.precision = precision(config, self.device)
        self.history: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**parts, "history": self.history, "config": plain(self.config)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]

    def epoch(self) -> Iterator[int]:
        """Trains for an epoch, yielding before every step how many there are.

        It is scored where curves are kept alone: an eighth of an epoch's time.
        Its randomness comes from (seed, epoch) alone, so a resumed run is the run. The last batch
        is left out if it is not full, as published.
        """
        config, x_and_y = self.config, self.splits["train"]
        number = len(self.history)
        torch.manual_seed(self.seed * 10_007 + number + 1)
        self.model.train()
        batches = torch.randperm(len(x_and_y.y)).to(self.device).split(config.batch)
        batches = [rows for rows in batches if len(rows) == config.batch]
        correct, losses = [], []
        start = time.perf_counter()
        for i, rows in enumerate(batches):
            yield len(batches)
            self._set_rate((number + i / len(batches)) / config.epochs)
            x, y = self._batch(rows)
            self.optimizer.zero_grad()
            with self._autocast():
                logits = self.model(x).float()
            loss = F.cross_entropy(logits, y)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            correct.append((logits.detach().argmax(1) == y).sum())
        finite = torch.stack(losses).isfinite().all().item()  # waits for the device
        seconds = time.perf_counter() - start
        if not finite:
            raise Diverged
        curve = self.seed == 0 and config.table in CURVES
        of = [name for name in self.splits if name != "train" and curve]
        scored = {name: self.accuracy(name) for name in of}
        running = torch.stack(correct).sum().item() / (len(batches) * config.batch)
        loss = torch.stack(losses).double().mean().item()
        self.history.append({"train": running, **scored, "loss": loss, "seconds": seconds})

    @torch.no_grad()
    def accuracy(self, name: str) -> float:
        self.model.eval()
        x, y = self.splits[name]
        found = torch.cat([self.model(self._shaped(part)).argmax(1) for part in x.split(1000)])
        return (found == y).double().mean().item()

    def record(self, status: str) -> dict[str, Any]:
        """Returns what is kept of a finished run."""
        scores = {name: self.accuracy(name) for name in self.splits}
        columns = {name: [e[name] for e in self.history] for name in (self.history or [{}])[0]}
        return {
            "name": self.config.name,
            "seed": self.seed,
            "status": status,
            "config": plain(self.config),
            "precision": self.precision,
            "accuracy": scores,
            "cosines": self.cosines() if status == "complete" else None,
            "seconds_per_epoch": median(columns["seconds"]) if columns else None,
            "machine": machine(self.device),
            "history": columns,
        }

    def cosines(self) -> dict[str, dict[str, float]] | None:
        """Measures the cosine at the output of every hidden layer, mean and deviation over test
        images."""
        if self.config.method != "dfa":
            return None
        self.model.eval()
        x, y = (part[:PROBE_ROWS] for part in self.splits["test"])
        x = self._shaped(x)
        measured = list(fastdfa.alignment(self.model, F.cross_entropy, x, y).points)
        layers = hidden_layers(self.model)
        cut = [name for name in layers if name != self._without_cut()]
        found = {
            name: {"mean": point.mean, "std": point.std}
            for name, point in zip(cut, measured, strict=True)
        }
        for name in layers.keys() - found.keys():
            found[name] = _cosine_behind(self.model, layers[name], x, y)
        return dict(sorted(found.items()))

    def _without_cut(self) -> str | None:
        if not self.config.published_cuts:
            return None
        return "1" if self.config.network == "fc" else "4"

    def _set_rate(self, progress: float) -> None:
        cosine = self.config.schedule == "cosine"
        factor = (1 + math.cos(math.pi * progress)) / 2 if cosine else 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor

    def _autocast(self) -> torch.autocast:
        """Lowers the precision of a training step; what is measured is measured in float32."""
        lowered = self.precision == "bfloat16"
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=lowered, cache_enabled=False
        )

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.splits["train"]
        return self._shaped(augmented(x[rows], self.config.augment)), y[rows]

    def _shaped(self, x: Tensor) -> Tensor:
        if self.config.network == "fc":
            return x.flatten(1)
        return x.contiguous(memory_format=torch.channels_last)


def plain(config: Config) -> dict[str, Any]:
    """Turns a configuration into what JSON gives back of it."""
    return json.loads(json.dumps(asdict(config)))


def _cosine_behind(model: nn.Module, layer: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Measures the same where no point is: from what arrives at a layer's output to the truth.

    In two passes, which agree as the model is in evaluation mode.
    """

    def gradient() -> Tensor:
        seen: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(seen.append)

        hook = layer.register_forward_hook(watch)
        try:
            F.cross_entropy(model(x), y).backward()
        finally:
            hook.remove()
            model.zero_grad()
        return seen[0].flatten(1)

    received = gradient()
    with fastdfa.backprop(model):
        cosines = F.cosine_similarity(received, gradient())
    return {"mean": cosines.mean().item(), "std": cosines.std(correction=0).item()}
