"""Where a network is cut, and how the cuts are called (contract 2 and 5)."""

import copy
import gc
import weakref

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

pytestmark = pytest.mark.usefixtures("path")

REFUSED = (RuntimeError, TypeError, ValueError)


def linear(n, m, activation=None):
    return fastdfa.Linear(n, m, activation=activation, dtype=torch.float64)


def tanh_gradient(layer, x, signal):
    """Weight gradient of a tanh layer that receives `signal`."""
    h = torch.tanh(x @ layer.weight.T + layer.bias).detach()
    return (signal * (1 - h * h)).T @ x


def test_names_are_those_of_the_readers():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([linear(5, 5, "tanh") for _ in range(2)])
            self.act = nn.ReLU()
            self.point = fastdfa.FeedbackPoint()

        def forward(self, x):
            for block in self.blocks:
                x = self.act(block(x))
            return self.point(x)

    model = fastdfa.DFA(
        nn.Sequential(linear(4, 5), Body(), nn.Linear(5, 3).double()), feedback=RULE
    )
    model(randn(6, 4))
    assert list(model.feedback_points) == ["1.blocks.0", "1.blocks.1", "1.point"]
    assert model.feedback_matrix("1.point").shape == (3, 5)


def test_points_are_those_of_the_last_forward_pass():
    model = mlp([4, 8, 6, 3])
    model(randn(5, 4))
    assert list(model.feedback_points) == ["1", "2"]
    model.module[0] = nn.Sequential(linear(4, 5, "tanh"), linear(5, 8, "tanh"))
    model(randn(5, 4))
    assert list(model.feedback_points) == ["0.1", "1", "2"]


def test_the_inputs_of_the_module_are_not_cut():
    model = mlp([4, 8, 3])
    x, g = randn(6, 4).requires_grad_(), randn(6, 3)
    step(model, x, g)
    assert list(model.feedback_points) == ["1"]
    assert_close(gradients(model), expected_gradients(model, x, g))
    layer = model.module[0]
    h = torch.tanh(x @ layer.weight.T + layer.bias).detach()
    delta = g @ model.feedback_matrix("1") * (1 - h * h)
    assert_close(x.grad, delta @ layer.weight.detach())


@pytest.mark.parametrize("how", ["keyword", "list", "dict", "computed outside"])
def test_no_input_is_cut_however_it_is_passed(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = linear(4, 8, "tanh"), linear(8, 3)

        def forward(self, x):
            x = x[0] if isinstance(x, list) else x["x"] if isinstance(x, dict) else x
            return self.head(self.first(x))

    model = fastdfa.DFA(Net(), feedback=RULE)
    x, g = randn(6, 4).requires_grad_(), randn(6, 3)
    argument = {"keyword": x, "list": [x], "dict": {"x": x}, "computed outside": x * 1}[how]
    y = model(x=argument) if how == "keyword" else model(argument)
    (y * g).sum().backward()
    assert list(model.feedback_points) == ["head"]
    delta_w = tanh_gradient(model.module.first, x.detach(), g @ model.feedback_matrix("head"))
    assert_close(model.module.first.weight.grad, delta_w)
    assert x.grad is not None


def test_a_layer_that_is_called_twice_makes_two_points():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.loop, self.head = (
                linear(4, 6, "tanh"),
                linear(6, 6, "tanh"),
                linear(6, 3),
            )

        def forward(self, x):
            return self.head(self.loop(self.loop(self.first(x))))

    model = fastdfa.DFA(Loop(), feedback=RULE)
    x, g = randn(7, 4), randn(7, 3)
    step(model, x, g)
    names = list(model.feedback_points)
    assert len(names) == 3 and names[-1] == "head" and names[0] == "loop"
    first, loop, _ = model.module.children()
    signal = g @ model.feedback_matrix("head")
    for name in names:
        assert_close(model.feedback_matrix(name), model.feedback_matrix("head"))  # shared, equal n
    h0 = torch.tanh(x @ first.weight.T + first.bias).detach()
    h1 = torch.tanh(h0 @ loop.weight.T + loop.bias).detach()
    assert_close(first.weight.grad, tanh_gradient(first, x, signal))
    expected = tanh_gradient(loop, h0, signal) + tanh_gradient(loop, h1, signal)
    assert_close(loop.weight.grad, expected)


@pytest.mark.parametrize("activation", [None, "tanh"])
def test_layers_that_read_one_tensor_make_one_point(activation):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = linear(4, 6, "tanh")
            self.q, self.k, self.v = (linear(6, 6, activation) for _ in range(3))
            self.head = linear(6, 3)

        def forward(self, x):
            h = self.stem(x)
            q, k, v = self.q(h), self.k(h), self.v(h)
            return self.head(torch.softmax(q @ k.mT, -1) @ v)

    model = fastdfa.DFA(Attention(), feedback=RULE)
    x, g = randn(2, 5, 4), randn(2, 5, 3)
    step(model, x, g)
    assert list(model.feedback_points) == ["q", "head"]
    signal = (g @ model.feedback_matrix("q")).reshape(10, 6)
    stem = model.module.stem
    assert_close(
        stem.weight.grad, tanh_gradient(stem, x.reshape(10, 4), signal)
    )  # once, not thrice
    h = torch.tanh(x @ stem.weight.T + stem.bias).detach()
    f = torch.tanh if activation else (lambda a: a)
    leaves = [getattr(model.module, n).weight.detach().clone().requires_grad_() for n in "qkv"]
    q, k, v = (
        f(h @ w.T + getattr(model.module, n).bias.detach())
        for n, w in zip("qkv", leaves, strict=True)
    )
    out = torch.softmax(q @ k.mT, -1) @ v
    expected = torch.autograd.grad(out, leaves, (g @ model.feedback_matrix("head")))
    for name, right in zip("qkv", expected, strict=True):
        assert_close(getattr(model.module, name).weight.grad, right)


def test_a_layer_may_be_replaced_after_wrapping():
    model = mlp([4, 8, 6, 3])
    x, g = randn(5, 4), randn(5, 3)
    step(model, x, g)
    model.module[1] = linear(8, 6, "tanh")
    model.zero_grad()
    step(model, x, g)
    assert list(model.feedback_points) == ["1", "2"]
    assert_close(gradients(model), expected_gradients(model, x, g))
    model.module[0] = nn.Sequential(linear(4, 8), nn.Tanh())
    model.zero_grad()
    step(model, x, g)
    assert list(model.feedback_points) == ["1", "2"]
    B = model.feedback_matrix("1")
    layer = model.module[0][0]
    assert_close(layer.weight.grad, tanh_gradient(layer, x, g @ B))


def swapped(layers):
    layers[1], layers[2] = layers[2], layers[1]


def moved_on(layers):
    layers.insert(0, nn.Identity())


def removed(layers):
    del layers[1]


def put_deeper(layers):
    layers[1] = nn.Sequential(layers[1])


@pytest.mark.parametrize("looks_ahead", [True, False])
@pytest.mark.parametrize("move, names", [
    (swapped, ["1", "2", "3"]), (moved_on, ["2", "3", "4"]), (removed, ["1", "2"]),
    (put_deeper, ["1.0", "2", "3"]),
])  # fmt: skip
def test_layers_that_move_have_the_b_of_their_new_names(move, names, looks_ahead):
    """As a copy has, or a model that loads the checkpoint."""
    model = mlp([4, 8, 8, 8, 3], feedback=fastdfa.Feedback(seed=1, shared=False))
    model.looks_ahead = looks_ahead
    x, g = randn(6, 4), randn(6, 3)
    step(model, x, g)
    move(model.module)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        each.zero_grad()
        step(each, x, g)
        assert each.feedback_points == names
    assert_close(gradients(model), gradients(copied), 0.0)


def test_another_module_in_a_root():
    model = mlp([4, 8, 8, 3])
    step(model, randn(6, 4), randn(6, 3))
    old = weakref.ref(model.module[0].weight)
    model.module = nn.Sequential(nn.Flatten(), linear(4, 8, "tanh"), nn.Dropout(0.0), linear(8, 3))
    step(model, randn(6, 4), randn(6, 3))
    assert model.feedback_points == ["3"]
    gc.collect()
    assert old() is None
    model.module = nn.Sequential(nn.Identity(), *model.module)  # of the same layers
    step(model, randn(6, 4), randn(6, 3))
    assert model.feedback_points == ["4"]


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_passes_of_several_kinds_in_turn(looks_ahead):
    """What each finds again, as it was before, is of its own points."""
    model = mlp([4, 16, 6, 3], feedback=fastdfa.Feedback(seed=1, scale="tinydfa"))
    model.looks_ahead = looks_ahead
    x, g = randn(6, 4), randn(6, 3)
    for frozen, names in [(False, ["1", "2"]), (True, ["2"])] * 2:
        model.module[0].requires_grad_(not frozen)
        model.zero_grad()
        step(model, x, g)
        assert model.feedback_points == names
        h = torch.tanh(x @ model.module[0].weight.T + model.module[0].bias).detach()
        expected = tanh_gradient(model.module[1], h, g @ model.feedback_matrix("2"))
        assert_close(model.module[1].weight.grad, expected)
    for layer in model.module[:2]:
        layer.requires_grad_(False)
    model(x)
    assert model.feedback_points == []
    model.module.requires_grad_(True)
    model(x)
    assert len(model.learn_feedback()) == 2
    step(model, x, g)


def test_one_module_under_two_roots():
    """Each root has its own matrices, in any order of passes."""
    one = mlp([4, 8, 6, 3], feedback=fastdfa.Feedback(seed=1))
    two = fastdfa.DFA(one.module, feedback=fastdfa.Feedback(seed=2, shared=False))
    x, g = randn(5, 4), randn(5, 3)
    step(one, x, g)
    first = gradients(one)
    one.zero_grad()
    step(two, x, g)
    second = gradients(two)
    two.activations = one.activations
    assert_close(first, expected_gradients(one, x, g))
    assert_close(second, expected_gradients(two, x, g))
    one.zero_grad()
    losses = [(root(x) * g).sum() for root in (one, two, one)]
    for loss in losses:
        loss.backward()
    assert_close(gradients(one), {n: 2 * first[n] + second[n] for n in first})


def test_one_layer_under_two_roots_has_the_name_of_each():
    shared = linear(6, 6, "tanh")
    one = fastdfa.DFA(nn.Sequential(linear(4, 6), shared, linear(6, 3)), feedback=RULE)
    two = fastdfa.DFA(nn.Sequential(nn.Sequential(linear(4, 6), nn.Tanh(), shared), linear(6, 3)))
    one(randn(5, 4)), two(randn(5, 4))
    assert list(one.feedback_points) == ["1", "2"]
    assert list(two.feedback_points) == ["0.2", "1"]


def test_a_dfa_inside_a_dfa_is_refused():
    inner = mlp([4, 8, 4])
    with pytest.raises(REFUSED, match="DFA"):
        fastdfa.DFA(nn.Sequential(inner, linear(4, 3)))(randn(5, 4))
    with pytest.raises(REFUSED, match="DFA"):
        fastdfa.DFA(inner)(randn(5, 4))


def test_a_dfa_put_inside_a_dfa_later_is_refused():
    outer = mlp([4, 8, 3])
    outer.module[0] = mlp([4, 6, 8])
    with pytest.raises(REFUSED, match="DFA"):
        outer(randn(5, 4))


def test_the_number_of_features_may_not_change():
    mean = Apply(lambda h: h.mean(1))
    model = fastdfa.DFA(
        nn.Sequential(linear(4, 5, "tanh"), fastdfa.FeedbackPoint(), mean, linear(5, 2))
    )
    model(randn(7, 3, 4))
    model(randn(2, 3, 4))
    with pytest.raises(REFUSED, match=r"(?s)1.*15.*20|1.*20.*15"):
        model(randn(7, 4, 4))
    step(model, randn(7, 3, 4), randn(7, 2))  # what went before still works
    assert model.feedback_matrix("1").shape == (2, 15)


def test_the_number_of_classes_may_not_change_silently():
    """A new head has another C: the matrices follow it or the pass is refused."""
    model = mlp([4, 8, 3])
    step(model, randn(5, 4), randn(5, 3))
    model.module[1] = linear(8, 4)
    model.zero_grad()
    x, g = randn(5, 4), randn(5, 4)
    try:
        step(model, x, g)
    except REFUSED as error:
        assert "3" in str(error) and "4" in str(error)
    else:
        assert_close(gradients(model), expected_gradients(model, x, g))


def test_rows_of_a_feedback_point():
    """FeedbackPoint(rows=2) under an error [N, T, C]: a point [N, T, a, b] has a * b features."""
    unfold, fold = nn.Unflatten(2, (2, 3)), nn.Flatten(2)
    blocks = [linear(4, 6, "tanh"), unfold, fastdfa.FeedbackPoint(rows=2), fold, linear(6, 3)]
    model = fastdfa.DFA(nn.Sequential(*blocks), feedback=RULE)
    x, g = randn(5, 2, 4), randn(5, 2, 3)
    step(model, x, g)
    B = model.feedback_matrix("2")
    assert B.shape == (3, 6)
    signal = (g @ B).reshape(10, 6)
    assert_close(blocks[0].weight.grad, tanh_gradient(blocks[0], x.reshape(10, 4), signal))


def test_an_error_for_every_pixel():
    """Features come last; the error that says so is given where they do not."""
    conv, head = nn.Conv2d(3, 6, 1).double(), nn.Conv2d(6, 4, 1).double()
    to_end, back = Apply(lambda h: h.movedim(1, -1)), Apply(lambda h: h.movedim(-1, 1))
    blocks = [conv, nn.Tanh(), to_end, fastdfa.FeedbackPoint(), back, head]
    x, g = randn(2, 3, 5, 5), randn(2, 5, 5, 4)
    with pytest.raises(ValueError, match=r"\(2, 6, 5, 5\).*features come last.*movedim\(1, -1\)"):
        fastdfa.DFA(nn.Sequential(conv, nn.Tanh(), fastdfa.FeedbackPoint(), head))(x)
    model = fastdfa.DFA(nn.Sequential(*blocks, to_end), feedback=RULE)
    step(model, x, g)
    pixels = x.movedim(1, -1).reshape(50, 3)
    h = torch.tanh(pixels @ conv.weight.flatten(1).T + conv.bias).detach()
    signal = (g @ model.feedback_matrix("3")).reshape(50, 6)
    expected = (signal * (1 - h * h)).T @ pixels
    assert_close(conv.weight.grad.flatten(1), expected)
    assert_close(head.weight.grad.flatten(1), g.reshape(50, 4).T @ h)


def test_rows_of_a_feedback_point_say_that_a_point_is_not_per_token():
    """FeedbackPoint(rows=1) where the shapes would also fit token by token is refused or flat."""
    blocks = [linear(4, 6, "tanh"), fastdfa.FeedbackPoint(rows=1), linear(6, 3)]
    model = fastdfa.DFA(nn.Sequential(*blocks), feedback=RULE)
    with pytest.raises(REFUSED, match="rows"):
        step(model, randn(5, 2, 4), randn(5, 2, 3))


# Where the error is taken --------------------------------------------------------------------


class Wrapped(nn.Module):
    """Returns a dict and computes its loss inside."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(linear(4, 8, "tanh"), linear(8, 6, "tanh"), linear(6, 5, "tanh"))
        self.decoder = nn.Sequential(linear(5, 7, "tanh"), linear(7, 3))

    def forward(self, x, target):
        y = self.decoder(self.body(x))
        return {"loss": nn.functional.cross_entropy(y, target), "logits": y}


@pytest.mark.parametrize("output", ["decoder", "body"])
def test_the_error_at_the_output_of_a_submodule(output):
    model = fastdfa.DFA(Wrapped(), feedback=RULE, output=output)
    module = model.module
    x, target = randn(6, 4), torch.arange(6) % 3
    model(x, target)["loss"].backward()
    points = list(model.feedback_points)
    # The true gradient at the tap and of all that follows it.
    tap_module = getattr(module, output)
    seen = []
    handle = tap_module.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    module(x, target)
    handle.remove()
    tap = seen[0].requires_grad_()
    if output == "body":
        # Nothing is cut after the tap: the decoder is trained by backprop.
        assert points == ["body.1", "body.2"]
        w = [p for p in module.decoder.parameters()]
        loss = nn.functional.cross_entropy(module.decoder(tap), target)
        e, *expected = torch.autograd.grad(loss, [tap, *w])
        for p, right in zip(w, expected, strict=True):
            assert_close(p.grad, right)
    else:
        assert points == ["body.1", "body.2", "decoder.0", "decoder.1"]
        (e,) = torch.autograd.grad(nn.functional.cross_entropy(tap, target), tap)
    B = model.feedback_matrix("body.1")
    assert B.shape == (e.shape[1], 8)
    assert_close(module.body[0].weight.grad, tanh_gradient(module.body[0], x, e @ B))


def test_two_losses_on_one_error():
    """The error is what autograd hands to the output, whatever it is made of."""
    model = mlp([4, 8, 6, 3])
    x, a, b = randn(5, 4), randn(5, 3), randn(5, 3, seed=2)
    y = model(x)
    ((y * a).sum() + (y.exp() * b).sum()).backward()
    error = a + y.exp() * b
    assert_close(gradients(model), expected_gradients(model, x, error))
