"""Times a step of the run `fc` beside the published way to make it, and beside backprop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdfa
from benchmarks.harness.results import result_name, save
from benchmarks.harness.timing import interleaved, ratios, spread
from benchmarks.paper.data import Data
from benchmarks.paper.table import RUNS
from benchmarks.paper.training import Run


def published_way(model: fastdfa.DFA, x: Tensor, y: Tensor) -> Any:
    """Makes a step as the published code does: layers cut by detach, so that autograd makes the
    gradient of every layer's input, which nothing reads."""
    layers = [layer for layer in model.module if isinstance(layer, nn.Linear)]
    matrices = [model.feedback_matrix(name) for name in model.feedback_points]

    def step() -> None:
        model.zero_grad()
        h, outputs = x, []
        for layer in layers[:-1]:
            outputs.append(torch.tanh(F.linear(h, layer.weight, layer.bias)))
            h = outputs[-1].detach().requires_grad_()
        logits = F.linear(h, layers[-1].weight, layers[-1].bias)
        error = torch.softmax(logits.detach(), 1) - F.one_hot(y, len(logits[0]))
        feedback = error @ matrices[0]  # one for all, as all layers have one width
        for output in outputs:
            output.backward(feedback)
        F.cross_entropy(logits, y).backward()

    return step


def measure_cost(data: Data, rounds: int, out: Path) -> Path:
    """Times the step of the run `fc` with its optimizer, beside the published way and backprop."""
    config = RUNS["fc"]
    run = Run(config, 0, data, quick=False)
    x, y = run._batch(torch.arange(config.batch))
    run.model(x)  # so that the points have their names
    published = published_way(run.model, x, y)

    def ours() -> None:
        run.model.zero_grad()
        F.cross_entropy(run.model(x), y).backward()

    def backprop() -> None:
        with fastdfa.backprop(run.model):
            ours()

    def trained(step: Any) -> Any:
        def with_update() -> None:
            step()
            run.optimizer.step()

        return with_update

    check_same(run.model, ours, published)
    sides = {"published": published, "backprop": backprop, "fastdfa": ours}
    device = run.device.type
    times = interleaved({name: trained(step) for name, step in sides.items()}, rounds, 1.0, device)
    steps = len(data.train.y) // config.batch * config.epochs
    row = {
        "case": config.name,
        "to_published": {
            name: value._asdict() for name, value in ratios(times, "published").items()
        },
        "run_seconds": {name: steps * spread(values).median for name, values in times.items()},
        "steps": steps,
    }
    return save(result_name("paper-cost", device, quick=False), [row], out, device)


def check_same(model: nn.Module, ours: Any, published: Any) -> None:
    """Checks that both ways make the same gradients, or the ratio means nothing."""
    ours()
    expected = [p.grad.clone() for p in model.parameters()]
    published()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-5)
