"""Low precision on a CPU: steps under autocast, and int8 weight gradients with a scale from e.

    python -m benchmarks.speed.low_precision steps|float16|accuracy [--quick] [--data DIR]

The range of d_l = s (e B_l) * f' is known before it is made: by Cauchy-Schwarz no entry of column
j is above s max_i|e_i| |B_j|, where f' is at most 1 (tanh). So d_l could be rounded to int8 as it
is made, with no scan of it; h_l = tanh(a_l) has the range 1, and inputs that of the data set. Here
that is a prototype: forward pass and deltas in bfloat16 by the ops of this library, compiled
roundings, `torch._int_mm`.

steps: the prototype beside fastdfa. float16: autocast on a processor that has no products of it.
accuracy: of networks trained by the gradients of the prototype, beside those in float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness.command import add_arguments, console
from benchmarks.harness.results import result_name, save
from benchmarks.harness.timing import Step, interleaved, keep_freed_memory, ratios, spread
from benchmarks.speed import mlp
from examples.training.data import DataError, Dataset, load
from examples.training.measure import peak_memory
from fastdfa import ops
from fastdfa.activations import KINDS
from fastdfa.ops import products as gemm

TANH = KINDS.index("tanh")
LEVELS = 127
SIZES = [(4, 1024, 128), (4, 1024, 512), (8, 2048, 256)]
FLOAT16_SIZES = [(4, 1024, 128), (16, 256, 128), (8, 2048, 256)]
QUICK_SIZES = [(2, 64, 32)]


class Run(NamedTuple):
    """Holds a network of tanh layers and the training of it: Adam, its rate falling linearly to
    0."""

    dataset: str
    widths: list[int]
    epochs: int
    lr: float
    batch: int = 128


RUNS = [
    Run("mnist", [784, 1024, 1024, 10], 5, 1e-3),
    Run("cifar10", [3072, 1024, 1024, 1024, 10], 8, 3e-4),
]
QUICK_RUNS = [Run("digits", [64, 32, 32, 10], 4, 1e-2)]

# dW [n, k] in float32 from d [M, n], h [M, k] and their ranges: [n], by columns, and one number.
Product = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def plain(delta: Tensor, h: Tensor, bound: Tensor, most: float) -> Tensor:
    """Multiplies in the dtype of delta."""
    return ops.weight_gradients([delta], [h])[0].float()


def rounded(x: Tensor, unit: Tensor) -> Tensor:
    """Rounds to the integers nearest to x / unit, within [-LEVELS, LEVELS]."""
    return (x.float() * (1 / unit)).round().to(torch.int8)


def scaled(product: Tensor, unit: Tensor) -> Tensor:
    return product * unit


def int8(
    delta: Tensor,
    h: Tensor,
    bound: Tensor,
    most: float,
    per_unit: bool = False,
    rounded: Callable[[Tensor, Tensor], Tensor] = rounded,
    scaled: Callable[[Tensor, Tensor], Tensor] = scaled,
) -> Tensor:
    """Multiplies integers of one scale for all of d, or one for each unit: its column of B, a row
    of dW."""
    # An error of 0 has the range 0.
    unit = (bound if per_unit else bound.max()).clamp_min(1e-30) / LEVELS
    unit_h = torch.tensor(most / LEVELS)
    product = torch._int_mm(rounded(delta, unit).t(), rounded(h, unit_h))
    return scaled(product, (unit * unit_h).view(-1, 1))


def product_alone(delta: Tensor, h: Tensor, bound: Tensor, most: float) -> Tensor:
    """Does what no fused kernel can avoid: matrices that are rounded already, the result as it
    is."""
    return torch._int_mm(integers(delta.shape).t(), integers(h.shape))


@cache
def integers(shape: torch.Size) -> Tensor:
    return torch.randint(-LEVELS, LEVELS + 1, shape, dtype=torch.int8)


SCHEMES: dict[str, tuple[torch.dtype, Product]] = {
    "float32": (torch.float32, plain),
    "bfloat16": (torch.bfloat16, plain),
    "int8, one scale": (torch.bfloat16, int8),
    "int8, a scale per unit": (torch.bfloat16, partial(int8, per_unit=True)),
}


class Network:
    """Trains layers of tanh and a head by DFA through the ops of this library, without autograd.

    `most`: no entry of the inputs is above it.
    """

    def __init__(self, widths: list[int], seed: int, most: float):
        torch.manual_seed(seed)
        self.layers = [nn.Linear(k, n) for k, n in pairwise(widths)]
        self.parameters = [p for layer in self.layers for p in layer.parameters()]
        self.most, (*hidden, classes) = most, widths[1:]
        self.feedback = ops.feedback(classes, max(hidden), seed=seed)
        self.scales = [(classes * n) ** -0.5 for n in hidden]

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Returns the outputs of the hidden layers in the dtype of x, and the network's in
        float32."""
        weights = [layer.weight.to(x.dtype) for layer in self.layers]
        *biases, bias = [layer.bias for layer in self.layers]
        count = len(biases)
        hidden = ops.linear_chain(x, weights[:-1], biases, [TANH] * count, [0.0] * count)
        return hidden, F.linear(hidden[-1], weights[-1], bias.to(x.dtype)).float()

    def deltas(self, error: Tensor, layer: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns d [M, n] of a hidden layer, its sum over rows [n], and the range of its columns
        [n]."""
        scale, columns = self.scales[layer], self.feedback[:, : h.shape[1]]
        (delta,), (total,) = ops.project_gate(error, [self.feedback], [h], [TANH], [0.0], [scale])
        return delta, total, scale * error.norm(dim=1).max() * columns.norm(dim=0)

    def gradients(self, x: Tensor, y: Tensor, dtype: torch.dtype, product: Product) -> list[Tensor]:
        """Returns the gradients of all parameters, in float32: weight and bias of each layer in
        turn."""
        x = x.to(dtype)
        hidden, output = self.forward(x)
        (error,) = torch.autograd.grad(F.cross_entropy(output.requires_grad_(), y), output)
        grads = []
        for layer, (h, h_in) in enumerate(zip(hidden, [x, *hidden], strict=False)):
            delta, total, bound = self.deltas(error, layer, h)
            grads += [product(delta, h_in, bound, 1.0 if layer else self.most), total]
        return [*grads, (error.to(dtype).t() @ hidden[-1]).float(), error.sum(0)]


# Steps.


def autocast_steps(size: tuple[int, int, int], dtypes: list[str]) -> dict[str, Step]:
    """Makes steps of backprop and fastdfa, named "side, dtype"."""
    steps = {}
    for dtype in dtypes:
        case = mlp.Case(*size, dtype, autocast=dtype != "float32")
        made = mlp.steps_of(case, compiled=False, published=False)
        steps |= {f"{side}, {dtype}": made[side] for side in ("backprop", "fastdfa")}
    return steps


def int8_steps(size: tuple[int, int, int]) -> dict[str, Step]:
    """Makes the prototype; the same with products in bfloat16, and with nothing but int8
    products."""
    case = mlp.Case(*size)
    x, y = torch.randn(case.batch, mlp.INPUTS), torch.randint(case.classes, (case.batch,))
    network = Network(case.widths, 0, x.abs().max().item())
    compiled = (torch.compile(function, dynamic=False) for function in (rounded, scaled))
    products = {
        "ops, bfloat16": plain,
        "int8": partial(int8, rounded=next(compiled), scaled=next(compiled)),
        "int8, product alone": product_alone,
    }
    return {
        name: partial(network.gradients, x, y, torch.bfloat16, product)
        for name, product in products.items()
    }


def float16_steps(size: tuple[int, int, int]) -> dict[str, Step]:
    """Makes steps under autocast to float16; of fastdfa also with the products of torch in
    float16."""
    steps = autocast_steps(size, ["float32", "float16"])
    if size[1] > 1024:
        del steps["backprop, float16"]  # 40 s at 8x2048 / 256
    by_torch = mock.patch.object(gemm, "widens", lambda *matrices: False)
    return steps | {"fastdfa, float16 by torch": by_torch(steps["fastdfa, float16"].__call__)}


def measure(
    size: tuple[int, int, int], steps: dict[str, Step], rounds: int, seconds: float
) -> dict[str, Any]:
    """Measures one row: milliseconds, and time relative to fastdfa in float32."""
    times = interleaved(steps, rounds, seconds)
    return {
        "case": mlp.Case(*size).name,
        "milliseconds": {n: spread([1e3 * t for t in ts])._asdict() for n, ts in times.items()},
        "to_float32": {n: r._asdict() for n, r in ratios(times, "fastdfa, float32").items()},
    }


def measure_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    sizes = SIZES if options.part == "steps" else FLOAT16_SIZES
    for size in QUICK_SIZES if options.quick else sizes:
        if options.part == "steps":
            steps = autocast_steps(size, ["float32", "bfloat16"]) | int8_steps(size)
        else:
            steps = float16_steps(size)
        seconds = options.seconds or (0.01 if options.quick else 0.3)
        row = measure(size, steps, options.rounds, seconds)
        if options.part == "float16":
            own = {name: step for name, step in steps.items() if name.startswith("fastdfa")}
            row["peak_mib"] = {name: peak_memory(step) / 2**20 for name, step in own.items()}
        rows.append(row)
        table = Table(title=f"A step of {row['case']}")
        for column in ("", "ms", "speed, fastdfa in float32 = 1"):
            table.add_column(column)
        for name, value in row["milliseconds"].items():
            speed = 1 / row["to_float32"][name]["median"]
            table.add_row(name, f"{value['median']:.2f}", f"{speed:.2f}")
        console.print(table)
    return rows


# Accuracy.


def train(run: Run, dataset: Dataset, scheme: str, seed: int) -> tuple[float, float]:
    """Returns the test error in percent, and how far gradients are from those in float32, over some
    steps."""
    x, test_x = dataset.train_x.flatten(1), dataset.test_x.flatten(1)
    network = Network(run.widths, seed, x.abs().max().item())
    optimizer = torch.optim.Adam(network.parameters, lr=run.lr, fused=True)
    total = run.epochs * (len(x) // run.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    differences = []
    for count in range(total):
        if count % (total // run.epochs) == 0:
            batches = iter(torch.randperm(len(x)).split(run.batch))
        chosen = next(batches)
        batch = x[chosen], dataset.train_y[chosen]
        grads = network.gradients(*batch, *SCHEMES[scheme])
        if count % 50 == 0:
            differences.append(difference(grads, network.gradients(*batch, *SCHEMES["float32"])))
        for parameter, grad in zip(network.parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        schedule.step()
    wrong = network.forward(test_x)[1].argmax(1) != dataset.test_y
    return 100 * wrong.float().mean().item(), statistics.mean(differences)


def difference(grads: list[Tensor], exact: list[Tensor]) -> float:
    """Returns how far the weight gradients of hidden layers are off, relative to the norm of exact
    ones."""
    got, expected = (torch.cat([g.flatten() for g in each[:-2:2]]) for each in (grads, exact))
    return ((got - expected).norm() / expected.norm()).item()


def measure_accuracy(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for run in QUICK_RUNS if options.quick else RUNS:
        dataset = load(run.dataset, options.data)
        for scheme in SCHEMES:
            results = [train(run, dataset, scheme, seed) for seed in range(options.seeds)]
            errors, differences = zip(*results, strict=True)
            far = statistics.mean(differences)
            rows.append({**run._asdict(), "scheme": scheme, "errors": errors, "difference": far})
            listed = ", ".join(f"{error:.2f}%" for error in errors)
            console.print(f"{run.dataset}, {scheme}: {listed}; gradients {far:.1%} off")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["steps", "float16", "accuracy"])
    parser.add_argument("--quick", action="store_true", help="one small size, or digits")
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--seeds", type=int, default=2, help="training runs of each kind (2)")
    add_arguments(parser, rounds=9)
    options = parser.parse_args(argv)
    if options.device != "cpu":
        raise SystemExit(f"--device must be cpu: this measures its cores, got {options.device}")
    if options.part != "accuracy":
        keep_freed_memory()
    try:
        rows = (measure_accuracy if options.part == "accuracy" else measure_steps)(options)
    except DataError as error:
        raise SystemExit(f"low_precision: {error}") from None
    name = result_name(f"low-precision-{options.part}", "cpu", options.quick)
    console.print(f"written: {save(name, rows, options.out)}")


if __name__ == "__main__":
    main()
