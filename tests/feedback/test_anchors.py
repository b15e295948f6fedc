"""Anchored feedback: some passes are backprop, and B is a least-squares fit to their gradients."""

import copy
import gc
import io
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import unit_feedback
from helpers.kinds import FASTDFA, KINDS, by_hand, data, images, run
from helpers.kinds import build as build_kind
from helpers.networks import (
    BATCH,
    ERROR,
    TARGET,
    WIDTHS,
    assert_close,
    difference,
    expected_gradients,
    feedback_of,
    gradients,
    mlp,
    randn,
    step,
)
from helpers.signals import sent, stream_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastdfa
from fastdfa.engine.anchor import Observation
from fastdfa.feedback import anchors

X, G = BATCH, ERROR
RULE = fastdfa.Feedback(seed=1, anchor=100)


def anchored(every=100, **options):
    rule = replace(RULE, anchor=every, **options.pop("rule", {}))
    torch.manual_seed(0)
    return mlp(WIDTHS, ["tanh", "relu"], feedback=rule, **options)


def with_positions(of):
    """One feedback for all positions of a channel."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), of.FeedbackPoint(features=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


class TwoReaders(nn.Module):
    """Two layers read one tensor, which is one point."""

    def __init__(self, of):
        super().__init__()
        self.first = of.Linear(5, 8, activation="tanh")
        self.left, self.right, self.head = of.Linear(8, 6), of.Linear(8, 6), of.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        return self.head(torch.tanh(self.left(h) * self.right(h)))


NETWORKS = KINDS | {
    "positions": (with_positions, images, lambda n: (n, 3)),
    "two readers": (TwoReaders, *KINDS["mlp"][1:]),
}


def build(kind, **options):
    torch.manual_seed(0)
    return fastdfa.DFA(NETWORKS[kind][0](FASTDFA).double(), **{"feedback": RULE} | options)


def given_to(kind, n=6):
    """Inputs, and an error for the output."""
    _, inputs, error = NETWORKS[kind]
    return inputs(n, torch.float64), randn(*error(n), seed=1)


def observed(kind, model, inputs, g):
    """Output, gradients and true gradients at the points of a network of torch's own layers."""
    of, cuts = by_hand(cuts=False)
    plain = NETWORKS[kind][0](of).to(g.dtype)
    plain.load_state_dict(model.module.state_dict())
    y = plain(*inputs)
    for x in cuts.tensors:
        x.retain_grad()
    (y * g).sum().backward()
    return y, gradients(plain), list(cuts)


def rows_of(cut, rows):
    """The true gradient at a point as [M, n_l], and the sum of its squares. Each position receives
    e B / sqrt(P), so least squares over all of them sees their sum over sqrt(P)."""
    grad, features = cut.tensor.grad, getattr(cut.reader, "features", None)
    square = (grad * grad).sum()
    if features is None:
        return grad.reshape(rows, -1), square
    one = grad.movedim(features, 1).reshape(rows, grad.shape[features], -1)
    return one.sum(2) / one.shape[2] ** 0.5, square


def fitted(passes):
    """B of a point and the share that it explains, from (z, g [M, n_l], square of g) of passes, by
    the inverse of the normal equations."""
    second, cross, square = 0.0, 0.0, 0.0
    for z, g, each in passes:
        size = (z * z).sum()
        second = anchors.FORGETTING * second + z.T @ z / size
        cross = anchors.FORGETTING * cross + z.T @ g / size
        square = anchors.FORGETTING * square + each / size
    ridge = anchors.RIDGE * second.trace() / len(second)
    B = torch.linalg.inv(second + ridge * torch.eye(len(second), dtype=z.dtype)) @ cross
    made = (B.T @ second @ B).trace()
    explained = (2 * (B.T @ cross).trace() - made) / square
    return B * (square / made).sqrt(), explained.item()


@pytest.mark.parametrize("kind", NETWORKS)
def test_first_pass_is_backprop_and_fits_every_b(kind, path):
    model = build(kind)
    inputs, g = given_to(kind)
    y, true, cuts = observed(kind, model, inputs, g)
    assert_close(run(model, inputs, g), y)
    assert_close(gradients(model), true)
    e = g.reshape(-1, g.shape[-1])
    shares = model.explained
    assert list(shares) == model.feedback_points
    for name, cut in zip(model.feedback_points, cuts, strict=True):
        rows, square = rows_of(cut, len(e))
        B, explained = fitted([(e, rows, square)])
        assert_close(model.feedback_matrix(name), B, 1e-8)
        assert shares[name] == pytest.approx(explained, abs=1e-8)


@pytest.mark.parametrize("kind", NETWORKS)
def test_between_anchors_a_pass_is_that_of_given_matrices(kind, path):
    model = build(kind)
    run(model, *given_to(kind))
    for _ in range(2):  # that of number 1 is an anchor, that of number 3 is none
        model.zero_grad()
        run(model, *given_to(kind))
    model.zero_grad()
    run(model, *given_to(kind))
    B = {name: model.feedback_matrix(name) for name in model.feedback_points}
    other = build(kind, feedback=replace(RULE, anchor=None), matrices=B)
    other.module.load_state_dict(model.module.state_dict())
    run(other, *given_to(kind))
    assert_close(gradients(model), gradients(other))


def test_feedback_is_as_long_as_the_true_gradient():
    model = anchored()
    y = model(X)
    (y * G).sum().backward()
    passes = {1: None, 2: None}
    h = X
    with fastdfa.backprop(model):
        outputs = []
        for layer in model.module:
            h = layer(h)
            outputs.append(h)
    true = torch.autograd.grad((h * G).sum(), outputs[:-1])
    for name, g in zip(passes, true, strict=True):
        made = G @ model.feedback_matrix(str(name))
        assert made.square().sum().item() == pytest.approx(g.square().sum().item(), rel=1e-8)


def test_sums_run_over_anchors_whatever_the_length_of_their_errors():
    model, passes = anchored(every=1), {"1": [], "2": []}
    for number, scale in enumerate([1.0, 1e-3, 30.0]):
        x, g = randn(9, WIDTHS[0], seed=number), scale * randn(9, WIDTHS[-1], seed=number + 7)
        a = [x]
        for layer in model.module:
            a.append(layer(a[-1]))
        true = torch.autograd.grad((a[-1] * g).sum(), a[1:-1])
        for name, each in zip(passes, true, strict=True):
            passes[name].append((g, each, each.square().sum()))
        step(model, x, g)
        with torch.no_grad():
            for p in model.module.parameters():
                p -= 0.1 * p.grad / scale
        model.zero_grad()
    for name, each in passes.items():
        assert_close(model.feedback_matrix(name), fitted(each)[0], 1e-8)


def test_anchors_are_doubled_at_first_and_regular_then(path):
    model, found = anchored(every=8), []
    for number in range(26):
        model.zero_grad()
        with fastdfa.backprop(model):
            step(model, X, G)
        true = gradients(model)
        model.zero_grad()
        step(model, X, G)
        if all(difference(p, true[name]) < 1e-9 for name, p in gradients(model).items()):
            found.append(number)
        else:
            assert_close(gradients(model), expected_gradients(model, X, G, feedback_of(model)))
    assert found == [0, 1, 2, 4, 8, 16, 24]


def test_passes_anchor_until_one_has_been_through_its_backward_pass():
    model = anchored()
    for _ in range(3):
        model(X)  # and no backward pass
    assert not model.explained
    step(model, X, G)  # number 3, which is no anchor otherwise
    assert list(model.explained) == ["1", "2"]


def test_diagnostics_and_passes_without_gradients_are_not_counted():
    model = anchored()
    step(model, X, G)
    with torch.no_grad():
        model(X)
    with fastdfa.backprop(model):
        model(X)
    fastdfa.alignment(model, lambda y, g: (y * g).sum(), X, G)
    fastdfa.inspect(model, X)
    assert model.anchors.count == 1


def test_alignment_of_the_pass_that_was_fitted():
    """At the last point the gradient is linear in e, and the fit exact but for the ridge."""
    model = mlp([5, 6, 7, 4], "tanh", feedback=RULE)
    x, g = randn(50, 5), randn(50, 4, seed=1)
    step(model, x, g)
    found = fastdfa.alignment(model, lambda y, g: (y * g).sum(), x, g)
    assert found["2"].mean > 0.999
    assert 0.5 < found["1"].mean < 0.999


def true_gradients(model, x, g):
    """At the two points of an MLP of three layers."""
    a = [x]
    for layer in model.module:
        a.append(layer(a[-1]))
    return torch.autograd.grad((a[-1] * g).sum(), a[1:-1])


def projected(model, g, y):
    """What the rule of a model sends, by formulas of its own."""
    rule = model.feedback
    if rule.rank is None:
        return sent(rule.signal, g, y, False, TARGET)
    Q = unit_feedback(rule.seed, g.shape[1], rule.rank, "normal", stream_of("Q of B = Q P"))
    return g @ Q / rule.rank**0.5


@pytest.mark.parametrize("rule", [
    {"signal": "sign"}, {"signal": "quantized"}, {"rank": 2}, {"signal": "target"},
], ids=str)  # fmt: skip
def test_b_is_fitted_for_what_is_sent(rule, path):
    model, plain = anchored(rule=rule), anchored()
    model.target = TARGET
    y = step(model, X, G)
    step(plain, X, G)
    assert_close(gradients(model), gradients(plain))
    z = projected(model, G, y)
    for size, g in zip(model.planner.layout.points, true_gradients(model, X, G), strict=True):
        made = model.bank.matrix(model.read_seed(), model.planner.layout, size)
        assert_close(made, fitted([(z, g, g.square().sum())])[0], 1e-6)


def test_a_tap():
    body = nn.Sequential(*anchored().module)
    head = nn.Linear(WIDTHS[-1], 2).double()
    model = fastdfa.DFA(nn.Sequential(body, head), RULE, output="0")
    y = model(X)
    y.square().sum().backward()
    true = gradients(model)
    model.zero_grad()
    with fastdfa.backprop(model):
        model(X).square().sum().backward()
    assert_close(true, gradients(model))
    assert list(model.explained) == ["0.1", "0.2"]


def test_gradients_accumulate():
    model, other = anchored(), anchored()
    other.load_state_dict(model.state_dict())
    for rows in (slice(0, 3), slice(3, None)):
        step(model, X[rows], G[rows])  # numbers 0 and 1 anchor
    with fastdfa.backprop(other):
        step(other, X, G)
    assert_close(gradients(model), gradients(other))


@pytest.mark.parametrize("context", [
    nullcontext, lambda: torch.autocast("cpu", torch.bfloat16),
], ids=["plain", "autocast"])  # fmt: skip
def test_a_scaled_loss_fits_the_same(context):
    made = []
    for scale in (1.0, 2.0**14):
        model = anchored(dtype=torch.float32)
        for number, factor in enumerate((1.0, scale)):  # of other inputs and errors
            x, g = (randn(*each.shape, seed=number + 5).float() for each in (X, G))
            with context():
                y = model(x)
            ((y * g).sum() * factor).backward()
        made.append(model.feedback_matrix("1"))
    assert_close(*made, 1e-2 if context is not nullcontext else 1e-5)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
def test_an_anchor_without_an_error_or_not_finite_is_left_out(bad):
    model = anchored()
    step(model, X, G)
    before = feedback_of(model)
    step(model, X, G * bad)
    assert all(map(torch.equal, before, feedback_of(model)))
    step(model, X, G)
    assert all(matrix.isfinite().all() for matrix in feedback_of(model))


def test_a_first_anchor_without_an_error_leaves_the_drawn_b():
    model = anchored()
    step(model, X, G * 0)
    plain = anchored(every=None)
    step(plain, X, G)
    assert all(map(torch.equal, feedback_of(model), feedback_of(plain)))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = anchored(every=3, rule={"seed": 9})
    other.load_state_dict(torch.load(file))
    return other


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [saved_and_loaded, copy.deepcopy, pickled])
def test_a_resumed_run_goes_on_bit_by_bit(through):
    def train(model, first, last):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for number in range(first, last):
            optimizer.zero_grad()
            step(model, X + number, G)
            optimizer.step()

    model = anchored(every=3)
    train(model, 0, 5)
    other = through(model)
    train(model, 5, 12)
    train(other, 5, 12)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_rule_given_later():
    model = anchored(every=None)
    step(model, X, G)
    model.feedback = replace(model.feedback, anchor=10)
    step(model, X, G)
    assert list(model.explained) == ["1", "2"]
    fit = feedback_of(model)
    model.feedback = replace(model.feedback, anchor=None)  # B stays
    for _ in range(3):
        model.zero_grad()
        step(model, X, G)
        assert_close(gradients(model), expected_gradients(model, X, G, fit))


def test_b_begins_with_given_matrices():
    given = {"1": randn(4, 7, seed=2), "2": randn(4, 6, seed=3)}
    model = anchored(matrices=given)
    model(X)
    assert all(torch.equal(model.feedback_matrix(name), B) for name, B in given.items())
    step(model, X, G)
    assert all(difference(model.feedback_matrix(name), B) > 0.1 for name, B in given.items())


class Skipped(nn.Module):
    """A block that is there in some passes only, as by stochastic depth."""

    def __init__(self):
        super().__init__()
        self.inside, self.block = fastdfa.Linear(5, 7, activation="tanh"), nn.Identity()
        self.block = fastdfa.Linear(7, 7, activation="tanh")
        self.head = fastdfa.Linear(7, 4)
        self.skip = True

    def forward(self, x):
        h = self.inside(x)
        return self.head(h if self.skip else self.block(h))


def test_a_point_that_comes_later_has_a_drawn_b_until_the_next_anchor():
    model = fastdfa.DFA(Skipped().double(), replace(RULE, anchor=2, shared=False))
    x, g = randn(6, 5), randn(6, 4)
    step(model, x, g)
    step(model, x, g)
    step(model, x, g)
    model.module.skip = False
    step(model, x, g)  # number 3, no anchor
    assert list(model.explained) == ["head"]
    step(model, x, g)
    assert list(model.explained) == ["block", "head"]


class Checkpointed(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.first = fastdfa.Linear(5, 8, activation="tanh")
        self.block = nn.Sequential(fastdfa.Linear(8, 8, activation="tanh"), nn.LayerNorm(8))
        self.head, self.checkpointed = fastdfa.Linear(8, 4), checkpointed

    def forward(self, x):
        h = self.first(x)
        h = checkpoint(self.block, h, use_reentrant=False) if self.checkpointed else self.block(h)
        return self.head(h)


def test_activation_checkpoints():
    made = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = fastdfa.DFA(Checkpointed(checkpointed).double(), RULE)
        for _ in range(4):
            step(model, randn(6, 5), randn(6, 4))
        made.append({**gradients(model), "B": model.feedback_matrix("head")})
    assert_close(*made)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_anchors(backend):
    model, plain = anchored(every=4), anchored(every=4)
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend=backend)
    for number in range(10):
        for each, called in ((model, compiled), (plain, plain)):
            each.zero_grad()
            (called(X + number) * G).sum().backward()
        assert_close(gradients(model), gradients(plain))
    torch._dynamo.reset()


def test_nothing_is_kept_of_an_anchor(monkeypatch):
    """Neither the true gradients and the error after the backward pass, nor the rest without y."""
    model, gradient, kept, passes = anchored(), Observation.gradient, [], []

    def watched(self, number, arrived):
        passes.append(weakref.ref(self))
        kept.extend(StorageWeakRef(x.untyped_storage()) for x in (arrived, self.sent))
        gradient(self, number, arrived)

    monkeypatch.setattr(Observation, "gradient", watched)
    gc.collect()
    gc.disable()
    try:
        y = model(X)
        (y * randn(*G.shape, seed=3)).sum().backward()
        assert len(kept) == 4 and all(reference.expired() for reference in kept)
        assert all(reference() is not None for reference in passes)  # y holds the graph
        del y
        assert all(reference() is None for reference in passes)
    finally:
        gc.enable()


def test_fitted_b_lies_as_channels_last_points_do():
    """The copies in that order follow B, which an anchor fits anew between the passes."""
    model = build_kind("cnn", torch.float32, feedback=replace(RULE, anchor=100))
    model = model.to(memory_format=torch.channels_last)
    for number in range(6):  # 0, 1, 2 and 4 anchor
        (x,), g = data("cnn", dtype=torch.float32)
        x = (x + 0.3 * number).to(memory_format=torch.channels_last)
        model.zero_grad()
        run(model, (x,), g * (1 + g[:, :1] * number))
        if number in (3, 5):
            B = {name: model.feedback_matrix(name) for name in model.feedback_points}
            other = build_kind("cnn", torch.float32, matrices=B)
            other.module.load_state_dict(model.module.state_dict())
            run(other, (x,), g * (1 + g[:, :1] * number))
            assert any(product.order for product in model.planner._plan.products)
            assert_close(gradients(model), gradients(other), 1e-5)


# Refused.


@pytest.mark.parametrize("make, words", [
    (lambda: fastdfa.Feedback(anchor=0), "anchor must be a positive int or None, got 0"),
    (lambda: fastdfa.Feedback(anchor=True), "anchor must be an int or None, got bool True"),
    (lambda: fastdfa.Feedback(anchor="often"), "anchor must be an int or None, got str 'often'"),
    (lambda: fastdfa.Feedback(anchor=9, error="sum"), "expected error='mean'"),
    (lambda: fastdfa.Feedback(anchor=9, dense=False), "anchor fits a B that is in memory"),
    (lambda: anchored(matrices=randn(4, 8)), "anchor fits a B for each point"),
    (lambda: anchored(projector=lambda z: z), "cannot go with a projector's"),
    (lambda: anchored().learn_feedback(), "needs a B without anchors"),
], ids=range(8))  # fmt: skip
def test_refused(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_learning_b_refuses_anchors():
    model = mlp(WIDTHS, "tanh")
    step(model, X, G)
    model.learn_feedback()
    with pytest.raises(ValueError, match="one that learns otherwise"):
        model.feedback = replace(model.feedback, anchor=3)
    assert model.feedback.anchor is None


def test_many_columns_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("fastdfa.engine.anchor.MOST_COLUMNS", 3)
    with pytest.raises(ValueError, match=r"at most 3 columns, got 4.*rank.*output=name"):
        anchored()(X)
    step(anchored(rule={"rank": 3}), X, G)


def test_a_streaming_step_refuses_anchors():
    model = anchored()
    streaming = fastdfa.StreamingStep(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match=r"expected Feedback\(anchor=None\), got anchor=100"):
        streaming(lambda: F.cross_entropy(model(X), TARGET))
