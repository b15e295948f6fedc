"""`Surrogate`: forward is f(a), whatever it is; backward multiplies by g(a), whatever that is."""

import copy
import functools
import pickle

import pytest
import torch
from helpers.formulas import ACTIVATIONS, Activation
from helpers.networks import (
    RULE,
    assert_close,
    blockwise_gradients,
    expected_gradients,
    feedback_of,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn

import fastdfa


def step_function(a):
    return a > 0  # a bool tensor: cast to the dtype of a


def window(a, width=1.0):
    return a.abs() < width


def measured(a):
    """A black box, of which autograd knows nothing."""
    return torch.from_numpy(a.detach().numpy() ** 3)


# f and g as float64 formulas.
PAIRS = {
    "sign, cos": (torch.sign, torch.cos, torch.sign, torch.cos),
    "step, window": (
        step_function,
        functools.partial(window, width=0.7),
        lambda a: torch.where(a > 0, 1.0, 0.0).to(a),
        lambda a: torch.where(a.abs() < 0.7, 1.0, 0.0).to(a),
    ),
    "black box, random": (measured, lambda a: torch.sin(9 * a), lambda a: a**3,
                          lambda a: torch.sin(9 * a)),
}  # fmt: skip
X, G = randn(9, 5), randn(9, 3)


@pytest.fixture(params=PAIRS)
def pair(request, monkeypatch):
    """A pair of f and g, of which `mlp` and the formulas know under the name "surrogate"."""
    f, g, *exact = PAIRS[request.param]
    monkeypatch.setitem(
        ACTIVATIONS, "surrogate", Activation(lambda: fastdfa.Surrogate(f, g), *exact)
    )
    return f, g


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("activation", ["surrogate", ["tanh", "surrogate"], ["surrogate", "relu"]])
def test_gradients_by_the_formula(pair, activation):
    """Also beside layers of the fused path."""
    model = mlp([5, 8, 7, 3], activation)
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G))


def test_outside_a_dfa_it_is_backprop_with_g(pair):
    layers = mlp([5, 8, 3], "surrogate").module
    h = X @ layers[0].weight.T + layers[0].bias
    f, gate = ACTIVATIONS["surrogate"].f(h), ACTIVATIONS["surrogate"].derivative(h)
    y = step(layers, X, G)
    assert_close(y, f @ layers[1].weight.T + layers[1].bias)
    delta = (G @ layers[1].weight) * gate
    assert_close(layers[0].weight.grad, delta.T @ X)
    assert_close(layers[0].bias.grad, delta.sum(0))


def test_in_a_convolution(pair):
    f, g = pair
    model = fastdfa.DFA(
        nn.Sequential(
            fastdfa.Conv2d(2, 4, 3, stride=2, activation=fastdfa.Surrogate(f, g)),
            nn.Flatten(),
            fastdfa.Linear(36, 3),
        ).double(),
        feedback=RULE,
    )
    x, error = randn(5, 2, 7, 7), randn(5, 3)
    step(model, x, error)
    convolution = model.module[0]
    a = nn.functional.conv2d(x, convolution.weight, convolution.bias, stride=2).detach()
    (matrix,) = feedback_of(model)
    delta = (error @ matrix).view(a.shape) * ACTIVATIONS["surrogate"].derivative(a)
    weight = torch.nn.grad.conv2d_weight(x, convolution.weight.shape, delta, stride=2)
    assert_close(convolution.weight.grad, weight)
    assert_close(convolution.bias.grad, delta.sum((0, 2, 3)))


@pytest.mark.usefixtures("path")
def test_with_the_derivative_as_gate_it_is_the_activation():
    def derivative(a):
        return 1 - torch.tanh(a) ** 2

    surrogate = fastdfa.Surrogate(torch.tanh, derivative)
    models = [mlp([5, 8, 3]), mlp([5, 8, 3])]
    models[1].load_state_dict(models[0].state_dict())
    models[1].module[0].activation = surrogate
    for model in models:
        step(model, X, G)
    assert_close(*map(gradients, models))


def test_where_no_gradient_is_wanted_g_is_not_called():
    calls = []
    surrogate = fastdfa.Surrogate(torch.sign, lambda a: calls.append(a) or torch.ones_like(a))
    with torch.no_grad():
        assert_close(surrogate(X), X.sign())
    surrogate(X)
    assert not calls


@pytest.mark.slow  # compiles
def test_compiled():
    model = fastdfa.DFA(
        nn.Sequential(
            fastdfa.Linear(5, 8, activation=fastdfa.Surrogate(step_function, window)),
            fastdfa.Linear(8, 3),
        ).double(),
        feedback=RULE,
    )
    step(model, X, G)
    expected = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    step(torch.compile(model, fullgraph=True), X, G)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(monkeypatch, dtype):
    """f and g see a in the low precision, and the rest is as with other activations; the inputs
    are of few bits and the weights powers of 2, so that no rounding moves a over a threshold."""
    monkeypatch.setitem(
        ACTIVATIONS,
        "surrogate",
        Activation(
            lambda: fastdfa.Surrogate(step_function, lambda a: window(a).float()),
            *PAIRS["step, window"][2:3],
            lambda a: (a.abs() < 1).to(a),
        ),
    )
    model = mlp([16, 33, 24, 3], "surrogate", dtype=torch.float32)
    for layer in model.module:
        layer.weight.data = torch.sign(layer.weight.data) / 4
        layer.bias.data.fill_(0.125)
    x, g = randn(20, 16, dtype=torch.float32).round(), randn(20, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
        loss = (y.float() * g).sum()
    loss.backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert_close(gradients(model), expected_gradients(model, x, g), 2e-2)


def test_copies_and_pickles():
    surrogate = fastdfa.Surrogate(step_function, functools.partial(window, width=0.7))
    model = mlp([5, 8, 3])
    model.module[0].activation = surrogate
    step(model, X, G)
    expected = gradients(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.zero_grad()
        step(copied, X, G)
        assert_close(gradients(copied), expected, 0.0)
    assert not list(surrogate.parameters()) and not surrogate.state_dict()


def test_under_an_activation_checkpoint(pair):
    block = mlp([5, 8, 3], "surrogate").module
    step(block, X, G)
    expected = gradients(block)
    block.zero_grad()
    y = torch.utils.checkpoint.checkpoint(block, X, use_reentrant=False)
    (y * G).sum().backward()
    assert_close(gradients(block), expected)


def test_the_alignment_is_with_the_gradient_that_g_gives(pair):
    model = mlp([5, 8, 3], "surrogate")

    def loss_fn(y, target):
        return (y * target).sum()

    weights = fastdfa.alignment(model, loss_fn, X, G, weights=True).weights
    with fastdfa.backprop(model):
        step(model, X, G)
    true = gradients(model)["0.weight"]
    model.zero_grad()
    step(model, X, G)
    fed = gradients(model)["0.weight"]
    cosine = (true * fed).sum() / true.norm() / fed.norm()
    assert abs(weights["0.weight"] - cosine.item()) < 1e-10


@pytest.mark.parametrize(
    ("f", "g", "error", "message"),
    [
        ("sign", torch.cos, TypeError, "f must be callable, got str"),
        (torch.sign, None, TypeError, "g must be callable, got NoneType"),
    ],
)
def test_functions_that_are_none(f, g, error, message):
    with pytest.raises(error, match=message):
        fastdfa.Surrogate(f, g)


@pytest.mark.parametrize(
    ("f", "g", "error", "message"),
    [
        (lambda a: 1.0, torch.cos, TypeError, "f must return a tensor, got float"),
        (torch.sign, lambda a: None, TypeError, "g must return a tensor, got NoneType"),
        (torch.sum, torch.cos, ValueError, r"f must return .* shape \(9, 8\), got \(\)"),
        (torch.sign, lambda a: a[:1], ValueError, r"g must return .* \(9, 8\), got \(1, 8\)"),
    ],
)
def test_results_that_do_not_fit(f, g, error, message):
    model = mlp([5, 8, 3])
    model.module[0].activation = fastdfa.Surrogate(f, g)
    with pytest.raises(error, match=message):
        model(X)


def test_its_representation_names_both():
    assert repr(fastdfa.Surrogate(torch.sign, window)) == "Surrogate(f=sign, g=window)"


def test_blocks_beside_it_are_as_before(pair):
    """A whole block with a surrogate in it, cut by a FeedbackPoint."""
    f, g = pair
    inner = nn.Sequential(nn.Linear(5, 8), fastdfa.Surrogate(f, g), nn.Linear(8, 6))
    model = fastdfa.DFA(
        nn.Sequential(inner, fastdfa.FeedbackPoint(), nn.Linear(6, 3)).double(), feedback=RULE
    )
    step(model, X, G)
    found = gradients(model)
    blocks = copy.deepcopy([model.module[0], model.module[2]])
    for block in blocks:
        block.zero_grad()
    expected, _ = blockwise_gradients(blocks, X, G, feedback_of(model))
    named = {f"0.{k}": v for k, v in expected[0].items()} | {
        f"2.{k}": v for k, v in expected[1].items()
    }
    assert_close(found, named)
