"""Low precision: autocast, models in bf16 and fp16, loss scaling (contract 7 and 8)."""

import copy

import pytest
import torch
from helpers.kernels import needs_bfloat16
from helpers.networks import (
    assert_close,
    difference,
    expected_gradients,
    feedback_of,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn

import fastdfa

pytestmark = pytest.mark.usefixtures("path")
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plain(model):
    """torch's own modules with the weights of `model`."""
    blocks = []
    for layer, name in zip(model.module, model.activations, strict=True):
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight, linear.bias = layer.weight, layer.bias
        act = {"tanh": nn.Tanh(), "relu": nn.ReLU(), "gelu": nn.GELU(), "Softsign": nn.Softsign()}
        blocks += [linear, act.get(name, nn.Identity())]
    return nn.Sequential(*blocks)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "Softsign"])
def test_autocast(activation, dtype, dense):
    rule = fastdfa.Feedback(seed=1, dense=dense)
    model = mlp([16, 33, 24, 3], activation, dtype=torch.float32, feedback=rule)
    x, g = randn(20, 16, dtype=torch.float32), randn(20, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y, y_plain = model(x), plain(model)(x)
        loss = (y.float() * g).sum()
    loss.backward()
    assert y.dtype == y_plain.dtype == dtype
    assert_close(y, y_plain, TOLERANCE[dtype] / 4)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert_close(gradients(model), expected_gradients(model, x, g), TOLERANCE[dtype])


def test_autocast_is_the_local_gradient_of_each_block():
    """What stands between two layers keeps its own precision (layer_norm runs in fp32)."""
    layers = [
        fastdfa.Linear(16, 24, activation="tanh"), nn.LayerNorm(24), fastdfa.Linear(24, 3)
    ]  # fmt: skip
    model = fastdfa.DFA(nn.Sequential(*layers), feedback=fastdfa.Feedback(seed=1))
    exact = copy.deepcopy(model).double()
    x, g = randn(20, 16), randn(20, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (model(x.float()).float() * g.float()).sum()
    loss.backward()
    step(exact, x, g)
    assert_close(gradients(model), gradients(exact), 2e-2)


@needs_bfloat16
@pytest.mark.parametrize("widths", [[16, 33, 3], [16, 33, 24, 3]])
def test_products_of_bfloat16_cast_neither_weights_nor_gradients(monkeypatch, widths):
    """Our own do not; torch's do."""
    model = mlp(widths, dtype=torch.float32, feedback=fastdfa.Feedback(seed=1))
    x, g = randn(20, 16, dtype=torch.float32), randn(20, 3, dtype=torch.float32)
    hidden = [layer.weight for layer in model.module[:-1]]
    for library in ("fastdfa", "torch"):
        monkeypatch.setattr(fastdfa.ops.products, "library", lambda library=library: library)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x).float() * g).sum()
        loss.backward()
        assert_close(gradients(model), expected_gradients(model, x, g), 2e-2)
        for weight in hidden:
            rounded = torch.equal(weight.grad, weight.grad.bfloat16().float())
            assert weight.grad.dtype == torch.float32 and rounded == (library == "torch")


def test_backward_inside_autocast():
    model = mlp([16, 33, 24, 3], dtype=torch.float32)
    x, g = randn(20, 16, dtype=torch.float32), randn(20, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, x, g)
    assert_close(gradients(model), expected_gradients(model, x, g), 2e-2)


def test_autocast_leaves_no_trace():
    model = mlp([16, 33, 24, 3], dtype=torch.float32)
    x, g = randn(20, 16, dtype=torch.float32), randn(20, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, x, g)
    model.zero_grad()
    assert step(model, x, g).dtype == torch.float32
    assert_close(gradients(model), expected_gradients(model, x, g), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "Softsign"])
def test_a_model_in_low_precision(activation, dtype):
    model = mlp([16, 33, 24, 3], activation).to(dtype)
    x, g = randn(20, 16, dtype=dtype), randn(20, 3, dtype=dtype)
    y = step(model, x, g)
    assert y.dtype == dtype
    assert all(p.grad.dtype == dtype for p in model.parameters())
    assert_close(gradients(model), expected_gradients(model, x, g), TOLERANCE[dtype])


def test_the_sum_of_an_fp16_error_is_not_flushed():
    """e B s is 2^-28 of the largest entries, below what fp16 holds; times 4096 rows it is not."""
    rule = fastdfa.Feedback("rademacher", scale=2.0**-10, error="sum", seed=1)
    model = mlp([2, 4, 1], ["none"], feedback=rule).half()
    x = torch.ones(4096, 2, dtype=torch.float16) / 64
    g = torch.full((4096, 1), 2.0**-18, dtype=torch.float16)
    step(model, x, g)
    expected = expected_gradients(model, x, g, reduction="sum")["0.weight"]
    assert expected.abs().max() > 2.0**-14
    assert difference(model.module[0].weight.grad, expected) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_linear_in_the_error(dtype):
    """Scaling the loss by a power of two scales every gradient exactly."""
    model = mlp([16, 33, 24, 3], dtype=dtype)
    x, g = randn(20, 16, dtype=dtype), randn(20, 3, dtype=dtype)
    step(model, x, g)
    once = gradients(model)
    model.zero_grad()
    step(model, x, 1024 * g)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, 1024 * once[name]), name


def test_grad_scaler():
    """Skips a step whose gradients overflow, and scales the others back."""
    model = mlp([16, 33, 24, 3], dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, g = randn(20, 16, dtype=torch.float32), randn(20, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = (model(x).float() * g).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_close(gradients(model), expected_gradients(model, x, g), 5e-3)
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    loss = (model(x) * g).sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_infinite_and_nan_errors_arrive():
    """Nothing turns an overflow into a finite gradient."""
    for bad in (float("inf"), float("nan")):
        model = mlp([4, 8, 3], dtype=torch.float32)
        g = randn(5, 3, dtype=torch.float32)
        g[2, 1] = bad
        step(model, randn(5, 4, dtype=torch.float32), g)
        for name, gradient in gradients(model).items():
            assert not gradient.isfinite().all(), name


def test_a_low_precision_body_under_an_fp32_head():
    """The error is fp32, the points bf16: every gradient has its parameter's dtype."""
    body = nn.Sequential(
        fastdfa.Linear(16, 33, activation="tanh"), fastdfa.Linear(33, 24, activation="tanh")
    ).to(torch.bfloat16)

    class Upcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = body, fastdfa.Linear(24, 3)

        def forward(self, x):
            return self.head(self.body(x).float())

    model = fastdfa.DFA(Upcast(), feedback=fastdfa.Feedback(seed=1))
    exact = copy.deepcopy(model).double()
    x, g = randn(20, 16, dtype=torch.bfloat16), randn(20, 3, dtype=torch.float32)
    step(model, x, g)
    exact.module.forward = lambda x: exact.module.head(exact.module.body(x))
    step(exact, x.double(), g.double())
    for p, (name, gradient) in zip(
        model.module.parameters(), gradients(model).items(), strict=True
    ):
        assert gradient.dtype == p.dtype, name
    assert_close(gradients(model), gradients(exact), 2e-2)
    assert len(feedback_of(model)) == 2
