"""Time of the kernels: `project_gate` beside eager and compiled PyTorch, and the filling of B.

The PyTorch versions do the same work for every layer: e B, tanh's derivative, and the sum over
rows. Where all layers share B and have one width, e B once is enough: "eager, e B once".

    python -m benchmarks.speed.kernels [--quick] [--device cuda]

On CUDA the time is that of the GPU's work, with nothing in the L2 cache, beside two ceilings that
are measured in the same rounds: a device-to-device copy that moves as many bytes as the kernel must
(where few classes leave it bound by memory), and one plain matrix product e B for all layers side
by side (where many classes leave it bound by arithmetic). Then the passes that gate and activate,
and three ways to compute an activated linear layer.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks.harness.command import Budget, add_arguments, check_device, console, working
from benchmarks.harness.rates import gpu_rates
from benchmarks.harness.results import result_name, save
from benchmarks.harness.timing import Spread, Step, interleaved, keep_freed_memory, ratios, spread
from examples.training.measure import peak_memory
from fastdfa import ops
from fastdfa.activations import KINDS
from fastdfa.ops.reference import accumulation_dtype

TANH = KINDS.index("tanh")
SCALE = 0.01


class Case(NamedTuple):
    """`layers` layers of `width` features, `rows` rows, an error of `classes` features."""

    layers: int
    width: int
    rows: int
    classes: int
    dtype: torch.dtype
    shared: bool = True
    tf32: bool = False
    dense: bool = True  # whether B is small enough to exist
    cold: bool = True  # on CUDA: the GPU's work alone; else calls that follow each other

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [f"{self.layers}x{self.width}", f"M={self.rows}", f"C={self.classes}", dtype]
        words += ["separate B"] if not self.shared else []
        words += ["tf32"] if self.tf32 else []
        words += ["with launches"] if not self.cold else []
        return ", ".join(words)

    @property
    def elements(self) -> int:
        return self.layers * self.rows * self.width

    @property
    def product_flop(self) -> int:
        """Counts the operations of e B for every layer, on its own."""
        return 2 * self.elements * self.classes

    def bytes_that_must_move(self, feedback_dtype: torch.dtype | None) -> int:
        """Counts each input read once, each output written once; None: B is generated."""
        wide = accumulation_dtype(self.dtype).itemsize
        matrices = 1 if self.shared else self.layers
        feedback = 0 if feedback_dtype is None else feedback_dtype.itemsize
        return (
            2 * self.elements * self.dtype.itemsize  # saved, delta
            + self.rows * self.classes * self.dtype.itemsize
            + matrices * self.classes * self.width * feedback
            + self.layers * self.width * wide  # bias gradients
        )


SWEEP = [
    Case(4, 1024, 512, 10, torch.float32),
    Case(4, 1024, 512, 100, torch.float32),
    Case(4, 1024, 512, 1000, torch.float32),
    Case(32, 128, 64, 10, torch.float32),
    Case(8, 4096, 256, 10, torch.float32),
    Case(1, 1024, 512, 10, torch.float32),
    Case(4, 1024, 512, 10, torch.bfloat16),
    Case(4, 1024, 512, 1000, torch.bfloat16),
    Case(4, 1024, 512, 10, torch.float64),
]
QUICK = SWEEP[:3]
# The most important first: a budget of time may end the sweep.
CUDA_SWEEP = [
    Case(8, 4096, 4096, 10, torch.bfloat16),
    Case(8, 4096, 4096, 10, torch.float32),
    Case(8, 4096, 4096, 1000, torch.bfloat16, shared=False),
    Case(8, 4096, 4096, 1000, torch.bfloat16),
    Case(8, 4096, 4096, 100, torch.bfloat16, shared=False),
    Case(8, 4096, 4096, 100, torch.bfloat16),
    Case(1, 4096, 512, 50_000, torch.bfloat16),
    Case(1, 64 * 112 * 112, 8, 1000, torch.float32, dense=False),
    Case(8, 4096, 4096, 1000, torch.float32),
    Case(8, 4096, 4096, 1000, torch.float32, tf32=True),
    Case(32, 256, 64, 10, torch.float32, cold=False),
    Case(32, 256, 64, 10, torch.bfloat16, cold=False),
    Case(8, 4096, 4096, 30, torch.bfloat16),
    Case(8, 4096, 4096, 10, torch.bfloat16, shared=False),
]
CUDA_QUICK = CUDA_SWEEP[:3]


def eager(error: Tensor, matrices: list[Tensor], saved: list[Tensor]) -> list[Any]:
    """Multiplies for each layer, by its own B or the shared one."""
    results = []
    for layer, h in enumerate(saved):
        matrix = matrices[layer if len(matrices) > 1 else 0]
        delta = torch.ops.aten.tanh_backward(error @ matrix, h)
        results += [delta, delta.sum(0)]
    return results


def eager_once(error: Tensor, matrices: list[Tensor], saved: list[Tensor]) -> list[Any]:
    """Multiplies once for all layers."""
    projection = error @ matrices[0]
    results = []
    for h in saved:
        delta = torch.ops.aten.tanh_backward(projection, h)
        results += [delta, delta.sum(0)]
    return results


class Inputs:
    """Holds the tensors of a case, and the steps that read them."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        shape = (case.rows, case.width)
        self.error = torch.randn(case.rows, case.classes, device=device).to(case.dtype)
        self.saved = [
            torch.randn(shape, device=device).tanh().to(case.dtype) for _ in range(case.layers)
        ]
        self.streams = [0] if case.shared else list(range(1, case.layers + 1))
        self.feedback_dtype = ops.feedback_dtype(torch.device(device), case.dtype, case.classes)

    @cached_property
    def feedback(self) -> list[Tensor]:
        """Is B as fastdfa keeps it."""
        case = self.case
        return [
            ops.feedback(
                case.classes, case.width, seed=1, stream=stream, dtype=self.feedback_dtype,
                device=self.device,
            )
            for stream in self.streams
        ]  # fmt: skip

    @cached_property
    def matrices(self) -> list[Tensor]:
        """Is B as PyTorch multiplies by it."""
        return [matrix.to(self.case.dtype) for matrix in self.feedback]

    def project_gate(self, feedback: list[Tensor]) -> Any:
        kinds, params, scales = [[x] * self.case.layers for x in (TANH, 0.0, SCALE)]
        return ops.project_gate(
            self.error, feedback, self.saved, kinds, params, scales, seed=1, streams=self.streams,
            allow_tf32=self.case.tf32,
        )  # fmt: skip

    def steps(self, compiled: bool) -> dict[str, Step]:
        steps: dict[str, Step] = {}
        if self.case.dense:
            steps["eager"] = lambda: eager(self.error, self.matrices, self.saved)
            best, name = (eager_once, ", e B once") if self.case.shared else (eager, "")
            if self.case.shared:
                steps[f"eager{name}"] = lambda: best(self.error, self.matrices, self.saved)
            if compiled:
                torch._dynamo.reset()
                function = torch.compile(best)
                steps[f"compiled{name}"] = lambda: function(self.error, self.matrices, self.saved)
            steps["fastdfa"] = lambda: self.project_gate(self.feedback)
        steps["fastdfa, B generated"] = lambda: self.project_gate([])
        return steps

    def ceilings(self) -> dict[str, Step]:
        """Makes a copy of as many bytes as saved and delta, and a product as large as all e B
        together."""
        case = self.case
        source = torch.ones(case.elements, device=self.device, dtype=case.dtype)
        target = torch.empty_like(source)
        steps: dict[str, Step] = {"copy": lambda: target.copy_(source)}
        if case.dense:
            wide = torch.randn(case.classes, case.layers * case.width, device=self.device)
            wide = wide.to(case.dtype)
            steps["product"] = lambda: torch.mm(self.error, wide)
        return steps


def measure(case: Case, rounds: int, seconds: float, compiled: bool = True) -> dict[str, Any]:
    times = interleaved(Inputs(case, "cpu").steps(compiled), rounds, seconds)
    return {
        "case": case.name,
        "milliseconds": {n: spread([1e3 * t for t in v])._asdict() for n, v in times.items()},
        "to_eager": {n: v._asdict() for n, v in ratios(times, "eager").items()},
    }


def measure_cuda(case: Case, rounds: int, seconds: float, compiled: bool = True) -> dict[str, Any]:
    """Measures a row with the ceilings: `of_copy` and `of_product` are fractions of their rates.

    of_product counts the operations that are done: one product where B is shared. `tflops` has
    that count and the one of a product for every layer, which a shared B does without.
    """
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    inputs = Inputs(case, "cuda")
    candidates = inputs.steps(compiled)
    steps, failed = working(candidates | inputs.ceilings(), case.name)
    times = interleaved(steps, rounds, seconds, "cuda", case.cold)
    found = [name for name in candidates if name in times]
    row = {
        "case": case.name,
        "milliseconds": {n: spread([1e3 * t for t in v])._asdict() for n, v in times.items()},
        "to_eager": _spreads(ratios(times, "eager")) if "eager" in times else {},
        "peak_mib": {n: round(peak_memory(steps[n], "cuda") / 2**20, 2) for n in found},
        "feedback_mib": sum(m.nbytes for m in inputs.feedback) / 2**20 if case.dense else 0,
        "failed": failed,
    }
    torch.set_float32_matmul_precision("highest")
    row["of_copy"] = {
        name: _fraction(times["copy"], times[name], _bytes(inputs, name) / _copied(case))._asdict()
        for name in found
        if "copy" in times and name.startswith("fastdfa")
    }
    done = 1 / case.layers if case.shared else 1.0
    row["of_product"] = {
        name: _fraction(times["product"], times[name], done)._asdict()
        for name in found
        if "product" in times and name.startswith("fastdfa")
    }
    row["tflops"] = {
        name: {
            "done": rate if name in ("eager", "product") else done * rate,
            "one product a layer": rate,
        }
        for name, values in times.items()
        if name != "copy"
        for rate in [case.product_flop / spread(values).median / 1e12]
    }
    return row


def _spreads(spreads: dict[str, Spread]) -> dict[str, Any]:
    return {name: value._asdict() for name, value in spreads.items()}


def _fraction(ceiling: list[float], mine: list[float], work: float) -> Spread:
    """Divides by the ceiling's rate, where `mine` does `work` times what the ceiling does."""
    return spread([work * c / m for c, m in zip(ceiling, mine, strict=True)])


def _bytes(inputs: Inputs, name: str) -> int:
    generated = name == "fastdfa, B generated"
    return inputs.case.bytes_that_must_move(None if generated else inputs.feedback_dtype)


def _copied(case: Case) -> int:
    return 2 * case.elements * case.dtype.itemsize


def measure_filling(rounds: int, seconds: float, device: str = "cpu") -> list[dict[str, Any]]:
    """Measures numbers a second of a dense B, beside torch's own generator."""
    out = torch.empty(1000, 4096 if device == "cpu" else 65536, device=device)
    rows = []
    for distribution in ops.DISTRIBUTIONS:
        steps: dict[str, Step] = {
            "fastdfa": lambda d=distribution: ops.fill_feedback_(out, 1, 0, d),
            "torch": out.normal_ if distribution == "normal" else out.uniform_,
        }
        times = interleaved(steps, rounds, seconds, device, cold=True)
        rate = {n: out.numel() / spread(t).median / 1e9 for n, t in times.items()}
        rows.append({"distribution": distribution, "giga_numbers_a_second": rate})
    return rows


def measure_passes(
    rounds: int, seconds: float, compiled: bool, shape: tuple[int, int] = (16384, 8192)
) -> list[dict[str, Any]]:
    """Measures `gate` and `activate_` as fractions of the rate of a copy, beside eager PyTorch."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        grad, saved = (torch.randn(shape, device="cuda").tanh().to(dtype) for _ in range(2))
        x, bias = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape[1], device="cuda")
        target, bias = torch.empty_like(x), bias.to(dtype)

        def gate(grad: Tensor = grad, saved: Tensor = saved) -> Any:
            delta = torch.ops.aten.tanh_backward(grad, saved)
            return delta, delta.sum(0)

        sides = {
            # 3 and 2 accesses of every element, where a copy makes 2.
            "gate": (1.5, gate, lambda g=grad, s=saved: ops.gate(g, s, TANH)),
            "activate_": (
                1.0,
                lambda x=x, b=bias: x.add_(b).tanh_(),
                lambda x=x, b=bias: ops.activate_(x, b, TANH),
            ),
        }
        for name, (work, plain, fused) in sides.items():
            case = f"{name} {shape[0]}x{shape[1]}, {str(dtype).removeprefix('torch.')}"
            steps: dict[str, Step] = {"eager": plain, "fastdfa": fused}
            if compiled:
                torch._dynamo.reset()
                steps["compiled"] = torch.compile(plain)
            steps["copy"] = lambda target=target, x=x: target.copy_(x)
            steps, failed = working(steps, case)
            times = interleaved(steps, rounds, seconds, "cuda", cold=True)
            rows.append({
                "case": case,
                "milliseconds": _spreads(
                    {n: spread([1e3 * t for t in v]) for n, v in times.items()}
                ),
                "of_copy": _spreads(
                    {n: _fraction(times["copy"], t, work) for n, t in times.items()}
                ),
                "failed": failed,
            })  # fmt: skip
    return rows


FORWARD = [(4096, 4096), (1024, 1024), (256, 1024)]  # rows, width


def forward_steps(
    rows: int, width: int, kind: str, dtype: torch.dtype, compiled: bool, device: str
) -> dict[str, Step]:
    """Makes the ways to compute f(x W^T + b), and the bare product."""
    x, weight = (torch.randn(n, width, device=device).to(dtype) for n in (rows, width))
    weight, bias = weight / width**0.5, torch.randn(width, device=device).to(dtype)
    activation, code = getattr(F, kind), KINDS.index(kind)

    def plain() -> Tensor:
        return activation(F.linear(x, weight, bias))

    def product() -> Tensor:
        h = x @ weight.t()
        ops.activate_(h, bias, code)
        return h

    def linear() -> Tensor:
        h = F.linear(x, weight, bias)
        ops.activate_(h, None, code)
        return h

    steps: dict[str, Step] = {
        "linear, activation": plain,
        "product, activate_": product,
        "linear, activate_": linear,
        "bare product": lambda: x @ weight.t(),
    }
    if kind == "relu":
        steps["_addmm_activation"] = lambda: torch._addmm_activation(bias, x, weight.t())
    if compiled:
        torch._dynamo.reset()
        steps["compiled"] = torch.compile(plain)
    return steps


def measure_forward(rounds: int, seconds: float, compiled: bool) -> list[dict[str, Any]]:
    """Times each way relative to the bare product: which one the forward pass should take."""
    found = []
    for rows, width in FORWARD:
        for kind in ("tanh", "relu"):
            for dtype in (torch.bfloat16, torch.float32) if rows == 4096 else (torch.bfloat16,):
                case = f"{rows}x{width}, {kind}, {str(dtype).removeprefix('torch.')}"
                steps = forward_steps(rows, width, kind, dtype, compiled, "cuda")
                steps, failed = working(steps, case)
                times = interleaved(steps, rounds, seconds, "cuda", cold=True)
                found.append({
                    "case": case,
                    "milliseconds": _spreads(
                        {n: spread([1e3 * t for t in v]) for n, v in times.items()}
                    ),
                    "to_product": _spreads(ratios(times, "bare product")),
                    "failed": failed,
                })  # fmt: skip
    return found


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="project_gate: how many times faster than eager PyTorch")
    others = ["eager, e B once", "compiled, e B once"]
    for column in ("case", "eager ms", *others, "fastdfa", "quartiles", "B generated"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        speed = {name: 1 / value["median"] for name, value in row["to_eager"].items()}
        mine = row["to_eager"]["fastdfa"]
        table.add_row(
            row["case"],
            f"{row['milliseconds']['eager']['median']:.3f}",
            *[f"{speed[name]:.2f}" if name in speed else "-" for name in others],
            f"{speed['fastdfa']:.2f}",
            f"{1 / mine['high']:.2f}-{1 / mine['low']:.2f}",
            f"{speed['fastdfa, B generated']:.2f}",
        )
    console.print(table)


def show_filling(filling: list[dict[str, Any]]) -> None:
    for row in filling:
        rate = row["giga_numbers_a_second"]
        console.print(
            f"filling B, {row['distribution']}: {rate['fastdfa']:.2f} G numbers a second "
            f"(torch {rate['torch']:.2f})"
        )


def cell(values: dict[str, Any], name: str, form: str = "{:.3f}") -> str:
    """Writes a median, or a dash where that side was not measured."""
    value = values.get(name)
    if value is None:
        return "-"
    return form.format(value["median"] if isinstance(value, dict) else value)


def show_cuda(rows: list[dict[str, Any]]) -> None:
    table = Table(title="project_gate: milliseconds, and fractions of the ceilings")
    names = ["eager", "eager, e B once", "compiled, e B once", "fastdfa", "fastdfa, B generated"]
    heads = ["case", *names, "of copy", "generated", "of product", "generated", "peak MiB", "gen."]
    for column in heads:
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in rows:
        milliseconds = dict(row["milliseconds"])
        if "compiled" in milliseconds:  # separate B: there is no e B once
            milliseconds["compiled, e B once"] = milliseconds["compiled"]
        fractions = [
            cell(row[ceiling], name) for ceiling in ("of_copy", "of_product") for name in names[-2:]
        ]
        peaks = [cell(row["peak_mib"], name, "{:.1f}") for name in names[-2:]]
        table.add_row(row["case"], *[cell(milliseconds, n) for n in names], *fractions, *peaks)
    console.print(table)


def show_list(title: str, rows: list[dict[str, Any]], ratio: str) -> None:
    """Prints milliseconds and one ratio of every side of every row."""
    console.print(title, style="bold")
    for row in rows:
        sides = [
            f"{name} {value['median']:.4f} ({row[ratio][name]['median']:.3f})"
            for name, value in row["milliseconds"].items()
        ]
        console.print(f"  {row['case']}: {', '.join(sides)}", markup=False)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three sizes")
    add_arguments(parser, rounds=15)
    return parser.parse_args(argv)


def on_cpu(options: argparse.Namespace) -> None:
    keep_freed_memory()
    compiled = not options.no_compile
    cases = QUICK if options.quick else SWEEP
    seconds = options.seconds or 0.05
    rows = [measure(c, options.rounds, seconds, compiled) for c in cases]
    filling = measure_filling(options.rounds, seconds)
    show(rows)
    show_filling(filling)
    name = result_name("kernels", "cpu", options.quick)
    console.print(f"written: {save(name, rows, options.out, filling=filling)}")


def on_cuda(options: argparse.Namespace) -> None:
    """Saves after every case, so that a run that is stopped leaves what it has measured."""
    compiled, rounds, budget = not options.no_compile, options.rounds, Budget(options.budget)
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"rates": gpu_rates(rounds)}

    def store() -> Any:
        name = result_name("kernels", "cuda", options.quick)
        facts["left_out"] = budget.left_out
        return save(name, rows, options.out, "cuda", **facts)

    for case in CUDA_QUICK if options.quick else CUDA_SWEEP:
        if budget.allows(case.name):
            console.print(f"measuring {case.name} ...", style="dim")
            rows.append(measure_cuda(case, rounds, options.seconds or 0.05, compiled))
            store()
    facts["filling"] = measure_filling(rounds, 0.02, "cuda")
    facts["passes"] = measure_passes(rounds, 0.02, compiled) if budget.allows("passes") else []
    store()
    facts["forward"] = measure_forward(rounds, 0.02, compiled) if budget.allows("forward") else []
    path = store()
    console.print({key: value for key, value in facts["rates"].items()})
    show_list("passes: milliseconds (fraction of the rate of a copy)", facts["passes"], "of_copy")
    show_list("forward: milliseconds (to the bare product)", facts["forward"], "to_product")
    show_filling(facts["filling"])
    show_cuda(rows)
    console.print(f"written: {path}")


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    check_device(options.device)
    on_cpu(options) if options.device == "cpu" else on_cuda(options)


if __name__ == "__main__":
    main()
