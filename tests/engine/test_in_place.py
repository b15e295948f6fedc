"""Changes in place are right or refused, eager and compiled (contract 8, DESIGN 5.1)."""

import pytest
import torch
from helpers.networks import (
    RULE,
    G,
    X,
    assert_close,
    expected_gradients,
    fresh,
    gradients,
    randn,
    step,
)
from torch import nn

import fastdfa


class InPlace(nn.Module):
    """Something changes the output of the first layer in place."""

    def __init__(self, change, activation):
        super().__init__()
        self.change = change
        self.first = fastdfa.Linear(5, 8, activation=activation)
        self.second = fastdfa.Linear(8, 6, activation="tanh")
        self.head = fastdfa.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.change(self.first(x))))


def mask_(h):
    h[:, ::2] = 0
    return h


CHANGES = {
    "relu_": lambda h: torch.relu_(h),
    "mul_": lambda h: h.mul_(2),
    "add_": lambda h: h.add_(1),
    "leaky_relu_": lambda h: nn.functional.leaky_relu(h, 0.3, inplace=True),
    "view": lambda h: h.view(-1, 2, 4).mul_(0.5).view(-1, 8),
    "index": mask_,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", None])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_right_or_refused(change, activation, compiled):
    torch.manual_seed(0)
    net = InPlace(CHANGES[change], activation).double()
    model = fastdfa.DFA(net, feedback=RULE)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    try:
        y = run(X)
        (y * G).sum().backward()
    except RuntimeError as error:
        assert "in-place" in str(error) or "inplace" in str(error), error
        return
    finally:
        torch._dynamo.reset()
    # The block alone, out of place.
    act = {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu, None: lambda a: a}
    a = nn.functional.linear(X, net.first.weight, net.first.bias)
    h = CHANGES[change](act[activation](a) + 0)
    B = [model.feedback_matrix(name) for name in ("second", "head")]
    (expected,) = torch.autograd.grad(h, net.first.weight, G @ B[0])
    assert_close(net.first.weight.grad, expected)
    h2 = torch.tanh(h @ net.second.weight.T + net.second.bias).detach()
    assert_close(net.second.weight.grad, (G @ B[1] * (1 - h2 * h2)).T @ h.detach())


@pytest.mark.parametrize("activation", ["tanh", None])
def test_a_change_of_what_a_layer_has_read_is_refused(activation):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(5, 8, activation=activation)
            self.second = fastdfa.Linear(8, 6, activation="tanh")
            self.head = fastdfa.Linear(6, 3)

        def forward(self, x):
            h = self.first(x)
            out = self.second(h)
            h.add_(1)
            return self.head(out)

    model = fastdfa.DFA(Late().double(), feedback=RULE)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        step(model, X, G)


class Twice(nn.Module):
    """Two layers read one tensor, which is changed in place between them."""

    def __init__(self):
        super().__init__()
        self.first = fastdfa.Linear(5, 6)
        self.second, self.third = fastdfa.Linear(6, 6), fastdfa.Linear(6, 3)

    def forward(self, x):
        h = self.first(x) * 1
        h += self.second(h)
        return self.third(h)


@pytest.mark.parametrize("streams", [False, True])
def test_a_tensor_that_is_changed_after_a_layer_has_read_it_is_another_point(streams):
    """As one point, the second layer would get no gradient."""
    model = fastdfa.DFA(Twice().double(), feedback=RULE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = fastdfa.StreamingStep(model, optimizer) if streams else lambda loss: loss()
    with pytest.raises(RuntimeError, match=r"the input of 'third' back to the input of 'second'"):
        step(lambda: (model(X) * G).sum())


def test_a_pass_that_runs_uncut_reads_what_was_changed():
    net = Twice().double()
    model = fastdfa.DFA(net, feedback=fastdfa.Feedback(seed=1, anchor=2), allow_bypass=True)
    with torch.no_grad():
        expected = net(X)
    assert_close(model(X), expected)  # an anchor
    assert_close(model(X), expected)


def test_a_change_of_the_input_after_the_forward_is_refused(model):
    x = X.clone()
    loss = (model(x) * G).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"in-?place"):
        loss.backward()


def test_a_change_of_the_output_in_place_is_right_or_refused(model):
    y = model(X)
    try:
        y.div_(2)
    except RuntimeError as error:
        assert "inplace" in str(error)
        return
    (y * G).sum().backward()
    assert_close(gradients(model), expected_gradients(model, X, G / 2))


@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5), (5,)])
def test_an_activation_in_place_where_a_layer_is_a_node_of_its_own(shape):
    """Of rows in any dimensions: under checkpointing, or a rule of feedback from layer to layer."""
    net = nn.Sequential(fastdfa.Linear(5, 8), nn.ReLU(inplace=True), fastdfa.Linear(8, 3)).double()
    model, x = fastdfa.LayerFeedback(net, "backprop" if len(shape) == 1 else "usf"), randn(*shape)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    g = randn(*y.shape)
    (y * g).sum().backward()
    a = nn.functional.linear(x, net[0].weight, net[0].bias).detach()
    b = model.feedback_matrix("2")
    delta = (g @ b * (a > 0)).reshape(-1, 8)
    assert_close(net[0].weight.grad, delta.T @ x.reshape(-1, 5))


def test_a_change_of_a_weight_between_forward_and_backward(model):
    """DFA reads no weight in backward: right, or refused as backprop refuses it."""
    expected = fresh(model)
    loss = (model(X) * G).sum()
    with torch.no_grad():
        model.module[1].weight.mul_(2)
    try:
        loss.backward()
    except RuntimeError as error:
        assert "inplace" in str(error)
    else:
        assert_close(gradients(model), expected)
