"""Standard PyTorch around a DFA model: graphs, modes, frozen layers, optimizers, backprop()
(contract 8)."""

import pytest
import torch
from helpers.networks import (
    RULE,
    Apply,
    G,
    X,
    assert_close,
    expected_gradients,
    fresh,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn

import fastdfa

pytestmark = pytest.mark.usefixtures("path")


def added(a, b):
    return {name: a[name] + b[name] for name in a}


# Graphs --------------------------------------------------------------------------------------


def test_gradients_accumulate(model):
    x, g = randn(6, 5, seed=2), randn(6, 3, seed=3)
    expected = added(fresh(model), fresh(model, x, g))
    step(model, X, G)
    step(model, x, g)
    assert_close(gradients(model), expected)


def test_gradients_of_a_pass_are_not_changed_by_the_next(model):
    step(model, X, G)
    kept = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in kept]
    model.zero_grad(set_to_none=True)
    step(model, 2 * X, G)
    for a, b in zip(kept, copies, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_a_backward(model, order):
    x, g = randn(4, 5, seed=2), randn(4, 3, seed=3)
    expected = added(fresh(model), fresh(model, x, g))
    losses = [(model(X) * G).sum(), (model(x) * g).sum()]
    for i in order:
        losses[i].backward()
    assert_close(gradients(model), expected)


def test_two_forwards_in_one_loss(model):
    x, g = randn(4, 5, seed=2), randn(4, 3, seed=3)
    expected = added(fresh(model), fresh(model, x, g))
    ((model(X) * G).sum() + (model(x) * g).sum()).backward()
    assert_close(gradients(model), expected)


def test_a_model_that_reads_its_own_output(model):
    """The second pass is no part of the first: its input requires grad and is not cut."""
    square = mlp([5, 8, 5])
    y = square(X)
    z = square(y)
    (z * randn(6, 5)).sum().backward()
    assert list(square.feedback_points) == ["1"]
    assert all(p.grad is not None for p in square.parameters())


def test_autograd_grad(model):
    expected = fresh(model)
    y = model(X)
    found = torch.autograd.grad((y * G).sum(), list(model.module.parameters()))
    assert_close(dict(zip(expected, found, strict=True)), expected)
    assert all(p.grad is None for p in model.parameters())


def test_autograd_grad_of_one_parameter(model):
    expected = fresh(model)
    for name, p in model.module.named_parameters():
        (found,) = torch.autograd.grad((model(X) * G).sum(), p)
        assert_close(found, expected[name])


def test_autograd_grad_of_the_input(model):
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad((model(x) * G).sum(), x)
    layer = model.module[0]
    h = torch.tanh(x @ layer.weight.T + layer.bias).detach()
    assert_close(found, G @ model.feedback_matrix("1") * (1 - h * h) @ layer.weight.detach())


def test_backward_with_inputs(model):
    expected = fresh(model)
    layer = model.module[1]
    (model(X) * G).sum().backward(inputs=[layer.weight])
    assert_close(layer.weight.grad, expected["1.weight"])
    assert layer.bias.grad is None and model.module[0].weight.grad is None


def test_retain_graph_twice(model):
    expected = fresh(model)
    loss = (model(X) * G).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert_close(gradients(model), added(expected, expected))


def test_a_second_backward_without_retain_graph_is_refused(model):
    loss = (model(X) * G).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("kind", ["fused", "general"])
def test_double_backward_is_refused(kind):
    model = mlp([5, 8, 7, 3], "tanh" if kind == "fused" else "Softsign")
    x = X.clone().requires_grad_()
    loss = (model(x) ** 2).sum()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient,) = torch.autograd.grad(loss, model.module[0].weight, create_graph=True)
        gradient.sum().backward()


def test_double_backward_of_a_layer_outside_a_dfa_is_refused():
    layer = fastdfa.Linear(5, 3, activation="tanh", dtype=torch.float64)
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()


def test_a_loss_of_a_part_of_the_batch(model):
    g = G.clone()
    g[3:] = 0
    expected = fresh(model, X, g)
    (model(X)[:3] * G[:3]).sum().backward()
    assert_close(gradients(model), expected)


def test_an_output_that_is_not_used_leaves_no_gradient(model):
    expected = fresh(model)
    model(2 * X)
    step(model, X, G)
    assert_close(gradients(model), expected)


# Exceptions, modes, frozen layers -------------------------------------------------------------


class Failure(Exception):
    pass


def test_an_exception_in_forward_leaves_no_trace(model):
    expected = fresh(model)

    def fail(h):
        raise Failure

    model.module.insert(1, Apply(fail))
    with pytest.raises(Failure):
        model(X)
    # Layers outside train by backprop: nothing collects their inputs.
    layers = nn.Sequential(*[m for m in model.module if isinstance(m, nn.Linear)])
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
    plain.double()
    for p, q in zip(plain.parameters(), layers.parameters(), strict=True):
        p.data.copy_(q)
    (layers(X) * G).sum().backward()
    (plain(X) * G).sum().backward()
    for p, q in zip(plain.parameters(), layers.parameters(), strict=True):
        assert_close(q.grad, p.grad)
    del model.module[1]
    assert_close(fresh(model), expected)


def test_an_exception_in_backward_leaves_no_trace(model):
    expected = fresh(model)

    def fail(gradient):
        raise Failure

    handle = model.module[0].weight.register_hook(fail)
    with pytest.raises(Failure):
        step(model, X, G)
    handle.remove()
    assert_close(fresh(model), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_leaves_no_trace(model, mode):
    expected = fresh(model)
    with mode():
        y = model(X)
    assert not y.requires_grad
    assert_close(fresh(model), expected)
    assert_close(y, model(X))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_first_pass_may_be_without_gradients(mode):
    model = mlp([5, 8, 7, 3])
    with mode():
        model(X)
        model(X[:0])
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G))


def test_eval_mode_trains_the_same_way(model):
    expected = fresh(model)
    assert_close(fresh(model.eval()), expected)


def test_enable_grad_inside_no_grad(model):
    expected = fresh(model)
    with torch.no_grad(), torch.enable_grad():
        y = model(X)
    (y * G).sum().backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("frozen", ["0", "1", "2", "0.weight", "1.bias", "0 1", "1 2", "2.weight"])
def test_frozen_parameters(frozen):
    """A frozen parameter gets no gradient, and the others get what they got before."""
    model = mlp([5, 8, 7, 3])
    x = X.clone().requires_grad_()  # so that every layer has something to pass on
    expected = fresh(model, x)
    x.grad = None
    names = [n for n in expected if any(n.startswith(f) for f in frozen.split())]
    for name, p in model.module.named_parameters():
        p.requires_grad_(name not in names)
    found = fresh(model, x)
    for name in names:
        expected[name] = None
    assert_close(found, expected)


def test_a_frozen_stem_makes_no_point(model):
    """Its output does not require grad, so there is nothing to cut."""
    expected = fresh(model)
    model.module[0].requires_grad_(False)
    found = fresh(model)
    model(X)
    assert list(model.feedback_points) == ["2"]
    assert_close({n: found[n] for n in list(found)[2:]}, {n: expected[n] for n in list(found)[2:]})
    assert found["0.weight"] is None


def test_a_frozen_model_runs():
    model = mlp([5, 8, 7, 3]).requires_grad_(False)
    assert not model(X).requires_grad


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_partial_last_batch(model, set_to_none):
    for rows in (6, 6, 2, 1, 6):
        model.zero_grad(set_to_none)
        step(model, X[:rows], G[:rows])
        assert_close(gradients(model), expected_gradients(model, X[:rows], G[:rows]))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_optimizers_and_clipping(optimizer, model):
    """A step with any optimizer equals its step on a plain model with the same gradients."""
    plain = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 3)).double()
    plain.load_state_dict(model.module.state_dict())
    steps = [getattr(torch.optim, optimizer)(m.parameters(), lr=0.01) for m in (model, plain)]
    for _ in range(3):
        model.zero_grad()
        step(model, X, G)
        expected = expected_gradients(model, X, G).values()
        for right, q in zip(expected, plain.parameters(), strict=True):
            q.grad = right
        for m, o in zip((model, plain), steps, strict=True):
            nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            o.step()
    for p, q in zip(model.module.parameters(), plain.parameters(), strict=True):
        assert_close(p, q)


# Backprop -------------------------------------------------------------------------------------


def backprop_gradients(model, x=X, g=G):
    """By autograd through the same weights, without the library."""
    h = x
    weights = []
    for layer in model.module:
        w, b = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
        weights += [w, b]
        h = h @ w.T + b
        if layer is not model.module[-1]:
            h = torch.tanh(h)
    found = torch.autograd.grad((h * g).sum(), weights)
    return dict(zip(gradients(model), found, strict=True))


def test_backprop_gives_the_true_gradient(model):
    expected = fresh(model)
    with fastdfa.backprop(model):
        true = fresh(model)
    assert_close(true, backprop_gradients(model))
    assert_close(fresh(model), expected)


def test_backprop_ends_with_an_exception(model):
    expected = fresh(model)
    with pytest.raises(Failure), fastdfa.backprop(model):
        raise Failure
    assert_close(fresh(model), expected)


def test_backprop_nests(model):
    expected = fresh(model)
    with fastdfa.backprop(model):
        with fastdfa.backprop(model):
            fresh(model)
        assert_close(fresh(model), backprop_gradients(model))
    assert_close(fresh(model), expected)


def test_backprop_is_of_one_model(model):
    other = mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=8))
    expected = fresh(other)
    with fastdfa.backprop(model):
        assert_close(fresh(other), expected)


def test_backprop_allows_what_a_cut_would_not():
    """Skip connections, several outputs: inside it the model is plain PyTorch."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = fastdfa.Linear(5, 5), fastdfa.Linear(5, 5, activation="tanh")

        def forward(self, x):
            h = self.first(x)
            return h + self.inner(h)

    model = fastdfa.DFA(Skip().double(), feedback=RULE)
    with fastdfa.backprop(model):
        model(X).sum().backward()
    assert model.module.first.weight.grad is not None
