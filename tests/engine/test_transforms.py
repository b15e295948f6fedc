"""Transforms of `torch.func` give the gradients of DFA, per sample and per stacked network too, or
are refused before anything is computed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import assert_close, expected_gradients, gradients, mlp, randn, step
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import fastdfa


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    """Dynamo leaves a function alone for good in which it had to break the graph of a transform."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WIDTHS = [5, 8, 7, 3]
X, TARGET = randn(6, 5), torch.arange(6) % 3
RULES = {
    "shared": {},
    "separate": {"shared": False},
    "sum": {"error": "sum"},
    "generated": {"dense": False},
    "sign": {"signal": "sign"},
    "low rank": {"rank": 2},
}


@pytest.fixture(params=RULES)
def model(request):
    torch.manual_seed(0)
    return mlp(WIDTHS, ["tanh", "relu"], feedback=fastdfa.Feedback(seed=3, **RULES[request.param]))


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model):
    return lambda parameters, x, target: F.cross_entropy(
        functional_call(model, parameters, (x,)), target
    )


def by_backward(model, x=X, target=TARGET):
    """The gradients of an ordinary backward pass, by the names of parameters."""
    model.zero_grad()
    F.cross_entropy(model(x), target).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def test_grad_by_the_formulas():
    model = mlp(WIDTHS, ["tanh", "relu"])
    g = randn(6, 3, seed=1)
    found = grad(lambda p: (functional_call(model, p, (X,)) * g).sum())(parameters_of(model))
    step(model, X, g)
    expected = expected_gradients(model, X, g)
    assert_close({name.removeprefix("module."): p for name, p in found.items()}, expected)


def test_grad_and_vjp(model):
    loss, parameters = loss_of(model), parameters_of(model)
    expected = by_backward(model)
    assert_close(grad(loss)(parameters, X, TARGET), expected)
    _, pull = vjp(lambda p: loss(p, X, TARGET), parameters)
    assert_close(pull(torch.ones((), dtype=torch.float64))[0], expected)


@pytest.mark.parametrize("shape", ["a row", "no rows"])
def test_gradients_of_every_sample(model, shape):
    def loss(p, x, target):
        y = functional_call(model, p, (x[None],)) if shape == "a row" else None
        if y is None:
            return F.cross_entropy(functional_call(model, p, (x,)), target)
        return F.cross_entropy(y, target[None])

    found = vmap(grad(loss), (None, 0, 0))(parameters_of(model), X, TARGET)
    for i in range(len(X)):
        alone = by_backward(model, X[i : i + 1], TARGET[i : i + 1])
        assert_close({name: each[i] for name, each in found.items()}, alone)


def test_jacobians_hold_the_feedback_of_every_output(model):
    if model.feedback.signal != "error":
        pytest.skip("a signal is not linear in the error")
    jacobians = jacrev(lambda p: functional_call(model, p, (X,)))(parameters_of(model))
    y = model(X).detach().requires_grad_()
    (e,) = torch.autograd.grad(F.cross_entropy(y, TARGET), y)
    found = {name: torch.tensordot(e, each, 2) for name, each in jacobians.items()}
    assert_close(found, by_backward(model))


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap", "backward of vmap"])
@pytest.mark.parametrize("rule", RULES)
def test_stacked_networks_have_their_own_b(rule, order):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        options = {"feedback": fastdfa.Feedback(seed=seed, **RULES[rule])}
        models.append(mlp(WIDTHS, ["tanh", "relu"], **options))
    stacked, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def loss(p, b):
        return F.cross_entropy(functional_call(base, (p, b), (X,)), TARGET)

    values = {name: p.detach() for name, p in stacked.items()}
    if order == "vmap of grad":
        found = vmap(grad(loss))(values, buffers)
    elif order == "grad of vmap":
        found = grad(lambda p: vmap(loss)(p, buffers).sum())(values)
    else:
        vmap(loss)(stacked, buffers).sum().backward()
        found = {name: p.grad for name, p in stacked.items()}
    for i, each in enumerate(models):
        assert_close({name: p[i] for name, p in found.items()}, by_backward(each))


def test_given_matrices():
    matrices = {"1": randn(3, 8, seed=5), "2": randn(3, 7, seed=6)}
    model = mlp(WIDTHS, ["tanh", "relu"], matrices=matrices)
    names = [name for name in parameters_of(model) if name.startswith("module.")]
    trained = {name: parameters_of(model)[name] for name in names}
    g = randn(6, 3, seed=1)
    found = grad(lambda p: (functional_call(model, p, (X,)) * g).sum())(trained)
    expected = expected_gradients(model, X, g, list(matrices.values()))
    assert_close({name.removeprefix("module."): p for name, p in found.items()}, expected)


def test_a_convolutional_network_with_norm_and_dropout_of_eval():
    torch.manual_seed(0)
    model = fastdfa.DFA(
        nn.Sequential(
            fastdfa.Conv2d(2, 4, 3, activation="relu"),
            nn.BatchNorm2d(4, track_running_stats=False),
            fastdfa.Conv2d(4, 3, 3, activation="tanh"),
            nn.Flatten(),
            fastdfa.Linear(3 * 2 * 2, 3),
        ).double(),
        fastdfa.Feedback(seed=1),
    )
    x = randn(6, 2, 6, 6)
    found = grad(loss_of(model))(parameters_of(model), x, TARGET)
    assert_close(found, by_backward(model, x))


@pytest.mark.parametrize("transform", ["grad", "vmap of grad"])
def test_compiled(model, transform):
    torch._dynamo.reset()
    if transform == "grad":
        run = torch.compile(grad(loss_of(model)), backend="aot_eager")
        assert_close(run(parameters_of(model), X, TARGET), by_backward(model))
        return
    run = torch.compile(vmap(grad(loss_of(model)), (None, 0, 0)), backend="aot_eager")
    found = run(parameters_of(model), X, TARGET)
    alone = by_backward(model, X[2:3], TARGET[2:3])
    assert_close({name: each[2] for name, each in found.items()}, alone)


@pytest.mark.parametrize("name", ["jvp", "jacfwd", "hessian", "grad of grad"])
def test_other_derivatives_are_refused(name):
    model = mlp(WIDTHS)
    loss, p = loss_of(model), parameters_of(model)

    def first(p):
        return loss(p, X, TARGET)

    def run():
        if name == "jvp":
            return jvp(first, (p,), (p,))
        if name == "grad of grad":
            return grad(lambda p: grad(first)(p)["module.0.weight"].sum())(p)
        return (jacfwd if name == "jacfwd" else hessian)(first)(p)

    with pytest.raises(RuntimeError, match=r"first derivatives alone, .* got .*(Jvp|Grad, Grad)"):
        run()
    with fastdfa.backprop(model):
        run()


def test_gradients_that_torch_would_differentiate_again_are_refused():
    model = mlp(WIDTHS)
    found = grad(loss_of(model))(dict(model.named_parameters()), X, TARGET)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        found["module.0.weight"].sum().backward()


def test_a_layer_feedback_is_refused():
    model = fastdfa.LayerFeedback(
        nn.Sequential(fastdfa.Linear(5, 4), fastdfa.Linear(4, 3)).double()
    )
    with pytest.raises(RuntimeError, match=r"LayerFeedback was called inside a transform of torch"):
        grad(loss_of(model))(parameters_of(model), X, TARGET)


def test_layers_outside_of_a_root_train_by_backprop():
    layer = fastdfa.Linear(5, 3, activation="tanh").double()
    weight = layer.weight.detach()

    def total(weight):
        return functional_call(layer, {"weight": weight}, (X,)).sum()

    expected = torch.autograd.grad(layer(X).sum(), layer.weight)[0]
    assert_close(grad(total)(weight), expected)


def test_an_eager_pass_afterwards_is_as_before(model):
    before = by_backward(model)
    grad(loss_of(model))(parameters_of(model), X, TARGET)
    assert_close(by_backward(model), before)
    assert gradients(model)["0.weight"] is None
