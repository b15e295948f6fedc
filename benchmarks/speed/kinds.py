"""Times a training step of every kind of network, beside what DFA can gain there.

A step is forward, loss and backward, with fresh gradients on every side. *Fused backprop* is the
network of fastdfa with no cut. The *bound* counts
operations: a step of backprop has those of DFA's, and the gradients of the cut inputs. The *limit*
is measured: torch's own modules, cut by hand where fastdfa cuts, where each cut tensor receives a
gradient that lies ready. It shows what the bound does not see: activations, normalisation and
pooling, which take their time on both sides.

    python -m benchmarks.speed.kinds [--quick] [--device cuda]
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import flop_counter

import fastdfa
from benchmarks.harness.command import Budget, add_arguments, check_device, console, working
from benchmarks.harness.results import result_name, save
from benchmarks.harness.steps import AutogradStep, by_torch_mm
from benchmarks.harness.tables import OWN_PART, Cell, print_cases, speed
from benchmarks.harness.timing import (
    FUSED,
    Step,
    beside_backprop,
    interleaved,
    keep_freed_memory,
    ratios,
)
from examples.training import models
from examples.training.measure import peak_memory
from fastdfa.activations import MODULES

# Shape of a sample and number of classes: MNIST, CIFAR-10, 64 characters of Shakespeare, Cora.
SAMPLES = {
    "mlp": ((1, 28, 28), 10),
    "cnn": ((3, 32, 32), 10),
    "lenet": ((3, 32, 32), 10),
    "resnet20": ((3, 32, 32), 10),
    "transformer": ((64,), 65),
    "encoder": ((64,), 65),
    "gcn": ((2708, 1433), 7),
}
EDGES = 13_264  # entries of Cora's adjacency matrix, which is sparse
# Whose inputs are cut, in the network of torch's modules.
CUT = {
    "mlp": (nn.Linear,),
    "cnn": (nn.Conv2d, nn.Linear),
    "lenet": (nn.Conv2d, nn.Linear),
    "resnet20": (nn.Identity,),
    "transformer": (nn.Identity,),
    "encoder": (),  # cut behind blocks
    "gcn": (nn.Linear,),
}
BLOCKS = ("0", "1.layers.*")
PARTS = ("0", "1.layers.*.norm1", "1.layers.*.linear1", "1.layers.*.norm2")


class Case(NamedTuple):
    """A network of examples/training, a `lenet`, or torch's encoder, which `convert` cuts."""

    name: str
    model: str
    depth: int
    width: int
    batch: int
    activation: str = "tanh"
    blocks: tuple[str, ...] = ()  # where `convert` cuts torch's encoder


SWEEP = [
    Case("MLP 4x1024 / 256", "mlp", 4, 1024, 256),
    Case("CNN of 5x5, 3x32 / 128, activations fused", "lenet", 3, 32, 128),
    Case("CNN of make train, 2x96 / 128", "cnn", 2, 96, 128, "relu"),
    Case("ResNet-20 / 128, per block", "resnet20", 9, 16, 128, "relu"),
    Case("transformer 4x128 / 32, norm first, per block", "transformer", 4, 128, 32, "gelu"),
    Case("transformer 4x128 / 32, norm last, per block", "encoder", 4, 128, 32, "gelu", BLOCKS),
    Case("the same, three cuts a block", "encoder", 4, 128, 32, "gelu", PARTS),
    Case("GCN 2x64 / Cora", "gcn", 2, 64, 1),
    Case("GCN 4x256 / Cora", "gcn", 4, 256, 1),
]
QUICK = [SWEEP[1], SWEEP[5]]


class Encoder(nn.Sequential):
    """Torch's own transformer, as it comes: normalised behind each addition."""

    def __init__(self, case: Case, classes: int) -> None:
        layer = nn.TransformerEncoderLayer(
            case.width, case.width // 32, 4 * case.width, 0.0, case.activation, batch_first=True
        )
        encoder = nn.TransformerEncoder(layer, case.depth, enable_nested_tensor=False)
        super().__init__(nn.Embedding(classes, case.width), encoder, nn.Linear(case.width, classes))


def lenet(case: Case, classes: int) -> nn.Sequential:
    """Builds `depth` 5x5 convolutions of `width`, then 2 `width` channels, each with its
    activation, pooled to half the size and normalised; a hidden layer of 4 `width`."""
    channels = [3, case.width] + [2 * case.width] * (case.depth - 1)
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(channels):
        layers += [nn.Conv2d(n_in, n_out, 5, padding=2), MODULES[case.activation]()]
        layers += [nn.MaxPool2d(2), nn.BatchNorm2d(n_out)]
    features, hidden = channels[-1] * (32 >> case.depth) ** 2, 4 * case.width
    layers += [nn.Flatten(), nn.Linear(features, hidden), MODULES[case.activation]()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def data_of(case: Case, batch: int, device: str) -> tuple[Any, Tensor, Tensor]:
    """Returns what examples/training reads of a data set, random samples and labels."""
    shape, classes = SAMPLES[case.model]
    data = SimpleNamespace(shape=shape, classes=classes, adjacency=None)
    if case.model in ("transformer", "encoder"):
        x, y = torch.randint(classes, (2, batch, *shape))
    elif case.model == "gcn":
        places, values = torch.randint(shape[0], (2, EDGES)), torch.rand(EDGES)
        data.adjacency = torch.sparse_coo_tensor(
            places, values, (shape[0],) * 2, check_invariants=True
        ).coalesce()
        x, y = torch.randn(1, *shape), torch.randint(classes, (1, shape[0]))
    else:
        x, y = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    return data, x.to(device), y.to(device)


def network(case: Case, data: Any, dfa: bool) -> nn.Module:
    """Builds the network of torch's modules, or the same under DFA."""
    torch.manual_seed(0)
    if case.model == "encoder":
        plain = Encoder(case, data.classes)
        return fastdfa.convert(plain, blocks=list(case.blocks)) if dfa else plain
    if case.model == "lenet":
        plain = lenet(case, data.classes)
        return fastdfa.convert(plain) if dfa else plain
    config = SimpleNamespace(
        model=case.model, depth=case.depth, width=case.width, activation=case.activation,
        norm="none", dropout=0.0, input_dropout=0.0, seed=0,
    )  # fmt: skip
    made = models.build(config, data, dfa)
    return fastdfa.DFA(made) if dfa else made


def step_of(model: nn.Module, x: Tensor, y: Tensor, compiled: bool = False) -> AutogradStep:
    forward = torch.compile(model) if compiled else model
    return AutogradStep(model, lambda x: forward(x).flatten(0, -2), x, y.flatten())


class CutByHand(AutogradStep):
    """Steps a network of torch's modules, whose cut tensors receive gradients that lie ready."""

    def __init__(
        self, case: Case, plain: nn.Module, dfa: fastdfa.DFA, x: Tensor, y: Tensor
    ) -> None:
        super().__init__(plain, plain, x, y.flatten())
        self.cuts: list[Tensor] = []
        self.given: list[Tensor] = []
        behind = dfa.conversion.blocks if case.blocks else {}
        for name, module in plain.named_modules():
            if name in behind:
                module.register_forward_hook(lambda module, args, h: self.cut(h))
            elif isinstance(module, CUT[case.model]):
                module.register_forward_pre_hook(lambda module, args: self.cut(*args))

    def cut(self, h: Tensor) -> Tensor:
        if h.requires_grad:
            self.cuts.append(h)
        return h.detach()

    def __call__(self) -> None:
        self.clear()
        self.cuts = []
        loss = F.cross_entropy(self.forward(self.x).flatten(0, -2), self.y)
        self.given = self.given or [torch.randn_like(h) for h in self.cuts]
        torch.autograd.backward([loss, *self.cuts], [None, *self.given])


def steps_of(
    case: Case, compiled: bool = True, device: str = "cpu", batch: int | None = None
) -> dict[str, Step]:
    """Makes every way to make a step of this network, by name."""
    data, x, y = data_of(case, batch or case.batch, device)
    plain, by_hand, dfa, uncut = (
        network(case, data, side).to(device) for side in (False, False, True, True)
    )
    uncut.cut = ()
    steps: dict[str, Step] = {
        "backprop": step_of(plain, x, y),
        FUSED: step_of(uncut, x, y),
        "fastdfa": step_of(dfa, x, y),
        "limit": CutByHand(case, by_hand, dfa, x, y),
    }
    if device == "cpu" and any(getattr(m, "activation", None) for m in fused_linear(dfa)):
        steps["fastdfa, torch.mm"] = by_torch_mm(steps["fastdfa"])
    if compiled:
        torch._dynamo.reset()
        steps["backprop compiled"] = step_of(plain, x, y, compiled=True)
        steps["fastdfa compiled"] = step_of(dfa, x, y, compiled=True)
    return steps


def fused_linear(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, fastdfa.Linear)]


# Operations ------------------------------------------------------------------------------------


def _sparse_product(*matrices: Tensor, out_val: Tensor, **_: Any) -> int:
    """Counts a matrix product, sparse or not: two for each entry and column."""
    a, b = matrices[-2:]
    return 2 * (a._nnz() if a.is_sparse else a.numel()) * b.shape[1]


_sparse_product._get_raw = True  # of the tensors, not of their shapes


def _attention(query, key, value, *_, **__) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *_, **__) -> int:
    return flop_counter.sdpa_backward_flop_count(grad, query, key, value)


# What torch counts wrongly, as if a sparse matrix were dense, or not at all.
FORMULAS = {
    torch.ops.aten.mm: _sparse_product,
    torch.ops.aten._sparse_addmm: _sparse_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def operations(step: Step) -> int:
    """Counts floating-point operations of the matrix products and convolutions of one step."""
    with flop_counter.FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        step()
    return counter.get_total_flops()


# Measuring -------------------------------------------------------------------------------------


def measure(
    case: Case, rounds: int, seconds: float, compiled: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Measures one row: operations, milliseconds, times relative to others, memory."""
    steps, failed = working(steps_of(case, compiled, device), case.name)
    gflop = {name: operations(steps[name]) / 1e9 for name in ("backprop", "fastdfa")}
    times = interleaved(steps, rounds, seconds, device)
    return {
        "case": case.name,
        **case._asdict(),
        "gflop": gflop,
        "bound": gflop["backprop"] / gflop["fastdfa"],
        **beside_backprop(times),
        "to_limit": {n: r._asdict() for n, r in ratios(times, "limit").items()},
        "peak_mib": {
            name: round(peak_memory(steps[name], device) / 2**20, 2)
            for name in ("backprop", FUSED, "fastdfa", "limit")
            if name in steps
        },
        "failed": failed,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the speeds of all sides, the bound and the limit, and memory."""
    names = [
        "backprop compiled",
        FUSED,
        "limit",
        "fastdfa compiled",
        "fastdfa, torch.mm",
        "fastdfa",
    ]
    lines: dict[str, Cell] = {
        "backprop, ms": lambda row: f"{row['milliseconds']['backprop']['median']:.2f}",
        "bound": lambda row: f"{row['bound']:.2f}",
        **{name: partial(speed, side=name) for name in names},
        "fastdfa, of the bound": lambda row: (
            f"{1 / row['to_backprop']['fastdfa']['median'] / row['bound']:.2f}"
        ),
        "DFA's own part": partial(speed, side="fastdfa", base="to_fused"),
        "peak MiB, backprop": lambda row: f"{row['peak_mib']['backprop']:.1f}",
        "peak MiB, fastdfa": lambda row: f"{row['peak_mib']['fastdfa']:.1f}",
    }
    print_cases("Speed of a training step, eager backprop = 1", rows, lines)
    console.print(OWN_PART)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two networks, about a minute")
    add_arguments(parser, rounds=9)
    options = parser.parse_args(argv)
    check_device(options.device)
    keep_freed_memory()
    budget, rows = Budget(options.budget), []
    name = result_name("kinds", options.device, options.quick)
    seconds = options.seconds or (0.1 if options.quick else 0.3)
    for case in QUICK if options.quick else SWEEP:
        if not budget.allows(case.name):
            continue
        console.print(f"measuring {case.name} ...", style="dim")
        rows.append(measure(case, options.rounds, seconds, not options.no_compile, options.device))
        # After every case: a run that is stopped leaves what it has measured.
        path = save(name, rows, options.out, options.device, left_out=budget.left_out)
    show(rows)
    console.print(f"written: {path}")


if __name__ == "__main__":
    main()
