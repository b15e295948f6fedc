"""A DFA model computes what the plain PyTorch model computes; its layers are nn.Linear
(DESIGN section 4, contract 1)."""

import pytest
import torch
from helpers.formulas import ACTIVATIONS
from helpers.networks import assert_close, gradients, mlp, randn
from torch import nn

import fastdfa

PLAIN = {
    "none": nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid, "elu": nn.ELU, "softplus": nn.Softplus, "gelu": nn.GELU, "silu": nn.SiLU,
}  # fmt: skip


def plain_activation(name):
    return PLAIN[name]() if name in PLAIN else ACTIVATIONS[name].argument()


def plain_mlp(model):
    """The same network of torch's own modules, with the same weights (shared, not copied)."""
    blocks = []
    for layer, name in zip(model.module, model.activations, strict=True):
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight, linear.bias = layer.weight, layer.bias
        blocks += [linear, plain_activation(name)]
    return nn.Sequential(*blocks)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_equal_the_plain_model(activation, dtype, tolerance):
    model = mlp([4, 33, 16, 3], activation, [True, False, True], dtype)
    x = 3 * randn(9, 4, dtype=dtype)
    expected = plain_mlp(model)(x)
    assert_close(model(x), expected, tolerance)
    with torch.no_grad():
        assert_close(model(x), expected, tolerance)
    with torch.inference_mode():
        assert_close(model(x), expected, tolerance)
    assert_close(model.eval()(x), expected, tolerance)
    assert model(x).dtype == dtype


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "gelu", "silu", "softplus"])
def test_special_values(activation):
    """Zero, huge, infinite and NaN pre-activations, forward and derivative."""
    model = mlp([1, 6, 1], activation)
    layer = model.module[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.0, -800, 800, float("inf"), float("-inf"), float("nan")]))
    a = layer.bias.detach().clone().requires_grad_()
    h = plain_activation(activation)(a)
    out = layer(torch.ones(1, 1, dtype=torch.float64))
    torch.testing.assert_close(out[0], h, equal_nan=True, rtol=1e-12, atol=1e-300)
    model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    h.backward(model.feedback_matrix("1")[0])
    torch.testing.assert_close(layer.bias.grad[:3], a.grad[:3], rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_nn_linear(bias):
    torch.manual_seed(7)
    ours = fastdfa.Linear(5, 3, bias, dtype=torch.float64, activation="relu")
    torch.manual_seed(7)
    theirs = nn.Linear(5, 3, bias, dtype=torch.float64)
    assert isinstance(ours, nn.Linear)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert "relu" in repr(ours).lower()


def test_linear_accepts_the_arguments_of_nn_linear():
    layer = fastdfa.Linear(
        in_features=5, out_features=3, bias=False, device="meta", dtype=torch.half
    )
    assert layer.weight.is_meta and layer.weight.dtype == torch.half
    with pytest.raises(TypeError):
        fastdfa.Linear(5, 3, True, None, None, "relu")  # activation is a keyword


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outside_a_dfa_layers_train_by_backprop(activation):
    model = mlp([4, 7, 6, 3], activation)
    x, x_plain = randn(9, 4).requires_grad_(), randn(9, 4).requires_grad_()
    model.module(x).square().sum().backward()
    actual = gradients(model)
    model.zero_grad()
    plain_mlp(model)(x_plain).square().sum().backward()
    assert_close(actual, gradients(model))
    assert_close(x.grad, x_plain.grad)


def test_an_activation_with_parameters_is_trained():
    """PReLU inside a layer: its slope gets the local gradient of its block."""
    layer = fastdfa.Linear(4, 8, activation=nn.PReLU(dtype=torch.float64), dtype=torch.float64)
    head = fastdfa.Linear(8, 3, dtype=torch.float64)
    model = fastdfa.DFA(nn.Sequential(layer, head), feedback=fastdfa.Feedback(seed=1))
    x, g = randn(6, 4), randn(6, 3)
    (model(x) * g).sum().backward()
    (slope,) = (p for n, p in model.named_parameters() if "activation" in n)
    a = (x @ layer.weight.T + layer.bias).detach()
    signal = g @ model.feedback_matrix("1")
    assert_close(slope.grad, (signal * a.clamp(max=0)).sum().reshape(1))


def test_a_subclass_of_a_known_activation_is_called_as_it_is():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    layer = fastdfa.Linear(4, 8, activation=Shifted(), dtype=torch.float64)
    x = randn(6, 4)
    assert_close(layer(x), (x @ layer.weight.T + layer.bias).clamp(min=0) + 1)


def test_hooks_of_an_activation_run():
    activation = nn.Tanh()
    activation.register_forward_hook(lambda module, args, output: 2 * output)
    layer = fastdfa.Linear(4, 8, activation=activation, dtype=torch.float64)
    model = fastdfa.DFA(nn.Sequential(layer, fastdfa.Linear(8, 3, dtype=torch.float64)))
    x, g = randn(6, 4), randn(6, 3)
    a = x @ layer.weight.T + layer.bias
    assert_close(layer(x), 2 * torch.tanh(a))
    (model(x) * g).sum().backward()
    delta = g @ model.feedback_matrix("1") * 2 * (1 - torch.tanh(a) ** 2)
    assert_close(layer.weight.grad, delta.T @ x)


def test_shapes_on_the_meta_device():
    """As models too large to allocate are inspected."""
    model = mlp([4, 8, 3]).to("meta")
    x = randn(6, 4).to("meta")
    y = model(x)
    assert y.is_meta and y.shape == (6, 3)
    y.sum().backward()
    assert model.module[0].weight.grad.shape == (8, 4)


def test_a_model_made_on_the_meta_device_is_filled_by_a_checkpoint():
    source = mlp([4, 8, 3], feedback=fastdfa.Feedback(seed=3))
    with torch.device("meta"):
        model = mlp([4, 8, 3], feedback=fastdfa.Feedback(seed=4))
    model = model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    x = randn(6, 4)
    for m in (model, source):
        m(x).square().sum().backward()
    assert_close(gradients(model), gradients(source), 0)


def test_wrapping_keeps_the_module_and_its_checkpoints():
    model = mlp([4, 8, 3])
    plain = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)).double()
    model.module.load_state_dict(plain.state_dict())
    assert torch.equal(model.module[0].weight, plain[0].weight)
    plain.load_state_dict(model.module.state_dict())
