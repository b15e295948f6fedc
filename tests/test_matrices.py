"""Feedback matrices that the root holds: given ones, and ones that learn."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from formulas import mlp_forward
from networks import (
    BATCH,
    ERROR,
    TARGET,
    WIDTHS,
    assert_close,
    assert_streams_as_it_steps,
    expected_gradients,
    feedback_of,
    gradients,
    layers_of,
    mlp,
    randn,
    step,
)
from torch import nn

import fastdfa

X, G = BATCH, ERROR
EACH = {"1": randn(4, 7, seed=2), "2": randn(4, 6, seed=3)}
SHARED = randn(4, 8, seed=4)


def given(matrices, **options):
    return mlp(WIDTHS, ["tanh", "relu"], matrices=matrices, **options)


def learning(rule="kolen_pollack", **options):
    model = mlp(WIDTHS, ["tanh", "relu"], **options)
    model(X)
    model.learn_feedback(rule)
    return model


# Given.


@pytest.mark.parametrize("matrices, expected", [
    (EACH, [EACH["1"], EACH["2"]]), (SHARED, [SHARED[:, :7], SHARED[:, :6]]),
])  # fmt: skip
def test_gradients_of_given_matrices(matrices, expected):
    model = given(matrices)
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
        assert_close(gradients(model), expected_gradients(model, X, G, expected))
        for name, matrix in zip(("1", "2"), expected, strict=True):
            assert torch.equal(model.feedback_matrix(name), matrix)
    assert model._network is not None
    assert all(p.grad is None and not p.requires_grad for p in model.matrices.values())


def test_a_given_matrix_of_low_rank():
    """P [rank, n_l] is given, Q is the rule's."""
    P = {"1": randn(2, 7), "2": randn(2, 6)}
    model = given(P, feedback=fastdfa.Feedback(seed=1, rank=2))
    step(model, X, G)
    Q = model._low(4, torch.device("cpu")).double()
    assert Q.shape == (4, 2)
    assert_close(gradients(model), expected_gradients(model, X, G, [Q @ P["1"], Q @ P["2"]]))


def test_backprop_where_the_matrices_are_products_of_weights():
    """With B_l = W_L ... W_{l+1} a linear network gets its true gradients."""
    model = mlp(WIDTHS, "none", matrices=EACH)
    weights = [layer.weight.detach() for layer in model.module]
    with torch.no_grad():
        model.matrices["1"].copy_(weights[2] @ weights[1])
        model.matrices["2"].copy_(weights[2])
    step(model, X, G)
    fed = gradients(model)
    model.zero_grad()
    with fastdfa.backprop(model):
        step(model, X, G)
    assert_close(fed, gradients(model))


def test_values_that_change_are_used_by_the_next_step():
    model = given(EACH)
    for factor in (1, 2, 3):
        model.zero_grad()
        with torch.no_grad():
            model.matrices["1"].copy_(factor * EACH["1"])
        step(model, X, G)
        B = [factor * EACH["1"], EACH["2"]]
        assert_close(gradients(model), expected_gradients(model, X, G, B))
    model.matrices["1"].data = EACH["1"].clone()  # other memory
    model.zero_grad()
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G, list(EACH.values())))


def test_points_of_nested_names_and_images():
    """In channels_last as well, where a generated B would be reordered."""
    body = nn.Sequential(fastdfa.Conv2d(2, 3, 3, activation="relu"), nn.Flatten())
    B = randn(4, 12)
    model = fastdfa.DFA(nn.Sequential(body, fastdfa.Linear(12, 4)).double(), matrices={"1": B})
    x = randn(5, 2, 4, 4)
    for memory in (torch.contiguous_format, torch.channels_last):
        model.zero_grad()
        y = model(x.to(memory_format=memory))
        (y * G[:5]).sum().backward()
        plain = F.conv2d(x, model.module[0][0].weight, model.module[0][0].bias).relu()
        expected = torch.autograd.grad(plain.flatten(1), model.module[0][0].weight, G[:5] @ B)
        assert_close(model.module[0][0].weight.grad, expected[0])


def test_a_point_that_lies_as_channels_last():
    """Given columns are in logical order, where those of a generated B would be put in that of
    memory."""
    layers = [fastdfa.Conv2d(2, 3, 3, activation="relu"), fastdfa.FeedbackPoint(), nn.Flatten()]
    B = randn(4, 12)
    network = nn.Sequential(*layers, nn.Linear(12, 4)).double()
    model = fastdfa.DFA(network.to(memory_format=torch.channels_last), matrices=B)
    x = randn(5, 2, 4, 4).to(memory_format=torch.channels_last)
    (model(x) * G[:5]).sum().backward()
    plain = F.conv2d(x, layers[0].weight, layers[0].bias).relu()
    (expected,) = torch.autograd.grad(plain.flatten(1), layers[0].weight, G[:5] @ B)
    assert_close(layers[0].weight.grad, expected)


def test_checkpoint_copy_and_pickle():
    model = given(EACH)
    step(model, X, G)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = given({name: torch.zeros_like(B) for name, B in EACH.items()})
    other.load_state_dict(torch.load(file))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.zero_grad()
        step(twin, X, G)
        assert_close(gradients(twin), gradients(model))
    narrow = copy.deepcopy(model).float()
    narrow.zero_grad()
    step(narrow, X.float(), G.float())
    assert_close(gradients(narrow), gradients(model), 1e-5)


@pytest.mark.parametrize("matrices, error, message", [
    ([1, 2], TypeError, "matrices must be a tensor or a dict of tensors, got list"),
    ({"1": 3}, TypeError, r"matrices\['1'\] must be a tensor, got int"),
    ({"1": torch.ones(3)}, ValueError, r"floating matrix \[C, n\], got torch.float32 of shape"),
    (torch.ones(3, 3).long(), ValueError, "got torch.int64"),
])  # fmt: skip
def test_matrices_that_are_none(matrices, error, message):
    with pytest.raises(error, match=message):
        given(matrices)


@pytest.mark.parametrize("matrices, error, message", [
    ({"1": EACH["1"]}, ValueError, r"one for each feedback point, .*'2': '\[4, 6\]'.*, got 1$"),
    ({**EACH, "3": SHARED}, ValueError, "got 1, 2, 3$"),
    ({**EACH, "2": SHARED}, ValueError, r"expected \[4, 6\] for feedback point '2', got \(4, 8\)"),
    (SHARED[:, :6], ValueError, r"expected >= \[4, 7\] for feedback point '1', got \(4, 6\)"),
    (SHARED[:3], ValueError, r"got \(3, 8\)"),
    (SHARED.float(), TypeError, "expected torch.float64 for feedback point '1', got torch.float32"),
])  # fmt: skip
def test_matrices_that_do_not_fit(matrices, error, message):
    model = given(matrices)
    with pytest.raises(error, match=message):
        model(X)


def test_streaming_with_given_matrices():
    assert_streams_as_it_steps(lambda: given(EACH))


# Learning.


def hidden(model):
    return mlp_forward(layers_of(model), X)[1][:-1]


@pytest.mark.parametrize("options", [
    dict(), dict(feedback=fastdfa.Feedback(signal="sign", error="sum", shared=False)),
    dict(matrices=EACH), dict(matrices=SHARED),
])  # fmt: skip
@pytest.mark.parametrize("rule", ["kolen_pollack", "cross_correlation", lambda B, e, h: 3 * B])
def test_gradients_of_the_matrices(rule, options):
    """They start as they were; the error itself teaches them, whatever is projected."""
    before = mlp(WIDTHS, ["tanh", "relu"], **options)
    before(X)
    start = feedback_of(before)
    model = copy.deepcopy(before)
    model(X)
    parameters = model.learn_feedback(rule)
    assert model.feedback_points == ["1", "2"]
    assert_close(dict(enumerate(parameters)), dict(enumerate(start)))
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
        for B, h in zip(parameters, hidden(model), strict=True):
            expected = {
                "kolen_pollack": G.T @ h, "cross_correlation": B.detach() - G.T @ h
            }.get(rule, 3 * B.detach())  # fmt: skip
            assert_close(B.grad, expected)
    before.zero_grad()
    step(before, X, G)
    assert_close(gradients(model), gradients(before))


def test_the_last_matrix_learns_as_the_head():
    """So that with equal decay they come together (Kolen and Pollack)."""
    model = learning()
    step(model, X, G)
    assert_close(model.matrices["2"].grad, model.module[2].weight.grad)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    distance = [(model.matrices["2"] - model.module[2].weight).norm().item()]
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(X), TARGET).backward()
        optimizer.step()
        distance.append((model.matrices["2"] - model.module[2].weight).norm().item())
    assert abs(distance[-1] / distance[0] - 0.99**100) < 1e-6


def test_an_optimizer_moves_what_the_next_step_uses():
    model = learning()
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(model, X, G)
        expected = expected_gradients(model, X, G, [B.detach() for B in model.matrices.values()])
        assert_close(gradients(model), expected)
        optimizer.step()


@pytest.mark.parametrize("rule", ["kolen_pollack", "cross_correlation", lambda B, e, h: 3 * B])
def test_streaming_with_matrices_that_learn(rule):
    assert_streams_as_it_steps(lambda: learning(rule))


def test_positions():
    """What a point of positions reads counts as it is fed: a sum over positions, by their root."""
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), fastdfa.FeedbackPoint(features=1), nn.Flatten()]
    model = fastdfa.DFA(nn.Sequential(*layers, nn.Linear(12, 4)).double())
    x, g = randn(5, 2, 4, 4), randn(5, 4)
    model(x)
    (B,) = model.learn_feedback()
    step(model, x, g)
    h = model.module[0](x).relu().sum((2, 3)) / 2
    assert_close(B.grad, g.T @ h)


def test_tokens():
    model = learning()
    x, g = randn(3, 2, 5), randn(3, 2, 4)
    step(model, x, g)
    h = mlp_forward(layers_of(model), x)[1]
    for B, read in zip(model.matrices.values(), h[:-1], strict=True):
        assert_close(B.grad, g.flatten(0, 1).T @ read)


def test_in_bfloat16_under_autocast():
    model = mlp(WIDTHS, dtype=torch.float32)
    model(X.float())
    parameters = model.learn_feedback()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X.float())
    (y.float() * G.float()).sum().backward()
    for B, h in zip(parameters, mlp_forward(layers_of(model), X)[1], strict=False):
        assert B.dtype == B.grad.dtype == torch.float32
        assert_close(B.grad, G.T @ h, 2e-2)


def test_compiled():
    model = learning()
    compiled = torch.compile(model, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(model, X, G)
        eager = {n: p.grad for n, p in model.named_parameters()}
        optimizer.zero_grad()
        (compiled(X) * G).sum().backward()
        assert_close({n: p.grad for n, p in model.named_parameters()}, eager)
        optimizer.step()


def test_checkpoint_of_what_has_learnt():
    model = learning()
    with torch.no_grad():
        model.matrices["1"].mul_(2)
    other = learning()
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        step(each, X, G)
    assert_close(gradients(other), gradients(model))
    assert {"matrices.1", "matrices.2"} < set(model.state_dict())


def test_without_an_error_nothing_learns():
    model = learning()
    y = model(X)
    (y.detach().sum() * model.module[0].weight.sum()).backward()
    assert all(B.grad is None for B in model.matrices.values())


@pytest.mark.parametrize("rule, error, message", [
    ("hebb", ValueError, "rule must be one of 'kolen_pollack', 'cross_correlation', 'forward_"),
    (3, TypeError, "rule must be a name or callable, got int"),
])  # fmt: skip
def test_rules_that_are_none(rule, error, message):
    model = mlp(WIDTHS)
    model(X)
    with pytest.raises(error, match=message):
        model.learn_feedback(rule)


def test_what_cannot_learn():
    with pytest.raises(RuntimeError, match="call the model once before"):
        mlp(WIDTHS).learn_feedback()
    model = mlp(WIDTHS, feedback=fastdfa.Feedback(rank=2))
    model(X)
    with pytest.raises(ValueError, match="rank=2"):
        model.learn_feedback()
    model = learning(lambda B, e, h: B[:2])
    with pytest.raises(ValueError, match=r"must return shape \(4, 7\), got \(2, 7\)"):
        step(model, X, G)
