"""B from forward-mode derivatives (FDFA, arXiv 2212.07282)."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import ACTIVATIONS
from helpers.networks import BATCH, ERROR, WIDTHS, assert_close, gradients, mlp, randn, step
from torch import nn

import fastdfa

X, G = BATCH, ERROR


def learning(model, x=X):
    model(x)
    return model.learn_feedback("forward_gradient")


def watched(monkeypatch):
    """The noises that are drawn."""
    drawn, randn_like = [], torch.randn_like

    def keep(x):
        drawn.append(randn_like(x))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", keep)
    return drawn


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "Softsign", "none"])
def test_one_estimate(activation, monkeypatch):
    """d by the formulas, of the noises p_1 and p_2; added to a gradient that is there."""
    model = mlp(WIDTHS, activation)
    parameters, drawn = learning(model), watched(monkeypatch)
    for B in parameters:
        B.grad = torch.ones_like(B)
    fastdfa.forward_gradient(model, X)
    p1, p2 = drawn
    first, second, head = model.module
    f = ACTIVATIONS[activation]
    a1 = F.linear(X, first.weight, first.bias)
    a2 = F.linear(f.f(a1), second.weight, second.bias)
    d = ((p1 @ second.weight.T) * f.derivative(a2) + p2) @ head.weight.T
    for B, p in zip(parameters, (p1, p2), strict=True):
        assert_close(B.grad, 1 + B.detach() - d.detach().T @ p / 9)
    assert all(p.grad is None for p in model.module.parameters())


def test_of_a_low_rank(monkeypatch):
    """P_l - (d Q)^T p_l / M; Q learns from the error of a backward pass alone."""
    model = mlp(WIDTHS, "none", feedback=fastdfa.Feedback(seed=1, rank=3))
    (P1, P2, Q), drawn = learning(model), watched(monkeypatch)
    fastdfa.forward_gradient(model, X)
    p1, p2 = drawn
    _, second, head = (layer.weight.detach() for layer in model.module)
    d = (p1 @ second.T + p2) @ head.T
    for P, p in ((P1, p1), (P2, p2)):
        assert_close(P.grad, P.detach() - (d @ Q.detach()).T @ p / 9)
    assert Q.grad is None
    before = P1.grad.clone()
    step(model, X, G)
    assert torch.equal(P1.grad, before) and Q.grad.norm() > 0


def test_the_average_is_the_jacobian():
    """Of a linear network; by SGD with a rate of 0.1, which averages over steps."""
    model = mlp(WIDTHS, "none")
    parameters = learning(model)
    optimizer = torch.optim.SGD(parameters, 0.1)
    torch.manual_seed(0)
    for _ in range(150):
        optimizer.zero_grad()
        fastdfa.forward_gradient(model, randn(1000, 5))
        optimizer.step()
    weights = [layer.weight.detach() for layer in model.module]
    for B, jacobian in zip(parameters, (weights[2] @ weights[1], weights[2]), strict=True):
        assert_close(B.detach(), jacobian, 0.1)


class Skip(nn.Module):
    """q and k read one tensor; dropout and batch norm between, a convolution before."""

    def __init__(self):
        super().__init__()
        self.conv = fastdfa.Conv2d(1, 2, 3, activation="relu")
        self.norm, self.drop = nn.BatchNorm2d(2), nn.Dropout(0.3)
        self.q, self.k = fastdfa.Linear(8, 5), fastdfa.Linear(8, 5)
        self.head = fastdfa.Linear(5, 4)

    def forward(self, x):
        h = self.drop(self.norm(self.conv(x))).flatten(1)
        return self.head(torch.tanh(self.q(h) + self.k(h)))


def test_branches_and_buffers(monkeypatch):
    """One noise for both readers of a tensor; the statistics of batch norm stay."""
    model = fastdfa.DFA(Skip().double())
    x, read = randn(6, 1, 4, 4), []
    model.module.drop.register_forward_hook(lambda *call: read.append(call[-1].detach().clone()))
    parameters, drawn = learning(model, x), watched(monkeypatch)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    fastdfa.forward_gradient(model, x)
    p1, p2 = drawn
    assert (tuple(p1.shape), tuple(p2.shape)) == ((6, 8), (6, 5))
    q, k, head = model.module.q, model.module.k, model.module.head
    h = read[-1].flatten(1)  # of the pass that estimates, as dropout drew it
    derivative = 1 - torch.tanh(q(h) + k(h)).detach() ** 2
    tangent = p1 @ (q.weight + k.weight).detach().T * derivative + p2
    d = tangent @ head.weight.detach().T
    by_width = {B.shape[1]: B for B in parameters}
    for B, p in ((by_width[8], p1), (by_width[5], p2)):
        assert_close(B.grad, B.detach() - d.T @ p / 6)
    assert_close(dict(model.named_buffers()), before)
    (model(x) * randn(6, 4)).sum().backward()  # an ordinary pass goes on


def test_tokens_and_positions(monkeypatch):
    model = mlp(WIDTHS, "none")
    (first, _), drawn = learning(model), watched(monkeypatch)
    fastdfa.forward_gradient(model, randn(3, 2, 5))
    p1, p2 = (p.flatten(0, 1) for p in drawn)
    weights = [layer.weight.detach() for layer in model.module]
    d = (p1 @ weights[1].T + p2) @ weights[2].T
    assert_close(first.grad, first.detach() - d.T @ p1 / 6)
    layers = [nn.Linear(3, 3), fastdfa.FeedbackPoint(features=-1), nn.Flatten(), nn.Linear(6, 4)]
    model = fastdfa.DFA(nn.Sequential(*layers).double())
    (B,) = learning(model, randn(5, 2, 3))
    drawn.clear()
    fastdfa.forward_gradient(model, randn(5, 2, 3))
    (p,) = drawn
    d = p.flatten(1) @ layers[3].weight.detach().T
    assert_close(B.grad, B.detach() - d.T @ p.sum(1) / 2**0.5 / 5)


def test_training_aligns_the_feedback():
    """From B at random to a feedback that points where the true gradient does."""
    model = mlp([5, 32, 32, 4])
    parameters = learning(model)
    optimizer = torch.optim.SGD(
        [{"params": model.module.parameters()}, {"params": parameters, "lr": 0.05}], lr=0.01
    )
    x = randn(256, 5)
    y = (x @ randn(5, 4, seed=3)).argmax(1)
    before = fastdfa.alignment(model, F.cross_entropy, x, y)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        fastdfa.forward_gradient(model, x)
        optimizer.step()
    after = fastdfa.alignment(model, F.cross_entropy, x, y)
    assert all(point.mean < 0.5 for point in before.points)
    assert all(point.mean > 0.9 for point in after.points)


def test_the_step_beside_it_is_plain():
    """Nothing learns in the backward pass, which goes round the layers."""
    model = mlp(WIDTHS)
    parameters = learning(model)
    for _ in range(2):
        step(model, X, G)
    assert model.planner._whole is not None
    assert all(B.grad is None for B in parameters)
    assert gradients(model)["0.weight"] is not None


def test_what_cannot_be_estimated():
    with pytest.raises(ValueError, match=r"call learn_feedback\('forward_gradient'\) once"):
        fastdfa.forward_gradient(mlp(WIDTHS), X)
    with pytest.raises(ValueError, match="Linear without one"):
        fastdfa.forward_gradient(nn.Linear(2, 2), X)
    with pytest.raises(ValueError, match="model must hold one DFA, got 2"):
        fastdfa.forward_gradient(nn.ModuleList([mlp(WIDTHS), mlp(WIDTHS)]), X)


def test_a_surrogate_is_differentiated_by_its_gate(monkeypatch):
    """What the first point adds passes the second layer's gate, not the derivative of a sign."""
    gate = fastdfa.Surrogate(torch.sign, lambda a: 1 / (1 + a * a))
    layers = [fastdfa.Linear(n, m, dtype=torch.float64) for n, m in pairwise([4, 6, 6, 3])]
    layers[0].activation = layers[1].activation = gate
    model = fastdfa.DFA(nn.Sequential(*layers))
    x = randn(5, 4)
    parameters = learning(model, x)
    before = [B.detach().clone() for B in parameters]
    drawn = watched(monkeypatch)
    fastdfa.forward_gradient(model, x)
    h = torch.sign(layers[0](x))
    a = layers[1].weight @ h.t() + layers[1].bias[:, None]
    first, second = drawn
    at_second = second + (first @ layers[1].weight.t()) / (1 + a.t() ** 2)
    d = at_second @ layers[2].weight.t()
    for B, p, old in zip(parameters, (first, second), before, strict=True):
        assert_close(B.grad, old - d.t() @ p / len(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.qkv = fastdfa.Linear(4, 8, activation="tanh"), fastdfa.Linear(8, 24)
        self.head = fastdfa.Linear(8, 3)

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(self.first(x)).chunk(3, -1))
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def test_through_attention_on_the_cpu():
    model, x = fastdfa.DFA(Attention()), torch.randn(2, 5, 4)
    parameters = learning(model, x)
    fastdfa.forward_gradient(model, x)
    for B in parameters:
        assert B.grad.isfinite().all() and not torch.equal(B.grad, B)


def test_a_layer_behind_a_point_makes_no_other():
    layers = [fastdfa.Linear(4, 6, activation="tanh"), nn.Linear(6, 6), fastdfa.FeedbackPoint()]
    model, x = fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(6, 3))), torch.randn(5, 4)
    (B,) = learning(model, x)
    fastdfa.forward_gradient(model, x)
    assert B.grad.shape == (3, 6)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Double(nn.Module):
    def forward(self, x):
        return Doubled.apply(x)


def test_a_layer_without_a_forward_derivative_is_refused():
    layers = [fastdfa.Linear(4, 6), fastdfa.FeedbackPoint(), Double(), fastdfa.Linear(6, 3)]
    model, x = fastdfa.DFA(nn.Sequential(*layers)), torch.randn(5, 4)
    parameters = learning(model, x)
    with pytest.raises(RuntimeError, match="forward-mode derivative of every layer, and one has"):
        fastdfa.forward_gradient(model, x)
    assert all(B.grad is None for B in parameters)


def test_matrices_that_are_not_there_yet_or_fit_no_point():
    anchored = fastdfa.DFA(mlp(WIDTHS).module, fastdfa.Feedback(anchor=5))
    with pytest.raises(ValueError, match=r"call learn_feedback\('forward_gradient'\) once"):
        fastdfa.forward_gradient(anchored, X)
    sizes = {str(i + 1): n for i, n in enumerate(WIDTHS[1:-1])}
    for given in ({"6": randn(3, 8)}, {k: randn(WIDTHS[-1], n + 1) for k, n in sizes.items()}):
        model = fastdfa.DFA(mlp(WIDTHS).module, matrices=given)
        model.matrices.requires_grad_(True)
        with pytest.raises(ValueError, match="matrices"):
            fastdfa.forward_gradient(model, X)
        assert all(B.grad is None for B in model.matrices.values())
