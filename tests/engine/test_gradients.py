"""The gradients of an MLP are those of the formulas (DESIGN section 2, contract 3, 5 and 7)."""

import random

import pytest
import torch
from helpers.formulas import ACTIVATIONS, DISTRIBUTIONS, SCALES, cross_entropy_error
from helpers.networks import (
    Apply,
    assert_close,
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
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(model, x, g, reduction="mean", tolerance=1e-10):
    step(model, x, g)
    assert_close(gradients(model), expected_gradients(model, x, g, reduction=reduction), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed, dtype):
    draw = random.Random(seed)
    depth = draw.randint(2, 6)
    widths = [draw.randint(1, 40) for _ in range(depth + 1)]
    activations = [draw.choice(list(ACTIVATIONS)) for _ in range(depth - 1)]
    biases = [draw.random() < 0.7 for _ in range(depth)]
    rule = fastdfa.Feedback(
        distribution=draw.choice(DISTRIBUTIONS),
        scale=draw.choice([*SCALES, 0.3]),
        shared=draw.random() < 0.5,
        error=draw.choice(["mean", "sum"]),
        dense=draw.choice([True, False, None]),
        seed=draw.randrange(2**63),
    )
    rows = draw.choice([(), (1,), (7,), (33,), (3, 5), (2, 3, 4)])
    model = mlp(widths, activations, biases, dtype, feedback=rule)
    x, g = randn(*rows, widths[0], seed=1, dtype=dtype), randn(*rows, widths[-1], dtype=dtype)
    check(model, x, g, rule.error, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation, dtype):
    model = mlp([5, 19, 16, 3], activation, dtype=dtype)
    check(
        model, 2 * randn(17, 5, dtype=dtype), randn(17, 3, dtype=dtype), tolerance=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("error", ["mean", "sum"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("scale", [*SCALES, 0.01, 3])
def test_rule(scale, shared, error):
    rule = fastdfa.Feedback(scale=scale, shared=shared, error=error, seed=3)
    check(mlp([4, 9, 12, 7, 3], feedback=rule), randn(6, 4), randn(6, 3), error)


@pytest.mark.parametrize("name", sorted(fastdfa.PRESETS))
def test_preset(name):
    check(mlp([4, 9, 12, 3], feedback=name), randn(6, 4), randn(6, 3), fastdfa.PRESETS[name].error)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("classes", [1, 2, 3, 8, 17, 130])
def test_classes(classes, dense):
    rule = fastdfa.Feedback(dense=dense, seed=5)
    check(mlp([4, 31, 20, classes], "relu", feedback=rule), randn(9, 4), randn(9, classes))


@pytest.mark.parametrize("rows", [(), (1,), (4,), (65,), (3, 5), (1, 1), (2, 3, 2)])
@pytest.mark.parametrize("error", ["mean", "sum"])
def test_rows(rows, error):
    rule = fastdfa.Feedback(error=error, seed=5)
    check(mlp([4, 8, 6, 3], feedback=rule), randn(*rows, 4), randn(*rows, 3), error)


def test_an_empty_batch_has_zero_gradients():
    model = mlp([4, 8, 6, 3])
    step(model, randn(0, 4), randn(0, 3))
    for name, gradient in gradients(model).items():
        assert gradient is not None and not gradient.any(), name


@pytest.mark.parametrize(
    "activation, error", [("tanh", "mean"), ("gelu", "sum"), ("Softsign", "mean")]
)
def test_deltas_that_do_not_fit_in_one_workspace(activation, error):
    """4.5 MiB a layer, six layers: they are made in groups, from the top down."""
    rule = fastdfa.Feedback(error=error, seed=5)
    names = ["tanh", activation, "tanh", "relu", activation, "tanh"]
    model = mlp([4, *[300] * 6, 3], names, feedback=rule)
    check(model, randn(2000, 4), randn(2000, 3), error)


def test_sum_counts_the_rows_of_each_backward():
    model = mlp([4, 8, 3], feedback=fastdfa.Feedback(error="sum", seed=1))
    x, g = randn(10, 4), randn(10, 3)
    for rows in (slice(0, 7), slice(7, 10)):
        model.zero_grad()
        check(model, x[rows], g[rows], "sum")


def test_only_the_feedback_is_multiplied_by_sum():
    mean, total = (
        mlp([4, 8, 3], feedback=fastdfa.Feedback(error=e, seed=1)) for e in ("mean", "sum")
    )
    total.load_state_dict(mean.state_dict())
    x, g = randn(10, 4), randn(10, 3)
    step(mean, x, g)
    step(total, x, g)
    a, b = gradients(mean), gradients(total)
    assert_close(b["1.weight"], a["1.weight"])
    assert_close(b["0.weight"], 10 * a["0.weight"])


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_cross_entropy(activation):
    model, x, target = mlp([4, 8, 6, 3], activation), randn(11, 4), torch.arange(11) % 3
    y = model(x)
    nn.functional.cross_entropy(y, target).backward()
    assert_close(gradients(model), expected_gradients(model, x, cross_entropy_error(y, target)))


def test_squared_error():
    model, x, target = mlp([4, 8, 6, 3]), randn(11, 4), randn(11, 3, seed=2)
    y = model(x)
    nn.functional.mse_loss(y, target).backward()
    assert_close(gradients(model), expected_gradients(model, x, 2 * (y - target) / y.numel()))


@pytest.mark.filterwarnings("ignore:the output is a Sigmoid")
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "silu"])
def test_an_activation_of_the_last_layer_is_differentiated_truly(activation):
    model = mlp([4, 8, 3])
    module = model.module
    module[1] = fastdfa.Linear(8, 3, activation=activation, dtype=torch.float64)
    model.activations = ["tanh", activation]
    x, g = randn(6, 4), randn(6, 3)
    step(model, x, g)
    expected = expected_gradients(model, x, g, feedback_of(model))
    assert_close(gradients(model), expected)


def test_one_layer_has_its_true_gradient():
    model, x, g = mlp([4, 3]), randn(6, 4), randn(6, 3)
    step(model, x, g)
    assert list(model.feedback_points) == []
    assert_close(gradients(model), {"0.weight": g.T @ x, "0.bias": g.sum(0)})


# Rows (contract 5) ---------------------------------------------------------------------------


def tanh_layer(n, m):
    return fastdfa.Linear(n, m, activation="tanh", dtype=torch.float64)


def head(n, m):
    return fastdfa.Linear(n, m, dtype=torch.float64)


def block_gradient(layer, x, signal):
    """Weight and bias gradient of a tanh layer that receives `signal`, by hand."""
    a = x @ layer.weight.detach().T + layer.bias.detach()
    delta = (signal * (1 - torch.tanh(a) ** 2)).flatten(0, -2)
    return delta.T @ x.flatten(0, -2), delta.sum(0)


@pytest.mark.parametrize("second", ["point", "layer"])
def test_a_point_with_more_dimensions_than_the_error_is_flattened(second):
    """A point [N, T, n] under an error [N, C] has T * n features."""
    if second == "point":
        blocks = [tanh_layer(4, 5), fastdfa.FeedbackPoint(), nn.Flatten(1), head(15, 2)]
        sizes = {"1": 15}
    else:
        mean = Apply(lambda h: h.mean(1))
        blocks = [tanh_layer(4, 5), tanh_layer(5, 6), mean, head(6, 2)]
        sizes = {"1": 15, "3": 6}
    model = fastdfa.DFA(nn.Sequential(*blocks), feedback=fastdfa.Feedback(seed=1))
    x, g = randn(7, 3, 4), randn(7, 2)
    step(model, x, g)
    B = {name: model.feedback_matrix(name) for name in model.feedback_points}
    for name, n in sizes.items():
        assert B[name].shape == (2, n)
    weight, bias = block_gradient(blocks[0], x, (g @ B["1"]).reshape(7, 3, 5))
    assert_close(blocks[0].weight.grad, weight)
    assert_close(blocks[0].bias.grad, bias)
    if second == "layer":
        h = torch.tanh(x @ blocks[0].weight.T + blocks[0].bias).detach()
        signal = (g @ B["3"]).reshape(7, 1, 6).expand(7, 3, 6) / 3
        weight, bias = block_gradient(blocks[1], h, signal)
        assert_close(blocks[1].weight.grad, weight)
        assert_close(blocks[1].bias.grad, bias)


def test_features_are_in_logical_order_whatever_the_memory_format():
    """A point [N, C, H, W] in channels_last is flattened as its shape says."""

    def images(h):
        return h.reshape(5, 2, 3, 4).to(memory_format=torch.channels_last)

    layer = tanh_layer(6, 24)
    blocks = [layer, Apply(images), fastdfa.FeedbackPoint(), nn.Flatten(1), head(24, 3)]
    model = fastdfa.DFA(nn.Sequential(*blocks), feedback=fastdfa.Feedback(seed=1))
    x, g = randn(5, 6), randn(5, 3)
    step(model, x, g)
    weight, bias = block_gradient(layer, x, g @ model.feedback_matrix("2"))
    assert_close(layer.weight.grad, weight)
    assert_close(layer.bias.grad, bias)


def test_the_layout_of_inputs_and_errors_does_not_matter():
    """Transposed inputs, broadcast errors (zero strides), and a transposed activation."""
    model = mlp([4, 8, 6, 3])
    check(model, randn(4, 9).T, randn(3, 9).T)
    model.zero_grad()
    check(model, randn(9, 8)[:, ::2], torch.full((), 0.5, dtype=torch.float64).expand(9, 3))
    model.zero_grad()
    swap = Apply(lambda h: h.T.contiguous().T)
    model.module.insert(1, swap)
    check(model, randn(9, 4), randn(9, 3))
