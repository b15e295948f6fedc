"""The benchmark of a training step: its sides compute what they are called."""

import json
import sys
from functools import partial

import pytest
import torch
from helpers.formulas import Layer, mlp_gradients
from helpers.networks import assert_close
from torch import nn

pytest.importorskip("rich")

from benchmarks.harness import tables
from benchmarks.harness.figures import steps as figures
from benchmarks.harness.timing import FUSED
from benchmarks.speed import mlp, step
from benchmarks.speed.mlp import Case

TINY = Case(2, 16, 8, "float64")


@pytest.fixture(autouse=True)
def look_again():
    """Whether BioTorch can be imported is found out once in a process."""
    mlp.biotorch.cache_clear()
    yield
    mlp.biotorch.cache_clear()


def batch(case):
    torch.manual_seed(1)
    x = torch.randn(case.batch, mlp.INPUTS, dtype=torch.float64)
    return x, torch.randint(case.classes, (case.batch,))


def expected(layers, feedback, x, y):
    """The DFA gradients by the formulas, weights and biases in turn."""
    names = ["tanh"] * (len(layers) - 1) + ["none"]
    known = [
        Layer(layer.weight.detach().double(), layer.bias.detach().double(), name)
        for layer, name in zip(layers, names, strict=True)
    ]
    h = x
    for layer in known:
        a = h @ layer.weight.T + layer.bias
        h = torch.tanh(a) if layer.activation == "tanh" else a
    error = (torch.softmax(h, 1) - nn.functional.one_hot(y, h.shape[1])) / len(y)
    pairs = mlp_gradients(known, x, error, feedback)
    return {f"{i}": grad for i, grad in enumerate(g for pair in pairs for g in pair)}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.bfloat16, 2e-2)])
def test_the_loop_is_dfa(dtype, tolerance):
    """In bfloat16 its weights stay in their dtype, and so do the gradients."""
    layers = [m for m in mlp.network(TINY, nn.Linear).double() if isinstance(m, nn.Linear)]
    feedback = torch.randn(TINY.classes, TINY.width, dtype=torch.float64)
    x, y = batch(TINY)
    loss, grads = mlp.Loop(layers, feedback, dtype)(x, y)
    assert loss.dtype == torch.float64 and all(g.dtype == torch.float64 for g in grads)
    found = {f"{i}": grad for i, grad in enumerate(grads)}
    assert_close(found, expected(layers, [feedback] * TINY.depth, x, y), tolerance)


@pytest.mark.parametrize("case", [TINY, TINY._replace(dtype="bfloat16", autocast=True)])
def test_every_side_has_gradients_of_its_weights(case):
    dtype = torch.float32 if case.autocast else getattr(torch, case.dtype)
    steps = mlp.steps_of(case, compiled=False)
    for name in ("backprop", FUSED, "fastdfa"):
        steps[name]()
        assert all(p.grad.dtype == dtype for p in steps[name].parameters), name
    assert steps["limit"]()[0].dtype == getattr(torch, case.dtype)


def test_fused_backprop_has_the_gradients_of_backprop():
    steps = mlp.steps_of(TINY, compiled=False)
    pairs = zip(steps[FUSED].parameters, steps["backprop"].parameters, strict=True)
    for ours, theirs in pairs:
        ours.data.copy_(theirs)
    grads = {}
    for name in ("backprop", FUSED):
        steps[name](), steps[name]()
        grads[name] = {f"{i}": p.grad for i, p in enumerate(steps[name].parameters)}
    assert_close(grads[FUSED], grads["backprop"])


class StandIn(nn.Module):
    """Takes what BioTorch's wrapper takes, and notes it."""

    def __init__(self, module, mode, output_dim):
        super().__init__()
        self.module, self.made = module, (mode, output_dim)
        self.calls = []

    def forward(self, x, targets, loss_function):
        self.calls.append((targets, loss_function))
        return self.module(x)


def test_biotorch_is_called_as_it_asks_for(monkeypatch):
    made = []

    def wrapper(module, **options):
        made.append(StandIn(module, **options))
        return made[-1]

    monkeypatch.setattr(mlp, "biotorch", lambda: wrapper)
    steps = mlp.steps_of(TINY, compiled=False)
    steps[mlp.BIOTORCH]()
    (model,) = made
    assert model.made == ("dfa", TINY.classes)
    ((targets, loss_function),) = model.calls
    assert targets is steps["backprop"].y and loss_function is nn.functional.cross_entropy
    shapes = [p.shape for p in model.parameters()]
    assert shapes == [p.shape for p in steps["backprop"].parameters]
    assert all(p.grad is not None for p in model.parameters())
    assert mlp.BIOTORCH not in mlp.steps_of(TINY._replace(autocast=True), compiled=False)


def test_without_biotorch_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "biotorch.module.biomodule", None)
    steps = mlp.steps_of(TINY, compiled=False)
    mlp.steps_of(TINY, compiled=False)
    assert mlp.BIOTORCH not in steps
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("BioTorch is left out: import of biotorch") == 1
    assert "pip install --no-deps biotorch" in text


def test_biotorch_is_dfa():
    """The real one, where it is installed: the side does the work that it is measured for."""
    pytest.importorskip("biotorch")
    x, y = batch(TINY)
    side = mlp.biotorch_step(TINY, x, y, mlp.biotorch())
    side()
    parameters = [p for p in side.parameters if p.requires_grad]
    found = {f"{i}": p.grad for i, p in enumerate(parameters)}
    # A layer's matrix feeds the layer below: it stands for the gradient of the layer's input.
    feedback = [p.detach() for p in side.parameters if not p.requires_grad and len(p) == 10]
    layers = [LinearOf(*parameters[i : i + 2]) for i in range(0, len(parameters), 2)]
    assert_close(found, expected(layers, feedback[2::2], x, y))


class LinearOf:
    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias


def test_a_sweep_is_written_as_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "QUICK", [Case(2, 16, 8), TINY])
    monkeypatch.setattr(step, "MEMORY", [Case(2, 16, 8)])
    monkeypatch.setattr(step, "gemm_rate", partial(step.gemm_rate, 64))
    options = ["--quick", "--rounds", "2"]
    options += ["--seconds", "0.001", "--no-compile", "--out", str(tmp_path)]
    step.main(options)
    results = json.loads((tmp_path / "step-quick.json").read_text())
    assert [row["case"] for row in results["rows"]] == ["2x16 / 8", "2x16 / 8, float64"]
    for row in results["rows"]:
        assert not row["failed"] and row["peak_mib"]["fastdfa"] > 0
        assert {FUSED, "PyTorch DFA loop", "fastdfa", "limit"} <= row["to_backprop"].keys()
        assert row["to_fused"][FUSED]["median"] == 1 and row["peak_mib"][FUSED] > 0
    assert (tmp_path / "step-quick.png").stat().st_size > 1000


def result_of(*sides):
    """What step.py writes of a case, where each side takes twice the time of the next."""
    ratios = {side: {"median": 0.5**i, "low": 0.4**i, "high": 0.6**i} for i, side in sides}
    milliseconds = {side: {"median": 8 * ratio["median"]} for side, ratio in ratios.items()}
    row = {"case": "4x1024 / 512, bfloat16 autocast", "dtype": "float32", "to_backprop": ratios}
    row |= {"milliseconds": milliseconds, "to_limit": {"fastdfa, torch.mm": {"median": 1.25}}}
    row |= {"peak_mib": dict.fromkeys(["backprop", "fastdfa", "PyTorch DFA loop"], 3.0)}
    if FUSED in ratios:
        row["to_fused"] = {"fastdfa": {"median": 0.8}}
    return row


OLD = list(enumerate(["backprop", "PyTorch DFA loop", "fastdfa, torch.mm", "fastdfa"]))


def test_the_tables_of_the_readme_with_and_without_fused_backprop(monkeypatch):
    machine = dict.fromkeys(["processor", "threads", "cpu_capability", "torch", "date"], "")

    def lines(rows):
        memory = [{"case": "big", "peak_mib": rows[0]["peak_mib"]}]
        content = {"rows": rows, "machine": machine, "memory": memory}
        monkeypatch.setattr(figures, "read", lambda name: content)
        head, _, *found = [line for line in figures.step().splitlines() if line.startswith("|")]
        return head, found

    head, (old,) = lines([result_of(*OLD)])
    assert FUSED not in head and "8.00x" in old
    head, found = lines([result_of(*OLD), result_of(*OLD, (0, FUSED))])
    assert f"| {FUSED} | **fastdfa** | DFA's own part |" in head
    assert "| - | 8.00x | - |" in found[0] and "| 1.00x | 8.00x | 1.25x |" in found[1]


def test_cases_are_printed_within_80_columns(monkeypatch, capsys):
    monkeypatch.setattr(tables.console, "_width", 80)
    step.show([result_of(*OLD, (0, FUSED)) for _ in range(9)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    (first, *_) = [line.split() for line in lines if line.startswith("DFA's own part ")]
    assert first == ["DFA's", "own", "part", *["1.25"] * 4]
