"""Wrong use is an error that names the argument, what was expected and what came, raised before
anything is written (contract 10). The errors of the ops are in test_ops.py, of double backward and
of changes in place in test_autograd.py, of ways round a cut in test_leaks.py."""

import contextlib

import pytest
import torch
from helpers.errors import REFUSED, refused
from helpers.networks import Apply, assert_close, expected_gradients, gradients, mlp, randn, step
from torch import nn

import fastdfa


def linear(n, m, activation=None):
    return fastdfa.Linear(n, m, activation=activation, dtype=torch.float64)


@pytest.mark.parametrize("argument, kind, words", [
    (dict(distribution="cauchy"), ValueError, ["distribution", "normal", "rademacher", "cauchy"]),
    (dict(distribution=None), REFUSED, ["distribution", "None"]),
    (dict(scale="lecun"), ValueError, ["scale", "launay2019", "lecun"]),
    (dict(scale=-1.0), ValueError, ["scale", "-1"]),
    (dict(scale=0), ValueError, ["scale", "0"]),
    (dict(scale=float("nan")), ValueError, ["scale", "nan"]),
    (dict(scale=float("inf")), ValueError, ["scale", "inf"]),
    (dict(scale=True), TypeError, ["scale", "bool"]),
    (dict(scale=None), TypeError, ["scale", "None"]),
    (dict(error="max"), ValueError, ["error", "mean", "sum", "max"]),
    (dict(shared="yes"), TypeError, ["shared", "bool", "str"]),
    (dict(dense="yes"), TypeError, ["dense", "bool", "str"]),
    (dict(seed=1.5), TypeError, ["seed", "int", "float"]),
    (dict(seed="1"), TypeError, ["seed", "int", "str"]),
    (dict(seed=2**63), ValueError, ["seed", "2**63 - 1", str(2**63)]),
])  # fmt: skip
def test_feedback(argument, kind, words):
    with refused(words, kind):
        fastdfa.Feedback(**argument)


@pytest.mark.parametrize("arguments, kind, words", [
    (dict(module=torch.tanh), TypeError, ["module", "nn.Module"]),
    (dict(module=nn.ReLU), TypeError, ["module", "nn.Module", "type"]),
    (dict(feedback="launay"), ValueError, ["feedback", "launay2019", "'launay'"]),
    (dict(feedback=3), TypeError, ["feedback", "Feedback", "int"]),
    (dict(output="decoder"), ValueError, ["output", "'decoder'", "body"]),
    (dict(output=3), TypeError, ["output", "int"]),
])  # fmt: skip
def test_dfa(arguments, kind, words):
    module = nn.Sequential()
    module.add_module("body", linear(4, 3))
    with refused(words, kind):
        fastdfa.DFA(**({"module": module} | arguments))


@pytest.mark.parametrize("activation, kind, words", [
    ("rleu", ValueError, ["activation", "relu", "tanh", "'rleu'"]),
    (torch.tanh, TypeError, ["activation", "nn.Module", "builtin"]),
    (nn.Tanh, TypeError, ["activation", "nn.Module", "type"]),
    (3, TypeError, ["activation", "int"]),
])  # fmt: skip
def test_linear(activation, kind, words):
    with refused(words, kind):
        fastdfa.Linear(4, 3, activation=activation)


@pytest.mark.parametrize(
    "rows, kind", [(-1, ValueError), (1.5, TypeError), ("2", TypeError), (True, TypeError)]
)
def test_feedback_point(rows, kind):
    with refused(["rows"], kind):
        fastdfa.FeedbackPoint(rows=rows)


def untouched(model):
    return all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("result", ["tuple", "dict", "None", "float"])
def test_an_output_that_is_no_tensor(result):
    change = {
        "tuple": lambda y: (y, y),
        "dict": lambda y: {"logits": y},
        "None": lambda y: None,
        "float": lambda y: 1.5,
    }[result]
    model = fastdfa.DFA(nn.Sequential(linear(4, 5, "tanh"), linear(5, 3), Apply(change)))
    expected = {"tuple": "tuple", "dict": "dict", "None": "NoneType", "float": "float"}[result]
    with refused(["output", "tensor", expected, "DFA(module, output="], TypeError):
        model(randn(6, 4))


def test_a_scalar_output():
    """The loss inside the model: there is no error to project."""
    model = fastdfa.DFA(nn.Sequential(linear(4, 5, "tanh"), linear(5, 3), Apply(torch.sum)))
    with refused(["output", "scalar"], ValueError):
        model(randn(6, 4))


def test_an_output_of_integers():
    """It has no gradient, so there is no error to project."""
    model = fastdfa.DFA(nn.Sequential(linear(4, 5, "tanh"), linear(5, 3), Apply(torch.Tensor.long)))
    with refused(["output", "floating", "int64"], TypeError):
        model(randn(6, 4))
    assert untouched(model)


@pytest.mark.parametrize("shape, words", [
    (lambda h: h.reshape(12, -1), ["[6]", "(12, "]),  # 12 rows, the error has 6
    (lambda h: h.T, ["[6]", "(8, 6)"]),
    (lambda h: h.reshape(-1), ["[6]", "(48,)"]),
])  # fmt: skip
def test_a_point_whose_rows_are_not_those_of_the_error(shape, words):
    back = Apply(lambda h: h.T.reshape(6, 8) if h.shape == (8, 6) else h.reshape(6, 8))
    blocks = [linear(4, 8, "tanh"), Apply(shape), fastdfa.FeedbackPoint(), back, linear(8, 3)]
    model = fastdfa.DFA(nn.Sequential(*blocks))
    with refused(["'2'", "rows", "FeedbackPoint(rows=", *words], ValueError):
        step(model, randn(6, 4), randn(6, 3))
    assert untouched(model)


def test_a_point_of_another_rank_under_an_error_of_tokens():
    """Error [N, T, C], point [N, T, a, b]: neither row by row nor in dimension 0."""
    blocks = [linear(4, 6, "tanh"), nn.Unflatten(2, (2, 3)), fastdfa.FeedbackPoint()]
    model = fastdfa.DFA(nn.Sequential(*blocks, nn.Flatten(2), linear(6, 3)))
    with refused(["'2'", "(5, 2, 2, 3)", "(5, 2, 3)", "FeedbackPoint(rows="], ValueError):
        step(model, randn(5, 2, 4), randn(5, 2, 3))
    assert untouched(model)


def test_an_error_without_classes_fits_no_point():
    """An output [N], as of a squeezed regression, is one row of N features: it fits no [N, n]."""
    blocks = [linear(4, 6, "tanh"), linear(6, 1), Apply(lambda y: y.squeeze(-1))]
    model = fastdfa.DFA(nn.Sequential(*blocks))
    with refused(["'1'", "(5, 6)", "(5,)"], ValueError):
        model(randn(5, 4))


def test_rows_that_do_not_fit():
    blocks = [linear(4, 6, "tanh"), fastdfa.FeedbackPoint(rows=2), linear(6, 3)]
    with refused(["'1'", "rows", "(5, 6)"], ValueError):
        fastdfa.DFA(nn.Sequential(*blocks))(randn(5, 4))


def test_a_tap_that_never_ran():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.unused = (
                nn.Sequential(linear(4, 6, "tanh"), linear(6, 3)),
                nn.Linear(3, 3),
            )

        def forward(self, x):
            return self.body(x)

    model = fastdfa.DFA(Net(), output="unused")
    with refused(["output", "'unused'", "not called"], RuntimeError):
        model(randn(5, 4))
    assert untouched(model)


def test_a_tap_whose_output_is_no_tensor():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(linear(4, 6, "tanh"), linear(6, 3), Apply(lambda y: [y]))

        def forward(self, x):
            return self.body(x)[0]

    with refused(["output", "'body'", "tensor", "list"], TypeError):
        fastdfa.DFA(Net(), output="body")(randn(5, 4))


def test_a_dfa_inside_a_dfa():
    with refused(["module", "DFA", "'0'"], ValueError):
        fastdfa.DFA(nn.Sequential(mlp([4, 8, 3]), linear(3, 2)))


def test_an_unknown_point():
    model = mlp([4, 8, 3])
    for name in ("1", "9"):
        with pytest.raises(LookupError, match=name):
            model.feedback_matrix(name)
        model(randn(5, 4)) if name == "1" else None
    model.feedback_matrix("1")
    with pytest.raises(LookupError, match=r"(?s)'0'.*'1'"):
        model.feedback_matrix("0")


def test_backprop_of_a_model_without_a_dfa():
    with refused(["DFA", "Linear"], ValueError), fastdfa.backprop(nn.Linear(4, 3)):
        pass


class Written(nn.Module):
    """An `nn.Sequential` that is called by a forward of its own, and so is no whole network."""

    def __init__(self, layers):
        super().__init__()
        self.body = layers

    def forward(self, x):
        return self.body(x)


def fully_connected():
    layers = [linear(4, 6, "tanh"), linear(6, 6, "relu"), linear(6, 6), linear(6, 3)]
    return nn.Sequential(*layers)


def convolutional():
    first = fastdfa.Conv2d(2, 4, 3, activation="relu", dtype=torch.float64)
    second = fastdfa.Conv2d(4, 4, 3, dtype=torch.float64)
    return nn.Sequential(first, second, nn.Flatten(), linear(4 * 2 * 2, 3))


def streaming(model, x):
    step = fastdfa.StreamingStep(model, torch.optim.SGD(model.parameters(), lr=1.0))
    step(lambda: model(x).sum())


def compiled(fullgraph):
    def run(model, x):
        torch.compile(model, backend="eager", fullgraph=fullgraph)(x)

    return run


def by_layer(model, x):
    fastdfa.LayerFeedback(model.module, "fa")(x)


WAYS = {
    "whole": (lambda net: net, lambda model, x: model(x)),
    "run": (Written, lambda model, x: model(x)),
    "streaming": (Written, streaming),
    "compiled": (Written, compiled(False)),
    "one graph": (Written, compiled(True)),
    "by layer": (Written, by_layer),
    "alignment": (Written, lambda model, x: fastdfa.alignment(model, lambda y, _: y.sum(), x, 0)),
    "inspect": (Written, lambda model, x: fastdfa.inspect(model, x)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make, changed, x, words", [
    (fully_connected, None, randn(5, 9), ["0'", "[*, 4]", "(5, 9)"]),
    (fully_connected, None, randn(5, 7, 3), ["0'", "[*, 4]", "(5, 7, 3)"]),
    (fully_connected, None, randn(5, 4).float(), ["0'", "torch.float64", "torch.float32"]),
    (fully_connected, (1, linear(5, 6, "tanh")), randn(5, 4), ["1'", "[*, 5]", "(5, 6)"]),
    (fully_connected, (2, linear(5, 6)), randn(5, 4), ["2'", "[*, 5]", "(5, 6)"]),
    (fully_connected, (3, linear(7, 3)), randn(5, 4), ["3'", "[*, 7]", "(5, 6)"]),
    (convolutional, None, randn(5, 3, 6, 6), ["0'", "[N, 2, >= 3, >= 3]", "(5, 3, 6, 6)"]),
    (convolutional, None, randn(5, 2, 4, 6), ["1'", "[N, 4, >= 3, >= 3]", "(5, 4, 2, 4)"]),
    (convolutional, None, randn(5, 2, 9, 6), ["3'", "[*, 16]", "(5, 40)"]),
    (convolutional, None, randn(6), ["0'", "[N, 2, >= 3, >= 3]", "(6,)"]),
    (convolutional, None, randn(5, 2, 6, 6).float(), ["0'", "torch.float64", "torch.float32"]),
])  # fmt: skip
def test_an_input_that_does_not_fit_names_the_layer_and_both_shapes(way, make, changed, x, words):
    network = make()
    if changed is not None:
        network[changed[0]] = changed[1]
    written, run = WAYS[way]
    model = fastdfa.DFA(written(network))
    with refused(["the input of layer '", *words], RuntimeError):
        run(model, x)
    assert untouched(model)


def test_an_input_that_does_not_fit_a_layer_on_its_own_says_which_layer_that_is():
    for layer in (fastdfa.Linear(4, 3), fastdfa.Linear(4, 3, activation="tanh")):
        with refused(["Linear(", "in_features=4", "[*, 4]", "(2, 5)"], RuntimeError):
            layer(torch.ones(2, 5))
    with refused(["Conv1d(2, 3", "[2, >= 5]", "(2, 4)"], RuntimeError):
        fastdfa.Conv1d(2, 3, 3, dilation=3, padding=1)(torch.ones(2, 4))
    with refused(["Linear(", "a tensor", "list [1.0]"], TypeError):
        fastdfa.Linear(4, 3)([1.0])


def test_an_error_of_the_users_own_goes_through_a_layer_as_it_is():
    class Own(nn.Module):
        def forward(self, x):
            raise RuntimeError("my own")

    layer = fastdfa.Linear(4, 3, activation=Own())
    with pytest.raises(RuntimeError, match=r"^my own$"):
        layer(torch.ones(2, 4))


@pytest.mark.parametrize("target, kind, words", [
    (torch.zeros(3).long(), ValueError, ["target", "(5,)", "(3,)"]),
    (torch.zeros(5, 4), ValueError, ["target", "(5, 3)", "(5, 4)"]),
    ([0] * 5, TypeError, ["target", "a tensor", "list"]),
])  # fmt: skip
@pytest.mark.parametrize("raw", [False, True])
def test_a_target_that_does_not_fit_in_streaming(target, kind, words, raw):
    signal = fastdfa.signals.Target(raw=raw)
    model = fastdfa.DFA(fully_connected(), fastdfa.Feedback(signal=signal))
    step = fastdfa.StreamingStep(model, torch.optim.SGD(model.parameters(), lr=1.0))
    x = randn(5, 4)
    for _ in range(2):  # the second takes one pass, where that is known ahead
        model.target = torch.zeros(5).long()
        step(lambda: model(x).square().sum())
    before = [p.detach().clone() for p in model.parameters()]
    model.target = target
    with refused(words, kind):
        step(lambda: model(x).square().sum())
    assert all(map(torch.equal, before, model.parameters()))


def test_a_number_of_features_that_changes():
    mean = Apply(lambda h: h.mean(1))
    model = fastdfa.DFA(
        nn.Sequential(linear(4, 5, "tanh"), fastdfa.FeedbackPoint(), mean, linear(5, 2))
    )
    model(randn(7, 3, 4))
    with refused(["'1'", "15", "20"], ValueError):
        step(model, randn(7, 4, 4), randn(7, 2))
    assert untouched(model)


def test_what_a_cuda_graph_cannot_hold(monkeypatch):
    """What the host reads or makes once must be there before a capture; streaming stays outside."""
    model, x, g = mlp([4, 8, 6, 3]), randn(5, 4), randn(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def streaming():
        fastdfa.StreamingStep(model, optimizer)(lambda: (model(x) * g).sum())

    @contextlib.contextmanager
    def capturing():
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    with capturing(), refused(["read its seed", "make a step"], RuntimeError):
        step(model, x, g)
    model.load_state_dict(model.state_dict() | {"seed": torch.tensor(7)})
    with capturing(), refused(["make its B", "make a step"], RuntimeError):
        step(model, x, g)
    with capturing(), refused(["StreamingStep", "ordinary step"], RuntimeError):
        streaming()
    assert untouched(model)
    step(model, x, g)
    model.zero_grad()
    with capturing():
        step(model, x, g)
    assert_close(gradients(model), expected_gradients(model, x, g))


def test_an_error_leaves_the_model_as_it_was():
    """After any of these the next right pass is right."""
    model = mlp([4, 8, 6, 3])
    x, g = randn(5, 4), randn(5, 3)
    model.module.append(Apply(lambda y: (y,)))
    with pytest.raises(TypeError):
        model(x)
    del model.module[-1]
    with pytest.raises(RuntimeError, match="9"):
        model(randn(5, 9))  # features for 4
    step(model, x, g)
    assert_close(gradients(model), expected_gradients(model, x, g))
