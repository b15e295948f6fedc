"""Time and peak memory of a training step: fastdfa beside backprop and the bare matrix products.

A step is forward, loss and backward, with fresh gradients on every side; the optimizer, the same
for all, is left out. The limit is what no DFA step can avoid: the matrix products of the forward
pass and of the weight gradients, by bare `torch.mm` into fresh outputs.

    python benchmarks/step.py [--quick] [--device cuda]

On CUDA also with the whole step captured in a CUDA graph, which leaves launches out, and compiled
with CUDA graphs of its own (`reduce-overhead`) and with products chosen by measurement
(`max-autotune`). BioTorch (arXiv 2108.13446) is a side where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import (
    Budget,
    Step,
    add_arguments,
    check_device,
    console,
    gemm_rate,
    gpu_rates,
    interleaved,
    keep_freed_memory,
    machine,
    peak_memory,
    ratios,
    result_name,
    save,
    spread,
    working,
)
from rich.table import Table
from torch import Tensor, nn

import fastdfa
from fastdfa.ops import products as gemm

INPUTS, CLASSES = 784, 10


class Case(NamedTuple):
    """A multilayer perceptron INPUTS-width x depth-classes, tanh, and a batch.

    `autocast`: float32 weights and inputs, whose products are made in `dtype`.
    """

    depth: int
    width: int
    batch: int
    dtype: str = "float32"
    autocast: bool = False
    classes: int = CLASSES

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == "float32" else f", {self.dtype}"
        autocast = " autocast" if self.autocast else ""
        return f"{self.depth}x{self.width} / {self.batch}{dtype}{autocast}"

    @property
    def widths(self) -> list[int]:
        return [INPUTS, *[self.width] * self.depth, self.classes]

    @property
    def limit_flop(self) -> int:
        products = zip(self.widths[:-1], self.widths[1:], strict=True)
        return 2 * sum(2 * self.batch * k * n for k, n in products)


SWEEP = [
    Case(4, 128, 128),
    Case(32, 128, 64),
    Case(16, 256, 128),
    Case(32, 256, 256),
    Case(8, 512, 256),
    Case(16, 512, 256),
    Case(4, 1024, 32),
    Case(4, 1024, 128),
    Case(4, 1024, 256),
    Case(4, 1024, 512),
    Case(4, 1024, 1024),
    Case(8, 1024, 256),
    Case(2, 2048, 256),
    Case(8, 2048, 256),
    Case(4, 4096, 256),
]
# Other dtypes: autocast with float32 weights, as bfloat16 is trained in; and double precision.
DTYPES = [
    Case(32, 128, 64, "bfloat16", autocast=True),
    Case(4, 1024, 256, "bfloat16", autocast=True),
    Case(8, 2048, 256, "bfloat16", autocast=True),
    Case(4, 1024, 256, "float64"),
]
QUICK = [Case(16, 256, 128), Case(4, 1024, 512)]
# Its peak memory is a target of its own.
MEMORY = [Case(16, 512, 8192)]
# The most important first: a budget of time may end the sweep.
CUDA_SWEEP = [
    Case(8, 4096, 4096, "bfloat16"),
    Case(32, 256, 128),
    Case(8, 2048, 2048, "bfloat16"),
    Case(4, 1024, 1024, "bfloat16"),
    Case(32, 1024, 256, "bfloat16"),
    Case(8, 4096, 4096),
]
CUDA_QUICK = CUDA_SWEEP[:2]
CUDA_MEMORY = [Case(16, 512, 8192), Case(16, 2048, 16384, "bfloat16")]
GRAPHED = ["backprop", "backprop compiled", "fastdfa", "fastdfa compiled", "limit"]
MODES = ["reduce-overhead", "max-autotune"]  # of torch.compile, on CUDA
BIOTORCH = "BioTorch"
SMALL = 256  # up to here Python and autograd count, and so do gradients written round it
COLOURS = {
    BIOTORCH: "#b86b4b",
    "backprop compiled": "#9aa5b1",
    "backprop, reduce-overhead": "#b3bcc6",
    "backprop, max-autotune": "#d6dbe0",
    "backprop, graph": "#c9ced6",
    "backprop compiled, graph": "#e3e6ea",
    "PyTorch DFA loop": "#e0b050",
    "limit": "#333333",
    "fastdfa, torch.mm": "#a8d5e2",
    "fastdfa compiled": "#63b0c9",
    "fastdfa, reduce-overhead": "#4a9cb8",
    "fastdfa, max-autotune": "#2f86a5",
    "fastdfa": "#1f6f8b",
    "fastdfa, direct": "#155066",
    "fastdfa, graph": "#0d3c4c",
}


def network(case: Case, linear: type[nn.Linear]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(case.widths[:-1], case.widths[1:], strict=True):
        layers.append(linear(inputs, outputs))
        layers.append(nn.Tanh())
    return nn.Sequential(*layers[:-1])


def fused_network(case: Case, **options: Any) -> fastdfa.DFA:
    *hidden, (inputs, outputs) = zip(case.widths[:-1], case.widths[1:], strict=True)
    layers = [fastdfa.Linear(k, n, activation="tanh") for k, n in hidden]
    return fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(inputs, outputs)), **options)


class AutogradStep:
    """Forward, loss and backward into fresh gradients."""

    def __init__(self, model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor):
        self.parameters = list(model.parameters())
        self.forward, self.x, self.y = forward, x, y

    def __call__(self) -> None:
        self.clear()
        F.cross_entropy(self.forward(self.x), self.y).backward()

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def autocast(forward: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The forward pass under autocast; its result in float32, as torch's own losses take it."""

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype):
            return forward(x).float()

    return under_autocast


def graphed(step: Step) -> Step:
    """The same step captured whole in a CUDA graph, and replayed.

    Captured when first called: a step that cannot be captured must fail as it runs.
    """
    graph = torch.cuda.CUDAGraph()
    captured = False

    def replay() -> None:
        nonlocal captured
        if not captured:
            _warm_up_beside(step)
            with torch.cuda.graph(graph):
                step()
            captured = True
        graph.replay()

    return replay


def _warm_up_beside(step: Step) -> None:
    """On another stream, as capture asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def by_torch_mm(step: Step) -> Step:
    """The same step with the matrix products that backprop has, to tell apart the two gains."""

    def with_torch_mm() -> None:
        library, gemm.library = gemm.library, lambda: "torch"
        try:
            step()
        finally:
            gemm.library = library

    return with_torch_mm


class Loop:
    """DFA as one writes it by hand in PyTorch, without autograd and with nothing to spare.

    Args:
        layers: of the network, all hidden ones of one width and followed by tanh.
        feedback: B [classes, width], of all layers.
        dtype: of products and activations, where that is not the dtype of the weights.
    """

    def __init__(self, layers: list[nn.Linear], feedback: Tensor, dtype: torch.dtype):
        self.weights = [layer.weight.detach() for layer in layers]
        self.biases = [layer.bias.detach() for layer in layers]
        self.feedback, self.dtype = feedback.to(dtype), dtype

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss of inputs x [batch, features] and labels y; the gradients, as the parameters."""
        *weights, head = cast(self.weights, self.dtype)
        *biases, head_bias = cast(self.biases, self.dtype)
        hidden = list(cast([x], self.dtype))
        for weight, bias in zip(weights, biases, strict=True):
            hidden.append(torch.tanh(torch.addmm(bias, hidden[-1], weight.t())))
        (y_hat,) = cast([torch.addmm(head_bias, hidden[-1], head.t())], x.dtype)
        loss = F.cross_entropy(y_hat.requires_grad_(), y)
        (error,) = cast(torch.autograd.grad(loss, y_hat), self.dtype)
        projection = error @ self.feedback  # once: all layers share B and have one width
        grads = []
        for h, below in zip(hidden[1:], hidden[:-1], strict=True):
            delta = torch.ops.aten.tanh_backward(projection, h)
            grads += [delta.t() @ below, delta.sum(0)]
        grads += [error.t() @ hidden[-1], error.sum(0)]
        return loss.detach(), cast(grads, x.dtype)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Tensors of one dtype in another. Where they are in it, not one call is made."""
    return tensors if tensors[0].dtype == dtype else [tensor.to(dtype) for tensor in tensors]


def loop_step(case: Case, x: Tensor, y: Tensor) -> Step:
    layers = [m for m in network(case, nn.Linear).to(x) if isinstance(m, nn.Linear)]
    feedback = torch.randn(case.classes, case.width) * (case.width * case.classes) ** -0.5
    loop = Loop(layers, feedback.to(x.device), getattr(torch, case.dtype))
    return lambda: loop(x, y)


@cache
def biotorch() -> Callable[..., nn.Module] | None:
    """BioTorch's wrapper of a network, or None and one line where it cannot be imported."""
    try:
        from biotorch.module.biomodule import BioModule
    except ImportError as error:
        console.print(
            f"{BIOTORCH} is left out: {error}. To measure it: pip install --no-deps biotorch",
            style="yellow",
            markup=False,
        )
        return None
    return BioModule


def biotorch_step(case: Case, x: Tensor, y: Tensor, wrapper: Callable[..., nn.Module]) -> Step:
    """BioTorch takes targets and loss in the forward pass, and the loss is taken once more."""
    with contextlib.redirect_stdout(None):  # it prints what it converts
        model = wrapper(network(case, nn.Linear), mode="dfa", output_dim=case.classes).to(x)
    return AutogradStep(model, lambda x: model(x, y, F.cross_entropy), x, y)


def limit_step(case: Case, x: Tensor) -> Step:
    """The matrix products of forward and weight gradients, each into a fresh output."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=x.dtype, device=x.device)

    weights = [randn(n, k) for k, n in zip(case.widths[:-1], case.widths[1:], strict=True)]
    inputs = [x, *[randn(case.batch, n) for n in case.widths[1:-1]]]
    deltas = [randn(case.batch, n) for n in case.widths[1:]]

    def step() -> list[Tensor]:
        forward = [h @ w.t() for h, w in zip(inputs, weights, strict=True)]
        del forward
        return [d.t() @ h for d, h in zip(deltas, inputs, strict=True)]

    return step


def steps_of(
    case: Case, compiled: bool = True, device: str = "cpu", published: bool = True
) -> dict[str, Step]:
    """Every way to make a step of this size, by name; `published`: those of other libraries too."""
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.batch, INPUTS).to(device, torch.float32 if case.autocast else dtype)
    y = torch.randint(case.classes, (case.batch,)).to(device)
    plain, dfa = network(case, nn.Linear).to(x), fused_network(case).to(x)

    def step_of(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> Step:
        return AutogradStep(model, autocast(forward, dtype) if case.autocast else forward, x, y)

    steps: dict[str, Step] = {
        "backprop": step_of(plain, plain),
        "PyTorch DFA loop": loop_step(case, x, y),
        "fastdfa": step_of(dfa, dfa),
    }
    if case.width <= SMALL:
        direct = fused_network(case, direct_gradients=True).to(x)
        steps["fastdfa, direct"] = step_of(direct, direct)
    # Under autocast its backward pass multiplies two dtypes, an error.
    if published and not case.autocast and (wrapper := biotorch()):
        steps[BIOTORCH] = biotorch_step(case, x, y, wrapper)
    if device == "cpu":
        steps["fastdfa, torch.mm"] = by_torch_mm(step_of(dfa, dfa))
    steps["limit"] = limit_step(case, x.to(dtype))
    if compiled:
        torch._dynamo.reset()
        steps["backprop compiled"] = step_of(plain, torch.compile(plain))
        steps["fastdfa compiled"] = step_of(dfa, torch.compile(dfa))
    if compiled and device != "cpu":
        for mode in MODES:
            steps[f"backprop, {mode}"] = step_of(plain, torch.compile(plain, mode=mode))
            steps[f"fastdfa, {mode}"] = step_of(dfa, torch.compile(dfa, mode=mode))
    if device != "cpu":
        steps |= {f"{name}, graph": graphed(steps[name]) for name in GRAPHED if name in steps}
    return steps


def measure(
    case: Case, rounds: int, seconds: float, compiled: bool, device: str = "cpu"
) -> dict[str, Any]:
    """One row: milliseconds, time relative to backprop and to the limit, peak memory."""
    steps, failed = working(steps_of(case, compiled, device), case.name)
    times = interleaved(steps, rounds, seconds, device)
    milliseconds = {name: spread([1e3 * t for t in values]) for name, values in times.items()}
    bases = {"to_backprop": "backprop", "to_limit": "limit", "to_graph": "backprop, graph"}
    return {
        "case": case.name,
        **case._asdict(),
        "milliseconds": {name: value._asdict() for name, value in milliseconds.items()},
        **{
            key: {n: v._asdict() for n, v in ratios(times, base).items()}
            for key, base in bases.items()
            if base in times
        },
        "limit_gflops": case.limit_flop / milliseconds["limit"].median / 1e6,
        "peak_mib": _memory(steps, device),
        "failed": failed,
    }


def measure_memory(case: Case, device: str = "cpu") -> dict[str, Any]:
    """A row of peak memory alone."""
    peaks = _memory(steps_of(case, False, device), device)
    return {"case": case.name, **case._asdict(), "peak_mib": peaks}


def _memory(steps: dict[str, Step], device: str) -> dict[str, float]:
    """A replay allocates nothing, so graphs are left out: they hold what their capture took."""
    measured = ["backprop", "PyTorch DFA loop", "fastdfa"]
    if device != "cpu":
        measured += ["backprop compiled", "fastdfa compiled", "limit"]
    return {
        name: round(peak_memory(steps[name], device) / 2**20, 2)
        for name in measured
        if name in steps
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Times relative to backprop, with the quartiles of fastdfa; the limit; memory."""
    table = Table(title="A training step relative to eager backprop (less is faster)")
    names = [n for n in dict.fromkeys(n for r in rows for n in r["to_backprop"]) if n != "backprop"]
    by_mm = "fastdfa, torch.mm" if "fastdfa, torch.mm" in names else "fastdfa"
    table.add_column("depth x width / batch", no_wrap=True)
    columns = ["backprop ms", *names, f"limit / {by_mm}", "peak MiB, backprop, fastdfa"]
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [row["case"], f"{row['milliseconds']['backprop']['median']:.2f}"]
        for name in names:
            value = row["to_backprop"].get(name)
            if value is None:  # it failed
                cells.append("-")
                continue
            quartiles = f" ({value['low']:.2f}-{value['high']:.2f})" if name == "fastdfa" else ""
            cells.append(f"{value['median']:.2f}{quartiles}")
        cells.append(f"{1 / row['to_limit'][by_mm]['median']:.2f}")
        cells.append(f"{row['peak_mib']['backprop']:.0f}, {row['peak_mib']['fastdfa']:.0f}")
        table.add_row(*cells)
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of speed relative to eager backprop, one group a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in COLOURS if any(name in row["to_backprop"] for row in rows)]
    figure, axes = plt.subplots(figsize=(10, 0.55 * len(rows) + 1.6))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        lines = [line for line, row in enumerate(rows) if name in row["to_backprop"]]
        speed = [1 / rows[line]["to_backprop"][name]["median"] for line in lines]
        where = [line + index * height for line in lines]
        axes.barh(where, speed, height, label=name, color=COLOURS[name])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([line + 0.4 - height / 2 for line in range(len(rows))])
    axes.set_yticklabels([row["case"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("speed of a training step, eager backprop = 1")
    axes.set_ylabel("depth x width / batch")
    axes.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_memory(memory: list[dict[str, Any]]) -> None:
    for row in memory:
        peaks = ", ".join(f"{name} {mib:.0f}" for name, mib in row["peak_mib"].items())
        console.print(f"peak MiB of a step, {row['case']}: {peaks}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, about two minutes")
    parser.add_argument(
        "--again", metavar="TEXT", help="on the CPU: measure the cases with this in their names "
        "anew (where other work disturbed them), and keep the other rows of the results",
    )  # fmt: skip
    parser.add_argument("--no-picture", action="store_true", help="write the numbers alone")
    add_arguments(parser, rounds=9)
    return parser.parse_args()


def on_cpu(options: argparse.Namespace) -> None:
    keep_freed_memory()
    seconds = 0.1 if options.quick else 0.3
    rate = gemm_rate()
    kept = _measured(options) if options.again else {"rows": []}
    rows = {row["case"]: row for row in kept["rows"]}
    for case in QUICK if options.quick else SWEEP + DTYPES:
        if options.again is None or options.again in case.name:
            console.print(f"measuring {case.name} ...", style="dim")
            rows[case.name] = measure(case, options.rounds, seconds, not options.no_compile)
    memory = kept["memory"] if options.again else [measure_memory(case) for case in MEMORY]
    finish(options, list(rows.values()), memory, gemm_gflops=rate / 1e9)


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """The results of an earlier run, which must be of this machine."""
    path = options.out / f"{result_name('step', 'cpu', options.quick)}.json"
    results = json.loads(path.read_text())
    if results["machine"] != machine():
        raise SystemExit(f"--again: {path} is of another machine, version or day")
    return results


def on_cuda(options: argparse.Namespace) -> None:
    """Saves after every case, so that a run that is stopped leaves what it has measured."""
    rows: list[dict[str, Any]] = []
    budget, rates = Budget(options.budget), gpu_rates(options.rounds)
    name = result_name("step", "cuda", options.quick)
    for case in CUDA_QUICK if options.quick else CUDA_SWEEP:
        if budget.allows(case.name):
            console.print(f"measuring {case.name} ...", style="dim")
            rows.append(measure(case, options.rounds, 0.1, not options.no_compile, "cuda"))
            save(name, rows, options.out, "cuda", memory=[], rates=rates)
    memory = [measure_memory(case, "cuda") for case in CUDA_MEMORY if budget.allows(case.name)]
    finish(options, rows, memory, rates=rates, left_out=budget.left_out)


def finish(
    options: argparse.Namespace, rows: list[dict[str, Any]], memory: list[Any], **facts: Any
) -> None:
    """The tables, the file and the picture."""
    show(rows)
    show_memory(memory)
    name = result_name("step", options.device, options.quick)
    path = save(name, rows, options.out, options.device, memory=memory, **facts)
    if not options.no_picture:
        draw(rows, path.with_suffix(".png"))
    console.print(f"written: {path}")


def main() -> None:
    options = arguments()
    check_device(options.device)
    on_cpu(options) if options.device == "cpu" else on_cuda(options)


if __name__ == "__main__":
    main()
