"""No parameter receives a contribution of backprop across a cut, and ways round a cut are named
(contract 4 and 10)."""

import warnings

import pytest
import torch
from helpers.networks import (
    RULE,
    Apply,
    assert_close,
    expected_gradients,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn

import fastdfa


def linear(n, m, activation="tanh"):
    return fastdfa.Linear(n, m, activation=activation)


class Residual(nn.Module):
    """h + L(h), with or without the point after the add."""

    def __init__(self, n, point):
        super().__init__()
        self.norm = nn.LayerNorm(n)
        self.inner = linear(n, n)
        self.point = fastdfa.FeedbackPoint() if point else nn.Identity()

    def forward(self, h):
        return self.point(h + self.inner(self.norm(h)))


class Attention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.q, self.k, self.v = (linear(n, n, None) for _ in range(3))

    def forward(self, h):
        return torch.softmax(self.q(h) @ self.k(h).mT, -1) @ self.v(h)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output + 0)
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return layer


def local(n):
    """A block of plain layers that ends in a point: trained by backprop inside, cut outside."""
    return nn.Sequential(nn.Linear(n, n), nn.BatchNorm1d(n), nn.Tanh(), nn.Linear(n, n), nn.ReLU())


# Every block ends where the next one begins with a cut.
NETWORKS = {
    "fused": lambda: [linear(5, 8), linear(8, 6), linear(6, 7), linear(7, 3, None)],
    "relu": lambda: [linear(5, 8, "relu"), linear(8, 6, "gelu"), linear(6, 3, None)],
    "modules": lambda: [
        nn.Sequential(linear(5, 8, None), nn.Tanh(), nn.LayerNorm(8)),
        nn.Sequential(linear(8, 6, None), nn.BatchNorm1d(6), nn.ReLU(inplace=True)),
        linear(6, 3, None),
    ],
    "hooks": lambda: [hooked(linear(5, 8)), hooked(linear(8, 6)), linear(6, 3, None)],
    "unknown": lambda: [linear(5, 8, nn.Softsign()), linear(8, 6, nn.Mish()), linear(6, 3, None)],
    "local": lambda: [
        nn.Sequential(nn.Linear(5, 8), local(8), fastdfa.FeedbackPoint()),
        nn.Sequential(local(8), fastdfa.FeedbackPoint()),
        nn.Linear(8, 3),
    ],
    "residual": lambda: [
        nn.Sequential(linear(5, 8), fastdfa.FeedbackPoint()),
        Residual(8, True),
        Residual(8, True),
        nn.Linear(8, 3),
    ],
    "attention": lambda: [linear(5, 8), Attention(8), linear(8, 8), linear(8, 3, None)],
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("network", NETWORKS)
def test_later_weights_do_not_matter(network):
    """The loss is linear in the output, so its error does not depend on any weight: whatever is
    done to the weights after a point, the gradients before it stay bit for bit."""
    blocks = nn.Sequential(*NETWORKS[network]()).double()
    model = fastdfa.DFA(blocks, feedback=RULE)
    x, g = randn(6, 5), randn(6, 3)
    step(model, x, g)
    expected = [{n: p.grad.clone() for n, p in block.named_parameters()} for block in blocks]
    for k in reversed(range(len(blocks) - 1)):
        with torch.no_grad():
            for later in blocks[k + 1 :]:
                for p in later.parameters():
                    p.copy_(3 * torch.randn_like(p))
        model.zero_grad()
        step(model, x, g)
        for block, right in zip(blocks[: k + 1], expected, strict=False):
            for name, p in block.named_parameters():
                assert right[name].any(), name
                assert torch.equal(p.grad, right[name]), (
                    f"{name} depends on weights after block {k}"
                )


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "Softsign"])
def test_the_formulas_hold_after_scrambling(activation):
    """With a loss whose error does depend on the weights, the formulas say what is left of them."""
    model, x = mlp([5, 8, 6, 7, 3], activation), randn(6, 5)
    target = torch.arange(6) % 3
    for seed in range(3):
        with torch.no_grad():
            for i, p in enumerate(list(model.module.parameters())[2:]):
                p.copy_(randn(*p.shape, seed=10 * seed + i))
        model.zero_grad()
        y = model(x)
        y.retain_grad()
        nn.functional.cross_entropy(y, target).backward()
        assert_close(gradients(model), expected_gradients(model, x, y.grad))


# Ways round a cut ----------------------------------------------------------------------------


def net(*blocks, **options):
    return fastdfa.DFA(nn.Sequential(*blocks).double(), feedback=RULE, **options)


class Add(nn.Module):
    """h + L(h)."""

    def __init__(self):
        super().__init__()
        self.inner = linear(6, 6)

    def forward(self, h):
        return h + self.inner(h)


def test_a_skip_connection_is_found_and_both_ends_named():
    """h + L(h): the add carries what comes after back past the cut before L."""

    model = net(linear(4, 6), Add(), linear(6, 3, None))
    with pytest.raises(RuntimeError) as error:
        model(randn(5, 4))
    text = str(error.value)
    assert "1.inner" in text and "'2'" in text.replace('"', "'").replace("`", "'"), text
    assert "FeedbackPoint" in text and "allow_bypass" in text, text


def test_a_pre_norm_residual_is_found():
    """The point is after the norm, so the skip path does not touch the cut tensor itself: it still
    carries later feedback to the block before."""
    model = net(linear(4, 6), Residual(6, False), Residual(6, False), linear(6, 3, None))
    with pytest.raises(RuntimeError, match=r"(?s)1.inner.*FeedbackPoint|FeedbackPoint.*1.inner"):
        model(randn(5, 4))


def test_a_point_after_the_add_makes_a_residual_right():
    model = net(linear(4, 6), fastdfa.FeedbackPoint(), Residual(6, True), linear(6, 3, None))
    step(model, randn(5, 4), randn(5, 3))
    assert list(model.feedback_points) == ["1", "2.inner", "2.point"]


def test_a_skip_to_the_output_is_found():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = linear(4, 6), linear(6, 6), linear(6, 3, None)
            self.side = nn.Linear(6, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(self.second(h)) + self.side(h)

    with pytest.raises(RuntimeError, match=r"(?s)second.*FeedbackPoint"):
        fastdfa.DFA(Skip().double(), feedback=RULE)(randn(5, 4))


@pytest.mark.parametrize("side", ["plain", "cut"])
def test_a_side_branch_is_found(side):
    """LoRA: the plain branch beside a cut layer carries feedback past its cut."""

    class LoRA(nn.Module):
        def __init__(self, n):
            super().__init__()
            kind = nn.Linear if side == "plain" else fastdfa.Linear
            self.base = fastdfa.Linear(n, n).requires_grad_(False)
            self.down, self.up = kind(n, 2, bias=False), nn.Linear(2, n, bias=False)

        def forward(self, h):
            return self.base(h) + self.up(self.down(h))

    model = net(linear(4, 6), LoRA(6), nn.Tanh(), LoRA(6), nn.Tanh(), linear(6, 3, None))
    if side == "cut":
        x, g = randn(5, 4), randn(5, 3)
        step(model, x, g)
        assert list(model.feedback_points) == ["1.base", "3.base", "5"]
        h = torch.tanh(x @ model.module[0].weight.T + model.module[0].bias).detach()
        delta = g @ model.feedback_matrix("1.base") * (1 - h * h)
        assert_close(model.module[0].weight.grad, delta.T @ x)
    else:
        with pytest.raises(RuntimeError, match=r"1.base") as error:
            model(randn(5, 4))
        assert "3.base" in str(error.value) and "FeedbackPoint" in str(error.value)


@pytest.mark.parametrize("order", ["q first", "k first"])
@pytest.mark.parametrize(
    "change", [lambda h: 2 * h, lambda h: h.view_as(h), nn.LayerNorm(6).double()]
)
def test_a_layer_that_reads_a_function_of_a_cut_tensor_is_found(change, order):
    """q reads h and k reads g(h): h would be fed twice."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.q, self.k = linear(4, 6), linear(6, 6), linear(6, 6)
            self.change = change if isinstance(change, nn.Module) else Apply(change)
            self.head = linear(6, 3, None)

        def forward(self, x):
            h = self.stem(x)
            if order == "q first":
                q, k = self.q(h), self.k(self.change(h))
            else:
                k, q = self.k(self.change(h)), self.q(h)
            return self.head(q * k)

    with pytest.raises(RuntimeError, match=r"(?s)FeedbackPoint") as error:
        fastdfa.DFA(Net().double(), feedback=RULE)(randn(5, 4))
    assert "'q'" in str(error.value) and "'k'" in str(error.value)


def test_allow_bypass_accepts_it():
    """Then the layer before the skip gets the feedback of both points."""

    model = net(linear(4, 6), Add(), linear(6, 3, None), allow_bypass=True)
    x, g = randn(5, 4), randn(5, 3)
    step(model, x, g)
    first = model.module[0]
    h = torch.tanh(x @ first.weight.T + first.bias).detach()
    signal = g @ model.feedback_matrix("1.inner") + g @ model.feedback_matrix("2")
    assert_close(first.weight.grad, (signal * (1 - h * h)).T @ x)


def test_a_bypass_is_found_again_after_the_module_was_refused():
    model = net(linear(4, 6), Residual(6, False), linear(6, 3, None))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="FeedbackPoint"):
            model(randn(5, 4))


def test_a_bypass_is_found_after_a_pass_without_gradients():
    model = net(linear(4, 6), Residual(6, False), linear(6, 3, None))
    with torch.no_grad():
        model(randn(5, 4))
    with pytest.raises(RuntimeError, match="FeedbackPoint"):
        model(randn(5, 4))


@pytest.mark.parametrize("width", [6, 40])
def test_a_deep_graph_is_walked(width):
    """Neither recursion nor exponential time: 3000 adds between two points, and 60 diamonds."""

    def chain(h):
        for _ in range(3000):
            h = h + 1
        return h

    def diamonds(h):
        for _ in range(60):
            h = h + h.sin()
        return h

    model = net(
        linear(4, width),
        Apply(chain),
        linear(width, width),
        Apply(diamonds),
        linear(width, 3, None),
    )
    step(model, randn(2, 4), randn(2, 3))


# What is warned about ------------------------------------------------------------------------


def warnings_of(model, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
    return [str(w.message) for w in caught]


def test_a_plain_head_is_warned_about():
    """It leaves the last cut layer on backprop."""
    texts = warnings_of(net(linear(4, 6), linear(6, 5), nn.Linear(5, 3)), randn(5, 4))
    assert any("'1'" in t and "'2'" in t and "true gradient" in t for t in texts), texts


def test_a_plain_head_after_an_activation_module_is_warned_about():
    texts = warnings_of(
        net(linear(4, 6), linear(6, 5, None), nn.ReLU(), nn.Linear(5, 3)), randn(5, 4)
    )
    assert any("'1'" in t and "'3'" in t and "true gradient" in t for t in texts), texts


def test_a_network_without_points_is_warned_about():
    texts = warnings_of(net(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), randn(5, 4))
    assert texts


@pytest.mark.parametrize(
    "blocks",
    [
        lambda: [linear(4, 6), linear(6, 3, None)],
        lambda: [linear(4, 6), nn.LayerNorm(6), linear(6, 3, None)],
        lambda: [linear(4, 6), nn.Dropout(), linear(6, 5, None), nn.ReLU(), linear(5, 3, None)],
        lambda: [linear(4, 6), fastdfa.FeedbackPoint(), nn.Linear(6, 3)],
        lambda: [linear(4, 6), linear(6, 5), fastdfa.FeedbackPoint(), nn.Linear(5, 3)],
        lambda: [linear(4, 3, None)],
    ],
)
def test_right_networks_are_not_warned_about(blocks):
    assert warnings_of(net(*blocks()), randn(5, 4)) == []


@pytest.mark.parametrize("end", ["LogSoftmax", "Softmax", "Sigmoid", "functional", "activation"])
def test_a_normalised_output_is_warned_about(end):
    """There e is the constant -onehot/M; the warning says where to take the error instead."""
    last = {
        "LogSoftmax": lambda: [linear(6, 3, None), nn.LogSoftmax(-1)],
        "Softmax": lambda: [linear(6, 3, None), nn.Softmax(-1)],
        "Sigmoid": lambda: [linear(6, 3, None), nn.Sigmoid()],
        "functional": lambda: [linear(6, 3, None), Apply(lambda y: y.log_softmax(-1))],
        "activation": lambda: [linear(6, 3, "sigmoid")],
    }[end]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net(linear(4, 6), *last)(randn(5, 4))
    texts = [str(w.message) for w in caught]
    assert any("output=" in t and ("oftmax" in t or "igmoid" in t) for t in texts), texts


def test_a_frozen_branch_beside_another_is_no_way_round_a_cut():
    """Its output has no gradient, so nothing leads back from it; trainable, it is accepted."""

    class Sides(nn.Module):
        def __init__(self, frozen):
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), fastdfa.Linear(5, 3)
            self.left, self.right = fastdfa.Linear(6, 5), fastdfa.Linear(6, 5)
            self.left.requires_grad_(not frozen)

        def forward(self, x):
            h = self.stem(x)
            return self.head(self.left(torch.tanh(h)) + self.right(torch.relu(h)))

    for frozen in (False, True):
        model = fastdfa.DFA(Sides(frozen).double(), feedback=RULE)
        step(model, randn(5, 4), randn(5, 3))
        assert model.feedback_points == ["left", "right", "head"]


def test_a_tap_before_the_softmax_is_not_warned_about():
    model = net(linear(4, 6), linear(6, 3, None), nn.LogSoftmax(-1), output="1")
    assert warnings_of(model, randn(5, 4)) == []
