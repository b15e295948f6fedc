"""The benchmark of a training step: its sides compute what they are called."""

import json
import sys
from pathlib import Path

import pytest
import torch
from formulas import Layer, mlp_gradients
from networks import assert_close
from torch import nn

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import step
from step import Case

TINY = Case(2, 16, 8, "float64")


@pytest.fixture(autouse=True)
def look_again():
    """Whether BioTorch can be imported is found out once in a process."""
    step.biotorch.cache_clear()
    yield
    step.biotorch.cache_clear()


def batch(case):
    torch.manual_seed(1)
    x = torch.randn(case.batch, step.INPUTS, dtype=torch.float64)
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
    layers = [m for m in step.network(TINY, nn.Linear).double() if isinstance(m, nn.Linear)]
    feedback = torch.randn(TINY.classes, TINY.width, dtype=torch.float64)
    x, y = batch(TINY)
    loss, grads = step.Loop(layers, feedback, dtype)(x, y)
    assert loss.dtype == torch.float64 and all(g.dtype == torch.float64 for g in grads)
    found = {f"{i}": grad for i, grad in enumerate(grads)}
    assert_close(found, expected(layers, [feedback] * TINY.depth, x, y), tolerance)


@pytest.mark.parametrize("case", [TINY, TINY._replace(dtype="bfloat16", autocast=True)])
def test_every_side_has_gradients_of_its_weights(case):
    dtype = torch.float32 if case.autocast else getattr(torch, case.dtype)
    steps = step.steps_of(case, compiled=False)
    for name in ("backprop", "fastdfa"):
        steps[name]()
        assert all(p.grad.dtype == dtype for p in steps[name].parameters), name
    assert steps["limit"]()[0].dtype == getattr(torch, case.dtype)


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

    monkeypatch.setattr(step, "biotorch", lambda: wrapper)
    steps = step.steps_of(TINY, compiled=False)
    steps[step.BIOTORCH]()
    (model,) = made
    assert model.made == ("dfa", TINY.classes)
    ((targets, loss_function),) = model.calls
    assert targets is steps["backprop"].y and loss_function is nn.functional.cross_entropy
    shapes = [p.shape for p in model.parameters()]
    assert shapes == [p.shape for p in steps["backprop"].parameters]
    assert all(p.grad is not None for p in model.parameters())
    assert step.BIOTORCH not in step.steps_of(TINY._replace(autocast=True), compiled=False)


def test_without_biotorch_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "biotorch.module.biomodule", None)
    steps = step.steps_of(TINY, compiled=False)
    step.steps_of(TINY, compiled=False)
    assert step.BIOTORCH not in steps
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("BioTorch is left out: import of biotorch") == 1
    assert "pip install --no-deps biotorch" in text


def test_biotorch_is_dfa():
    """The real one, where it is installed: the side does the work that it is measured for."""
    pytest.importorskip("biotorch")
    x, y = batch(TINY)
    side = step.biotorch_step(TINY, x, y, step.biotorch())
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
    options = ["--quick", "--rounds", "2", "--no-compile", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step.py", *options])
    step.main()
    results = json.loads((tmp_path / "step-quick.json").read_text())
    assert [row["case"] for row in results["rows"]] == ["2x16 / 8", "2x16 / 8, float64"]
    for row in results["rows"]:
        assert not row["failed"] and row["peak_mib"]["fastdfa"] > 0
        assert {"PyTorch DFA loop", "fastdfa", "limit"} <= row["to_backprop"].keys()
    assert (tmp_path / "step-quick.png").stat().st_size > 1000
