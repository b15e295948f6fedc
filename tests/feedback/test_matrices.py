"""Feedback matrices that the root holds: given ones, and ones that learn."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.formulas import mlp_forward
from helpers.networks import (
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
    model.target = TARGET
    model(X)
    model.learn_feedback(rule)
    return model


# Given.


@pytest.mark.parametrize("matrices, expected", [
    (EACH, [EACH["1"], EACH["2"]]), (SHARED, [SHARED[:, :7], SHARED[:, :6]]),
])  # fmt: skip
def test_gradients_of_given_matrices(matrices, expected, path):
    model = given(matrices)
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
        assert_close(gradients(model), expected_gradients(model, X, G, expected))
        for name, matrix in zip(("1", "2"), expected, strict=True):
            assert torch.equal(model.feedback_matrix(name), matrix)
    assert (model.planner._whole is not None) == (path == "network")
    assert all(p.grad is None and not p.requires_grad for p in model.matrices.values())


@pytest.mark.usefixtures("path")
def test_a_given_matrix_of_low_rank():
    """P [rank, n_l] is given, Q is the rule's."""
    P = {"1": randn(2, 7), "2": randn(2, 6)}
    model = given(P, feedback=fastdfa.Feedback(seed=1, rank=2))
    step(model, X, G)
    Q = model.bank.low(1, 4, torch.device("cpu")).double()
    assert Q.shape == (4, 2)
    assert_close(gradients(model), expected_gradients(model, X, G, [Q @ P["1"], Q @ P["2"]]))


@pytest.mark.usefixtures("path")
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


def test_the_matrices_that_learn_come_in_the_order_of_the_points():
    """Of the points, not of their names: "10" is behind "2"."""
    model = mlp([5, *range(6, 17), 3])
    model(X)
    parameters = model.learn_feedback()
    assert model.feedback_points == [str(n) for n in range(1, 12)]
    assert [tuple(B.shape) for B in parameters] == [(3, n) for n in range(6, 17)]


@pytest.mark.usefixtures("path")
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


@pytest.mark.usefixtures("path")
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


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rank", [None, 3])
def test_an_optimizer_moves_what_the_next_step_uses(rank):
    """B itself or, of low rank, both of its factors."""
    model = learning(feedback=fastdfa.Feedback(seed=1, rank=rank))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    Q = torch.eye(4) if rank is None else model.compression
    for _ in range(3):
        optimizer.zero_grad()
        step(model, X, G)
        B = [Q.detach().double() @ each.detach() for each in model.matrices.values()]
        assert_close(gradients(model), expected_gradients(model, X, G, B))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        assert not any(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


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


# Low rank: B = Q P, both learn.


def low_rank(rule="kolen_pollack", compression="oja", rank=3, **options):
    feedback = fastdfa.Feedback(**{"seed": 1, "rank": rank, **options})
    model = mlp(WIDTHS, ["tanh", "relu"], feedback=feedback)
    model(X)
    model.learn_feedback(rule, compression)
    return model


def oja_by_rows(Q, e):
    """Q z z^T - e z^T of every row, over the root of the mean of e^T e."""
    total = torch.zeros_like(Q)
    for row in e:
        z = row @ Q
        total += torch.outer(Q @ z, z) - torch.outer(row, z)
    return total / (sum(row @ row for row in e) / len(e)).sqrt()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("options", [
    dict(), dict(signal=fastdfa.signals.Sign(centred=True), error="sum", shared=False),
    dict(signal=fastdfa.signals.Quantized(raw=True), density=0.5), dict(rank=9),
])  # fmt: skip
@pytest.mark.parametrize("rule", ["kolen_pollack", "cross_correlation", lambda P, e, h: e.T @ h])
def test_gradients_of_both_factors(rule, options):
    """They start as they were; P learns from e Q, and Q from e, whatever is projected."""
    feedback = fastdfa.Feedback(**{"seed": 1, "rank": 3, **options})
    before, rank = mlp(WIDTHS, ["tanh", "relu"], feedback=feedback), feedback.rank
    before(X)
    start = feedback_of(before)
    model = copy.deepcopy(before)
    model(X)
    *P, Q = model.learn_feedback(rule)
    assert [tuple(each.shape) for each in (*P, Q)] == [(rank, 7), (rank, 6), (4, rank)]
    assert_close(dict(enumerate(feedback_of(model))), dict(enumerate(start)), 1e-6)
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
        assert_close(Q.grad, oja_by_rows(Q.detach(), G))
        for each, h in zip(P, hidden(model), strict=True):
            expected = (G @ Q.detach()).T @ h
            if rule == "cross_correlation":
                expected = each.detach() - expected
            assert_close(each.grad, expected)
    before.zero_grad()
    step(before, X, G)
    assert_close(gradients(model), gradients(before), 1e-6)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("rule", ["kolen_pollack", "cross_correlation"])
def test_full_rank_without_compression_is_the_plain_rule(rule):
    plain, model = learning(rule), low_rank(rule, rank=4)
    model.module.load_state_dict(plain.module.state_dict())
    with torch.no_grad():
        model.compression.copy_(torch.eye(4))
        for P, B in zip(model.matrices.values(), plain.matrices.values(), strict=True):
            P.copy_(B)
    for each in (plain, model):
        step(each, X, G)
    assert_close(gradients(model), gradients(plain))
    for P, B in zip(model.matrices.values(), plain.matrices.values(), strict=True):
        assert_close(P.grad, B.grad)


def test_the_compression_follows_the_error():
    """Its columns become orthonormal and span the largest principal directions of e."""
    model = low_rank(rank=2)
    u, _, v = torch.linalg.svd(randn(9, 4, seed=6), full_matrices=False)
    e = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]).double()) @ v
    optimizer = torch.optim.SGD([model.compression], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        step(model, X, e)
        optimizer.step()
    Q = model.compression.detach()
    assert_close(Q.T @ Q, torch.eye(2), 1e-6)
    assert_close(Q @ Q.T, v[:2].T @ v[:2], 1e-6)
    optimizer.zero_grad()
    model.zero_grad()
    step(model, X, e)
    assert_close(gradients(model), expected_gradients(model, X, e))


def test_the_gradient_of_the_compression_grows_as_the_loss():
    """Not as its square; and a mean over more rows of the same kind leaves it as it is."""
    model, found = low_rank(), []
    for x, g in ((X, G), (X, 1024 * G), (torch.cat([X, X]), torch.cat([G, G]) / 2)):
        model.zero_grad()
        step(model, x, g)
        found.append(model.compression.grad)
    assert_close(found[1], 1024 * found[0])
    assert_close(found[2], found[0])
    model.zero_grad()
    step(model, X, 0 * G)
    assert not model.compression.grad.any()


def test_a_compression_that_stays_and_one_of_ones_own():
    model = low_rank(compression=None)
    assert model.learn_feedback(compression=None) == list(model.matrices.values())
    before = model.compression.detach().clone()
    step(model, X, G)
    assert not model.compression.requires_grad and model.compression.grad is None
    assert "compression" in model.state_dict()
    for P, h in zip(model.matrices.values(), hidden(model), strict=True):
        assert_close(P.grad, (G @ before).T @ h)
    *_, Q = model.learn_feedback(compression=lambda Q, e: 2 * Q + e.sum())
    assert torch.equal(Q, before)
    model.zero_grad()
    step(model, X, G)
    assert_close(Q.grad, 2 * before + G.sum())


def test_checkpoint_copy_and_pickle_of_both_factors():
    model = low_rank()
    step(model, X, G)
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.zero_grad()
    other = low_rank(seed=2)
    other.load_state_dict(model.state_dict())
    step(model, X, G)
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.zero_grad()
        step(twin, X, G)
        ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (twin, model))
        assert_close(ours, theirs)


def test_both_factors_at_an_image_under_autocast_and_compiled():
    layers = [fastdfa.Conv2d(2, 3, 3, activation="relu"), nn.Flatten(), fastdfa.Linear(12, 4)]
    model = fastdfa.DFA(nn.Sequential(*layers), fastdfa.Feedback(seed=1, rank=2))
    x, g = randn(5, 2, 4, 4), G[:5].float()
    model(x.float())
    P, Q = model.learn_feedback()
    h = F.conv2d(x.float(), layers[0].weight, layers[0].bias).relu().flatten(1).double()
    e = g.double()

    def stepped(run):
        model.zero_grad()
        (run(x.float()).float() * g).sum().backward()
        return P.grad, Q.grad

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    torch._dynamo.reset()  # another test's sizes would make these dynamic
    runs = [(model, 1e-5), (under_autocast, 2e-2), (torch.compile(model, fullgraph=True), 1e-5)]
    for run, tolerance in runs:
        of_p, of_q = stepped(run)
        assert of_p.dtype == of_q.dtype == torch.float32
        assert_close(of_p, (e @ Q.detach().double()).T @ h, tolerance)
        assert_close(of_q, oja_by_rows(Q.detach().double(), e), tolerance)


# Local classifiers.


def classifying(**options):
    return learning("local_classifier", **options)


def stepped(model, target=TARGET, x=X, g=G):
    model.zero_grad()
    model.target = target
    return step(model, x, g)


@pytest.mark.usefixtures("path")
def test_the_gradient_of_local_classifiers():
    """softmax(h B^T) - onehot, written out, of rows and of tokens; not of the error."""
    model = classifying()
    ignored = torch.where(TARGET == 1, -100, TARGET)
    tokens = (TARGET[:6].view(2, 3), X[:6].view(2, 3, 5), G[:6].view(2, 3, 4))
    for target, x, g in ((TARGET, X, G), (ignored, X, 5 * G), tokens):
        stepped(model, target, x, g)
        rows = target.flatten()
        kept = rows >= 0
        for B, h in zip(model.matrices.values(), mlp_forward(layers_of(model), x)[1], strict=False):
            logits = h @ B.detach().T
            p = logits.exp() / logits.exp().sum(1, keepdim=True)
            p[kept, rows[kept]] -= 1
            assert_close(B.grad, (p * kept[:, None]).T @ h / kept.sum())
    stepped(model, torch.full_like(TARGET, -100))
    assert all(not B.grad.any() for B in model.matrices.values())


def test_local_classifiers_of_probabilities():
    model, target = classifying(), randn(9, 4, seed=7).softmax(1)
    stepped(model, target)
    for B, h in zip(model.matrices.values(), hidden(model), strict=True):
        weight = B.detach().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(h @ weight.T, target), weight)
        assert_close(B.grad, expected)


def test_the_head_is_the_last_local_classifier():
    """With the head's weight for B and no bias both have the gradient of one loss."""
    model = classifying(bias=[True, True, False])
    with torch.no_grad():
        model.matrices["2"].copy_(model.module[2].weight)
    model.target = TARGET
    F.cross_entropy(model(X), TARGET).backward()
    assert_close(model.matrices["2"].grad, model.module[2].weight.grad)


@pytest.mark.parametrize("signal", ["error", "sign", "target"])
def test_what_local_classifiers_feed_back(signal):
    """The signal of the output through B as it is; one target for the signal and the rule."""
    model = classifying(feedback=fastdfa.Feedback(seed=1, signal=signal))
    stepped(model)
    onehot = F.one_hot(TARGET, 4).double()
    made = {"error": G, "sign": G.sign(), "target": -onehot}[signal]
    sent = made * (G.norm(dim=1) / made.norm(dim=1))[:, None]
    assert_close(gradients(model), expected_gradients(model, X, G, sent=sent))
    assert all(B.grad.norm() > 0 for B in model.matrices.values())
    assert model.target is None


def test_a_rule_of_ones_own_with_the_target():
    model = learning(lambda B, error, h, target: B + (error * target).T @ h)
    stepped(model)
    for B, h in zip(model.matrices.values(), hidden(model), strict=True):
        assert_close(B.grad, B.detach() + (G * F.one_hot(TARGET, 4)).T @ h)


def test_around_local_classifiers():
    """Compiled, measured, inspected, in bfloat16; what is measured leaves the target."""
    model = classifying()
    stepped(model)
    eager = {n: p.grad for n, p in model.named_parameters()}
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    model.target = TARGET
    (compiled(X) * G).sum().backward()
    assert_close({n: p.grad for n, p in model.named_parameters()}, eager)
    model.target = TARGET
    fastdfa.alignment(model, F.cross_entropy, X, TARGET)
    assert model.target is TARGET
    assert fastdfa.inspect(model, X)["0.weight"].points == ("1",)
    narrow = copy.deepcopy(model).float()
    narrow.zero_grad()
    narrow.target = TARGET
    with torch.autocast("cpu", torch.bfloat16):
        y = narrow(X.float())
    (y.float() * G.float()).sum().backward()
    for B in ("1", "2"):
        assert narrow.matrices[B].grad.dtype == torch.float32
        assert_close(narrow.matrices[B].grad, model.matrices[B].grad, 2e-2)


@pytest.mark.parametrize("target, error, message", [
    (None, RuntimeError, r"the rule local_classifier needs the target: .*model\.target = y"),
    (TARGET[:3], ValueError, r"got torch.int64 of shape \(3,\)"),
])  # fmt: skip
def test_local_classifiers_without_their_target(target, error, message):
    model = classifying()
    model.target = target
    with pytest.raises(error, match=message):
        model(X)
    assert all(p.grad is None for p in model.parameters())


# What cannot learn.


@pytest.mark.parametrize("rule, error, message", [
    ("hebb", ValueError, "rule must be one of 'kolen_pollack', 'cross_correlation', 'local_cl"),
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
    with pytest.raises(ValueError, match=r"local_classifier takes the target.* got rank=2"):
        model.learn_feedback("local_classifier")
    with pytest.raises(ValueError, match="compression must be one of 'oja', or callable, got 'p"):
        model.learn_feedback(compression="pca")
    with pytest.raises(TypeError, match="compression must be a name or callable, got int"):
        model.learn_feedback(compression=2)
    assert model.matrices is None and model.compression is None
    wide = fastdfa.signals.Function(function=lambda y, t, e: torch.cat([e, e], 1), width=8)
    model = mlp(WIDTHS, feedback=fastdfa.Feedback(signal=wide, rank=2))
    model(X)
    with pytest.raises(ValueError, match=r"a signal of its columns, got .*width=8"):
        model.learn_feedback()
    model = low_rank(compression=lambda Q, e: Q[:, :1])
    with pytest.raises(ValueError, match=r"compression must return shape \(4, 3\), got \(4, 1\)"):
        step(model, X, G)
    model = learning(lambda B, e, h: B[:2])
    with pytest.raises(ValueError, match=r"must return shape \(4, 7\), got \(2, 7\)"):
        step(model, X, G)


def test_points_of_the_names_that_containers_have_for_themselves():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys = fastdfa.Linear(4, 6, activation="tanh")
            self.values = fastdfa.Linear(6, 7, activation="tanh")
            self.shared = fastdfa.Linear(7, 3)

        def forward(self, x):
            return self.shared(self.values(self.keys(x)))

    x = torch.randn(5, 4)
    given = {"values": torch.randn(3, 6), "shared": torch.randn(3, 7)}
    model = fastdfa.DFA(Net(), matrices=given)
    model(x).sum().backward()
    assert model.feedback_points == ["values", "shared"]
    for name, B in given.items():
        assert torch.equal(model.feedback_matrix(name), B)
    learnt = fastdfa.DFA(Net())
    learnt(x)
    assert [B.shape for B in learnt.learn_feedback()] == [(3, 6), (3, 7)]
    learnt(x).sum().backward()
    anchored = fastdfa.DFA(Net(), fastdfa.Feedback(anchor=2))
    anchored(x).square().sum().backward()
    assert set(anchored.explained) == {"values", "shared"}
    again = fastdfa.DFA(Net(), fastdfa.Feedback(anchor=2))
    again.load_state_dict(anchored.state_dict())
    again(x)
    assert torch.equal(again.feedback_matrix("values"), anchored.feedback_matrix("values"))
