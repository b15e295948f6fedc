"""What is projected in place of the error, and how B is made: signals, low rank, sparse."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
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
    mlp,
    randn,
    step,
)
from helpers.signals import CASES, as_long_as, matrix, product, sent
from torch import nn

import fastdfa
from fastdfa import signals

X, G = BATCH, ERROR


def model_of(name, raw=False, **options):
    signal = signals.make(CASES[name][0])
    signal = signal if name == "error" else type(signal)(**{**vars(signal), "raw": raw})
    rule = fastdfa.Feedback(seed=3, signal=signal, **options)
    return mlp(WIDTHS, ["tanh", "relu"], feedback=rule)


def given(model, x=X, target=TARGET):
    model.target = target
    return model


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("error", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_formula(name, error, raw, path):
    """In the first pass, which writes a tape, and in the second, which goes round the layers."""
    model = model_of(name, raw, error=error)
    for _ in range(2):
        model.zero_grad()
        y = step(given(model), X, G)
        projected = sent(name, G, y, raw, TARGET)
        expected = expected_gradients(model, X, G, reduction=error, sent=projected)
        assert_close(gradients(model), expected)
    assert (model.planner._whole is not None) == (path == "network")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", CASES)
def test_on_the_general_path(name):
    """Batch norm between the layers, and a layer that no kernel knows."""
    rule = model_of(name).feedback
    plain = nn.Sequential(
        nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.Tanh()),
        nn.Sequential(nn.Linear(7, 6), nn.Softsign()),
        nn.Linear(6, 4),
    ).double()
    model = fastdfa.convert(copy.deepcopy(plain), rule)
    y = step(given(model), X, G)
    projected = sent(name, G, y, False, TARGET)
    received = [projected @ B for B in feedback_of(model)]
    h, found = X, []
    for block, gradient in zip(plain, [*received, G], strict=True):
        h = block(h.detach())
        h.backward(gradient)
        found += [p.grad for p in block.parameters()]
    for parameter, expected in zip(model.module.parameters(), found, strict=True):
        assert_close(parameter.grad, expected)


def test_a_row_of_zeros_sends_nothing():
    for name in CASES:
        model, g = model_of(name), G.clone()
        g[2] = 0
        step(given(model), X, g)
        assert all(p.grad.isfinite().all() for p in model.parameters()), name


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["sign", "ternary", "quantized", "target"])
def test_gradients_grow_with_the_loss(name):
    """So that GradScaler, accumulation and a mean in place of a sum act as with the error."""
    found = []
    for factor in (1.0, 1024.0):
        model = model_of(name)
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.normal_(p)
        step(given(model), X, G * factor)
        found.append(gradients(model))
    assert_close(found[1], {n: 1024 * g for n, g in found[0].items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    model = model_of("sign").to(dtype)
    y = step(given(model), X.to(dtype), G.to(dtype))
    e = G.to(dtype).double()
    expected = expected_gradients(model, X.to(dtype), e, sent=sent("sign", e, y, False, TARGET))
    assert_close(gradients(model), expected, 20 * torch.finfo(dtype).eps)


@pytest.mark.usefixtures("path")
def test_rows_of_several_dimensions():
    """Tokens [N, T, C]: targets [N, T], one of which is ignored and sends nothing."""
    model = model_of("target")
    x, targets = randn(3, 2, 5), torch.tensor([[0, 1], [2, -100], [3, 1]])
    for _ in range(2):
        model.zero_grad()
        y = given(model, target=targets)(x)
        F.cross_entropy(y.flatten(0, 1), targets.flatten()).backward()
        p = y.detach().softmax(-1).flatten(0, 1)
        kept = targets.flatten() >= 0
        onehot = torch.zeros(6, 4, dtype=torch.float64)
        onehot[kept, targets.flatten()[kept]] = 1
        e = (p - onehot) * kept[:, None] / kept.sum()
        projected = torch.zeros_like(e)
        projected[kept] = as_long_as(e[kept], -onehot[kept])
        assert_close(gradients(model), expected_gradients(model, x, e, sent=projected))


@pytest.mark.usefixtures("path")
def test_a_target_of_the_shape_of_the_output():
    dense = randn(9, 4, seed=5)
    model = model_of("target")
    step(given(model, target=dense), X, G)
    assert_close(gradients(model), expected_gradients(model, X, G, sent=as_long_as(G, -dense)))


@pytest.mark.usefixtures("path")
def test_the_target_is_taken_by_one_pass():
    model = model_of("target")
    step(given(model), X, G)
    assert model.target is None
    with pytest.raises(RuntimeError, match=r"model\.target = y"):
        model(X)
    with torch.no_grad():
        given(model)(X)
    assert model.target is TARGET
    plain = model_of("error")
    step(given(plain), X, G)
    assert plain.target is None


@pytest.mark.parametrize("target, error, message", [
    (TARGET[:3], ValueError, r"\(9,\) .* \(9, 4\), got torch.int64 of shape \(3,\)"),
    (TARGET.double(), ValueError, r"got torch.float64 of shape \(9,\)"),
    ([0] * 9, TypeError, "target must be a tensor, got list"),
])  # fmt: skip
@pytest.mark.parametrize("later", [False, True])
def test_a_target_that_does_not_fit(target, error, message, later):
    model = model_of("target")
    if later:
        step(given(model), X, G)
    with pytest.raises(error, match=message):
        given(model, target=target)(X)


@pytest.mark.parametrize("options, error, message", [
    (dict(signal="signs"), ValueError, "signal must be one of 'error', 'sign'"),
    (dict(signal=3), TypeError, "signal must be a name, a Signal or callable, got int"),
    (dict(rank=0), ValueError, "rank must be a positive int"),
    (dict(rank=2.0), TypeError, "rank must be an int or None, got float 2.0"),
    (dict(density=0), ValueError, "density must be above 0"),
    (dict(density=1.5), ValueError, "at most 1, got 1.5"),
    (dict(density="half"), TypeError, "density must be a number, got str"),
    (dict(density=0.5, dense=False), ValueError, "density below 1 needs a B in memory"),
])  # fmt: skip
def test_rules_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        fastdfa.Feedback(**options)


@pytest.mark.parametrize("make, error, message", [
    (lambda: signals.Ternary(threshold=1), ValueError, "threshold must be from 0 to below 1"),
    (lambda: signals.Ternary(threshold="x"), TypeError, "threshold must be a number, got str"),
    (lambda: signals.Quantized(bits=1), ValueError, "bits must be from 2 to 16, got 1"),
    (lambda: signals.Quantized(bits=2.5), TypeError, "bits must be an int, got float"),
    (lambda: signals.Function(), TypeError, "function must be callable, got NoneType"),
    (lambda: signals.Function(function=product, width=0), ValueError, "width must be a positive"),
])  # fmt: skip
def test_signals_that_are_none(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("result, error, message", [
    (lambda o, t, e: None, TypeError, "must return a tensor, got NoneType"),
    (lambda o, t, e: e[:, :2], ValueError, r"must return shape \(9, 4\), got \(9, 2\)"),
])  # fmt: skip
def test_functions_that_make_no_signal(result, error, message):
    model = mlp(WIDTHS, feedback=fastdfa.Feedback(signal=result))
    with pytest.raises(error, match=message):
        step(model, X, G)
    assert all(p.grad is None for p in model.module[0].parameters())


# Low rank and sparse.


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("rank", [None, 1, 3, 9])
def test_matrix_of_a_point(rank, density, shared):
    """B_l, or Q P_l with Q of variance 1/rank; masked, and larger by 1/sqrt(density)."""
    rule = fastdfa.Feedback(seed=3, rank=rank, density=density, shared=shared)
    model = mlp(WIDTHS, feedback=rule)
    step(model, X, G)
    for name, n in (("1", 7), ("2", 6)):
        assert_close(model.feedback_matrix(name), matrix(rule, name, 4, n, 7), 1e-6)
    assert_close(gradients(model), expected_gradients(model, X, G), 1e-6 if rank else 1e-10)


def test_share_and_deviation_of_a_sparse_matrix():
    rule = fastdfa.Feedback(seed=1, density=0.1, scale=1.0)
    model = mlp([5, 400, 50], feedback=rule)
    model(X)
    B = model.feedback_matrix("1")
    assert abs((B != 0).double().mean() - 0.1) < 0.01
    assert abs(B.std() - 1) < 0.03


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["sign", "target", "two columns"])
def test_composition(name):
    """A signal of few columns or levels, through a sparse B of low rank, not kept by its rule."""
    model = model_of(name, rank=2, density=0.5, error="sum", shared=False)
    for _ in range(2):
        model.zero_grad()
        y = step(given(model), X, G)
        projected = sent(name, G, y, False, TARGET)
        expected = expected_gradients(model, X, G, reduction="sum", sent=projected)
        assert_close(gradients(model), expected, 1e-6)


def test_generated_in_the_kernel():
    kept, generated = (
        mlp(WIDTHS, feedback=fastdfa.Feedback(seed=3, signal="sign", rank=2, dense=dense))
        for dense in (True, False)
    )
    generated.load_state_dict(kept.state_dict())
    for model in (kept, generated):
        step(model, X, G)
    assert_close(gradients(generated), gradients(kept), 1e-6)


# Around it.


@pytest.mark.parametrize("name", CASES)
def test_streaming(name):
    """The update of an ordinary step, in a model of which parts go by autograd."""

    def made():
        torch.manual_seed(0)
        layers = [
            fastdfa.Linear(5, 7, activation="tanh"), nn.BatchNorm1d(7),
            fastdfa.Linear(7, 6, activation="relu"), fastdfa.Linear(6, 4),
        ]  # fmt: skip
        return fastdfa.DFA(nn.Sequential(*layers).double(), model_of(name).feedback)

    assert_streams_as_it_steps(made, given)


@pytest.mark.parametrize("name", ["sign", "target", "two columns"])
def test_alignment(name):
    """Between the true gradient and what training sends; the target is left for the step."""
    model = given(model_of(name))
    measured = fastdfa.alignment(model, F.cross_entropy, X, TARGET, weights=True)
    assert model.target is TARGET
    F.cross_entropy(model(X), TARGET).backward()
    by_feedback = gradients(model)
    model.zero_grad()
    with fastdfa.backprop(model):
        F.cross_entropy(model(X), TARGET).backward()
    for parameter, gradient in gradients(model).items():
        cosine = F.cosine_similarity(gradient.flatten(), by_feedback[parameter].flatten(), dim=0)
        assert abs(cosine - measured.weights[parameter]) < 1e-6


@pytest.mark.parametrize("name", ["sign", "ternary", "quantized", "target"])
def test_compiled(name):
    model = model_of(name, rank=3)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(3):
        model.zero_grad()
        step(given(model), X, G)
        eager = gradients(model)
        model.zero_grad()
        given(model)
        (compiled(X) * G).sum().backward()
        assert_close(gradients(model), eager, 1e-6)


def test_copies_and_pickles():
    rule = fastdfa.Feedback(signal=product, rank=2, density=0.5)
    assert pickle.loads(pickle.dumps(rule)) == rule
    model = mlp(WIDTHS, feedback=rule)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        step(given(each), X, G)
    assert_close(gradients(twin), gradients(model))
