"""Several threads train at once (contract 8)."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.networks import assert_close, expected_gradients, gradients, mlp, randn, step

import fastdfa

THREADS, ROUNDS = 4, 12


def in_threads(work, n=THREADS):
    """work(0), ..., work(n - 1) at the same time."""
    barrier = threading.Barrier(n)

    def start(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


@pytest.mark.parametrize("activation", ["tanh", "Softsign"])
def test_one_model_for_each_thread(activation):
    def work(i):
        model = mlp([5, 8 + i, 7, 3], activation, feedback=fastdfa.Feedback(seed=i))
        for k in range(ROUNDS):
            x, g = randn(6, 5, seed=k), randn(6, 3, seed=k + 1)
            model.zero_grad()
            step(model, x, g)
            assert_close(gradients(model), expected_gradients(model, x, g))

    in_threads(work)


@pytest.mark.parametrize("roots", ["one root", "a root for each"])
def test_one_module_in_all_threads(roots):
    """autograd.grad, so that no thread writes .grad; every thread has rows of its own."""
    model = mlp([5, 8, 7, 3])
    models = [
        model
        if roots == "one root"
        else fastdfa.DFA(model.module, feedback=fastdfa.Feedback(seed=i))
        for i in range(THREADS)
    ]
    inputs = [(randn(6 + i, 5, seed=i), randn(6 + i, 3, seed=i)) for i in range(THREADS)]
    expected = []
    for m, (x, g) in zip(models, inputs, strict=True):
        m.activations = model.activations
        m(x)
        expected.append(expected_gradients(m, x, g))

    def work(i):
        x, g = inputs[i]
        for _ in range(ROUNDS):
            found = torch.autograd.grad((models[i](x) * g).sum(), list(model.module.parameters()))
            assert_close(dict(zip(expected[i], found, strict=True)), expected[i])

    in_threads(work)


def test_a_layer_used_outside_while_another_thread_trains():
    """The tape of one thread does not see the layers that another one calls plainly."""
    model = mlp([5, 8, 7, 3])
    x, g = randn(6, 5), randn(6, 3)
    weights = list(model.module.parameters())
    true = torch.autograd.grad((model.module(x) * g).sum(), weights)
    fed = torch.autograd.grad((model(x) * g).sum(), weights)
    assert not torch.allclose(true[0], fed[0])

    def work(i):
        for _ in range(ROUNDS):
            run, expected = ((model, fed), (model.module, true))[i % 2]
            for a, b in zip(
                torch.autograd.grad((run(x) * g).sum(), weights), expected, strict=True
            ):
                assert_close(a, b)

    in_threads(work)


def test_forward_and_backward_in_different_threads():
    model = mlp([5, 8, 7, 3])
    x, g = randn(6, 5), randn(6, 3)
    loss = (model(x) * g).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert_close(gradients(model), expected_gradients(model, x, g))


def test_the_first_passes_at_once():
    """Nothing that is made on first use (B, the list of names, the walk) is made twice wrongly."""
    model = mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=4, dense=True))
    x, g = randn(6, 5), randn(6, 3)
    weights = list(model.module.parameters())
    found = in_threads(lambda i: torch.autograd.grad((model(x) * g).sum(), weights))
    model(x)
    expected = expected_gradients(model, x, g)
    for gradient in found:
        assert_close(dict(zip(expected, gradient, strict=True)), expected)
