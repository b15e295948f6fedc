"""Projections made outside of this library: any callable, its future, a simulated processor."""

import copy
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

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
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn

import fastdfa
from fastdfa.projectors import OpticalProcessor

X, G = BATCH, ERROR
B = randn(4, 8, seed=2)


def project(signal):
    return signal @ B.to(signal)


def later(signal):
    """A future that another thread fulfils."""
    future = Future()
    threading.Timer(0.05, lambda: future.set_result(project(signal))).start()
    return future


def of(projector, **rule):
    rule = fastdfa.Feedback(**{"scale": 0.5, **rule})
    return mlp(WIDTHS, ["tanh", "relu"], feedback=rule, projector=projector)


@pytest.mark.parametrize("error", ["mean", "sum"])
@pytest.mark.parametrize("projector", [project, later])
def test_gradients(projector, error):
    model = of(projector, error=error)
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
        expected = [B[:, :7] / 2, B[:, :6] / 2]
        assert_close(gradients(model), expected_gradients(model, X, G, expected, error))


@pytest.mark.parametrize("projector", [project, later])
def test_blocks_and_layers_mixed(projector):
    """Points that layers gate, tokens of blocks, and two readers of one tensor."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(5, 7, activation="tanh")
            self.norm = nn.LayerNorm(7)
            self.left, self.right = fastdfa.Linear(7, 6), fastdfa.Linear(7, 6)
            self.head = fastdfa.Linear(6, 4)

        def forward(self, x):
            h = self.norm(self.first(x))
            return self.head(self.left(h) * self.right(h))

    plain = Mixed().double()
    model = fastdfa.DFA(plain, fastdfa.Feedback(scale=0.5), projector=projector)
    with_matrix = fastdfa.DFA(copy.deepcopy(plain), fastdfa.Feedback(), matrices=(B / 2))
    for each in (model, with_matrix):
        step(each, X, G)
    assert_close(gradients(model), gradients(with_matrix))


def test_it_is_called_once_a_step_with_the_signal():
    seen = []

    def watched(signal):
        seen.append(signal)
        return project(signal)

    model = of(watched, signal="sign", error="sum")
    step(model, X, G)
    (signal,) = seen
    expected = G.sign() * G.norm(dim=1, keepdim=True) / 2
    assert_close(signal, expected)  # sqrt(4) = 2
    fed = expected_gradients(model, X, G, [B[:, :7] / 2, B[:, :6] / 2], "sum", expected)
    assert_close(gradients(model), fed)
    assert not signal.requires_grad


def test_what_needs_no_feedback_does_not_wait():
    """The head has its gradient before the first point waits for the projector."""
    model, order = of(None), []

    class Slow:
        def result(self):
            order.append(model.module[2].weight.grad is not None)
            return project(G)

    model = of(lambda signal: Slow())
    step(model, X, G)
    assert order == [True]


def test_nothing_is_kept_alive():
    """What the projector made is freed at the end of backward, though the output is not."""
    made = []

    def watched(signal):
        projected = project(signal)
        made.append(weakref.ref(projected))
        return projected

    y = step(of(watched), X, G)
    assert made[0]() is None and y.grad_fn is not None


def test_several_passes_and_threads():
    model = of(later)
    losses = [(model(X[i::3]) * G[i::3]).sum() for i in range(3)]
    sum(losses).backward()
    accumulated = gradients(model)
    model.zero_grad()
    step(model, X, G)
    assert_close(accumulated, gradients(model))

    def one(seed):
        torch.manual_seed(seed)
        model = of(later)
        step(model, X, G)
        return gradients(model), expected_gradients(model, X, G, [B[:, :7] / 2, B[:, :6] / 2])

    with ThreadPoolExecutor(3) as pool:
        for actual, expected in pool.map(one, range(6)):
            assert_close(actual, expected)


def test_streaming_and_alignment():
    ordinary = assert_streams_as_it_steps(lambda: of(later))
    measured = fastdfa.alignment(ordinary, F.cross_entropy, X, TARGET)
    with_matrix = fastdfa.DFA(ordinary.module, fastdfa.Feedback(), matrices=B / 2)
    expected = fastdfa.alignment(with_matrix, F.cross_entropy, X, TARGET)
    for a, b in zip(measured.points, expected.points, strict=True):
        assert_close(a.cosines, b.cosines)


def test_compiled():
    model = of(project)
    compiled = torch.compile(model)
    step(model, X, G)
    eager = gradients(model)
    model.zero_grad()
    (compiled(X) * G).sum().backward()
    assert_close(gradients(model), eager)


@pytest.mark.parametrize("projector, error, message", [
    (lambda s: None, TypeError, "projector must return a tensor, got NoneType"),
    (lambda s: s, ValueError, r"must return shape \[9, >= 7\], got \(9, 4\)"),
    (lambda s: project(s)[:3], ValueError, r"got \(3, 8\)"),
])  # fmt: skip
def test_projectors_that_do_not_fit(projector, error, message):
    with pytest.raises(error, match=message):
        step(of(projector), X, G)


def test_what_does_not_go_with_a_projector():
    with pytest.raises(TypeError, match="projector must be callable, got int"):
        of(3)
    with pytest.raises(ValueError, match="expected no matrices beside it"):
        mlp(WIDTHS, projector=project, matrices=B)
    model = of(project)
    model(X)
    with pytest.raises(RuntimeError, match="B is the projector's"):
        model.feedback_matrix("1")
    with pytest.raises(ValueError, match="and a projector"):
        model.learn_feedback()


# The simulated processor.

TERNARY = torch.randint(-1, 2, (50, 10), generator=torch.Generator().manual_seed(0)).double()


def test_a_perfect_linear_processor_is_a_product():
    processor = OpticalProcessor(2000, bits=None, seed=3)
    matrix = processor(torch.eye(10, dtype=torch.float64))
    assert abs(matrix.std() - 1) < 0.02
    assert_close(processor(0.3 * TERNARY), 0.3 * TERNARY @ matrix)
    assert_close(matrix, fastdfa.ops.feedback(10, 2000, seed=3, dtype=torch.float64))


def test_what_it_displays_is_ternary():
    signal = torch.tensor([[0.2, -0.9, 0.4, 0.0], [0, 0, 0, 0]], dtype=torch.float64)
    displayed = torch.tensor([[0, -0.9, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    processor = OpticalProcessor(30, bits=None)
    assert_close(processor(signal), processor(displayed))
    assert torch.equal(processor(signal)[1], torch.zeros(30, dtype=torch.float64))


def test_intensity():
    """Of mean 0 and the deviation of a product with a matrix of unit variance."""
    made = OpticalProcessor(50_000, "intensity", bits=None)(TERNARY)
    length = TERNARY.norm(dim=1)
    assert made.mean(1).abs().max() < 0.03 * length.max()
    assert ((made.std(1) / length - 1).abs() < 0.03).all()
    assert torch.equal(
        OpticalProcessor(30, "intensity", bits=None)(TERNARY),
        OpticalProcessor(30, "intensity", bits=None)(-TERNARY),
    )


def test_bits_and_noise():
    perfect = OpticalProcessor(3000, bits=None)(TERNARY)
    assert len(OpticalProcessor(3000, bits=3)(TERNARY).unique()) == 8
    coarse = OpticalProcessor(3000, bits=6)(TERNARY)
    extent = perfect.max() - perfect.min()
    assert (coarse - perfect).abs().max() <= extent / 63 / 2 * 1.0001
    noisy = OpticalProcessor(3000, bits=None, noise=0.2)(TERNARY) - perfect
    assert abs(noisy.std() / (0.2 * perfect.std()) - 1) < 0.02
    noisy = OpticalProcessor(3000, bits=None, noise_bits=4)(TERNARY) - perfect
    assert abs(noisy.std() / (extent / 16) - 1) < 0.02


def test_it_trains():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    layers = [fastdfa.Linear(8, 64, activation="tanh"), fastdfa.Linear(64, 64, activation="tanh")]
    model = fastdfa.DFA(
        nn.Sequential(*layers, fastdfa.Linear(64, 2)), fastdfa.Feedback(signal="ternary"),
        projector=OpticalProcessor(64, bits=8, noise=0.1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.2


@pytest.mark.parametrize("options, message", [
    (dict(features=0), "features must be a positive int, got 0"),
    (dict(features=3, output="phase"), "output must be one of 'linear', 'intensity', got 'phase'"),
    (dict(features=3, bits=0), "bits must be from 1 to 64 or None, got 0"),
    (dict(features=3, noise=-1), "noise must be at least 0, got -1"),
    (dict(features=3, noise_bits=0), "noise_bits must be positive or None, got 0"),
])  # fmt: skip
def test_processors_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        OpticalProcessor(**options)
