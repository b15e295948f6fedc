"""Points that are fed in turn, where the workspace does not hold all of them: the gradients are the
same, and one projection exists at a time."""

import itertools

import pytest
import torch
from helpers.networks import (
    RULE,
    Apply,
    assert_close,
    blockwise_gradients,
    expected_gradients,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastdfa

X, G = randn(6, 5), randn(6, 3)


@pytest.fixture(autouse=True)
def _no_workspace(monkeypatch):
    monkeypatch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})


@pytest.fixture
def projections(monkeypatch):
    """What was made in each call: weak references to the products."""
    made, op = [], fastdfa.ops.project_gate

    def counted(*args, **options):
        made.append([])
        deltas, sums = op(*args, **options)
        made[-1] += [StorageWeakRef(d.untyped_storage()) for d in deltas]
        return deltas, sums

    monkeypatch.setattr(fastdfa.ops, "project_gate", counted)
    return made


def blocks(widths=(5, 12, 8, 10, 3), point=fastdfa.FeedbackPoint):
    torch.manual_seed(3)
    pairs = list(itertools.pairwise(widths))
    layers = [nn.Sequential(nn.Linear(n, m), nn.LayerNorm(m), nn.Tanh(), point()) for n, m in pairs]
    layers[-1] = nn.Sequential(nn.Linear(*pairs[-1]))
    return nn.Sequential(*layers).double()


def check(model, factor=1):
    """The gradients are those of each block on its own, times a factor."""
    widths = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    plain = blocks([*widths, 3], nn.Identity)
    feedback = [model.feedback_matrix(name) for name in model.feedback_points]
    expected, _ = blockwise_gradients(plain, X, G, feedback)
    for p, right in zip(model.parameters(), [p for b in expected for p in b.values()], strict=True):
        assert_close(p.grad, factor * right)


def test_one_projection_exists_at_a_time(projections):
    model = fastdfa.DFA(blocks(), feedback=RULE)
    y = model(X)
    alive = []

    def count(grad):
        alive.append(sum(not r.expired() for made in projections for r in made))

    for block in model.module[:3]:
        block[0].weight.register_hook(count)
    (y * G).sum().backward()
    assert [len(made) for made in projections] == [1, 1, 1]
    assert alive == [0, 0, 0]  # by the time its weight has a gradient, its projection is gone
    check(model)


@pytest.mark.parametrize("few, made", [(2, 1), (3, 3)])
def test_points_of_one_size_share_a_projection_that_is_dear(projections, monkeypatch, few, made):
    """Of three classes; where that is few, each is made anew, and gone before the next."""
    monkeypatch.setattr(fastdfa.engine.broadcast, "FEW_CLASSES", few)
    monkeypatch.setattr(fastdfa.engine.broadcast, "SMALL_BYTES", 0)
    model = fastdfa.DFA(blocks([5, 8, 8, 8, 3]), feedback=RULE)
    loss = (model(X) * G).sum()
    alive = []
    for block in model.module[:3]:
        block[0].weight.register_hook(
            lambda grad: alive.append(sum(not r.expired() for r in itertools.chain(*projections)))
        )
    loss.backward()
    assert len(projections) == made and all(r.expired() for r in itertools.chain(*projections))
    assert alive == ([1, 1, 0] if made == 1 else [0, 0, 0])
    check(model)


def test_layers_gate_what_they_are_fed(projections, monkeypatch):
    """Those that are read by a layer with their projection, those before a view on their own."""
    model = mlp([5, 12, 8, 3])
    model.module.insert(2, Apply(lambda h: h.view_as(h)))
    gates, op = [], fastdfa.ops.gate

    def counted(grad, *args):
        gates.append(tuple(grad.shape))
        return op(grad, *args)

    monkeypatch.setattr(fastdfa.ops, "gate", counted)
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G))
    assert gates == [(6, 8)] and len(projections) == 2


@pytest.mark.parametrize("logits", [0, 1])
@pytest.mark.parametrize("activation", ["tanh", None])
def test_a_gradient_from_elsewhere_is_added(activation, logits):
    """A loss on an activation, with and without the one that has the feedback."""

    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(5, 8, activation=activation)
            self.second = nn.Sequential(fastdfa.Linear(8, 7), nn.Tanh())
            self.head = fastdfa.Linear(7, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(self.second(h)), h

    model = fastdfa.DFA(Aux().double(), feedback=RULE, output="head")
    a = randn(6, 8, seed=5)
    y, h = model(X)
    ((h * a).sum() + logits * (y * G).sum()).backward()
    signal = logits * (G @ model.feedback_matrix("second.0")) + a
    delta = signal * (1 - h.detach() ** 2) if activation else signal
    assert_close(model.module.first.weight.grad, delta.T @ X)
    # A backward pass of a part leaves nothing behind for the next.
    model.zero_grad()
    y, h = model(X)
    torch.autograd.grad((y * G).sum(), model.module.second[0].weight, retain_graph=True)
    (h * a).sum().backward()
    delta = a * (1 - h.detach() ** 2) if activation else a
    assert_close(model.module.first.weight.grad, delta.T @ X)


def test_several_backward_passes_of_one_forward():
    model = fastdfa.DFA(blocks(), feedback=RULE)
    loss = (model(X) * G).sum()
    loss.backward(retain_graph=True)
    check(model)
    loss.backward()
    check(model, factor=2)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_several_forward_passes_before_a_backward():
    model = fastdfa.DFA(blocks(), feedback=RULE)
    first, second = (model(X) * G).sum(), (model(X) * G).sum()
    (first + 2 * second).backward()
    check(model, factor=3)


def test_the_error_is_let_go():
    """Though the loss is kept."""
    model = fastdfa.DFA(blocks(), feedback=RULE)
    errors = []
    y = model(X)
    y.register_hook(lambda e: errors.append(StorageWeakRef(e.untyped_storage())))
    loss = (y * G).sum()
    del y
    loss.backward()
    assert len(errors) == 1 and errors[0].expired()


def test_a_second_derivative_is_refused():
    model = fastdfa.DFA(blocks(), feedback=RULE)
    loss = (model(X) ** 2).sum()
    weight = model.module[0][0].weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_no_error_feeds_nothing():
    """An output that does not reach the loss."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks()

        def forward(self, x):
            return self.blocks(x), x

    model = fastdfa.DFA(Two(), feedback=RULE, output="blocks")
    x = X.clone().requires_grad_()
    (model(x)[1] * 2).sum().backward()
    assert all(p is None for p in gradients(model).values())


def test_a_compiled_model_is_not_fed_in_turn():
    """Hooks of nodes are no part of a graph."""
    model = fastdfa.DFA(blocks(), feedback=RULE)
    try:
        step(torch.compile(model, backend="aot_eager", fullgraph=True), X, G)
    finally:
        torch._dynamo.reset()
    check(model)


def test_inspect_sees_the_points_of_a_large_model():
    model = fastdfa.DFA(blocks(), feedback=RULE)
    rows = fastdfa.inspect(model, X).rows
    points = [(f"{row.name[0]}.3",) for row in rows[:-2]] + [()] * 2
    assert [row.points for row in rows] == points
    assert [row.true_gradient for row in rows] == [False] * (len(rows) - 2) + [True] * 2


def test_layers_compiled_one_by_one():
    """One node for all of a layer, of whose outputs one is fed."""
    layers = [
        fastdfa.Linear(5, 12, activation="tanh"), nn.LayerNorm(12), fastdfa.Linear(12, 8),
        nn.Tanh(), fastdfa.Linear(8, 3),
    ]  # fmt: skip
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    step(model, X, G)
    expected = gradients(model)
    model.zero_grad()
    for layer in layers:
        layer.compile(backend="aot_eager")
    try:
        step(model, X, G)
    finally:
        torch._dynamo.reset()
    assert_close(gradients(model), expected)
