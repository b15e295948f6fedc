"""Every argument of every public name is refused, where it is not right, in words of ours: they
name it, and come from a `raise` of this package. What is public is read from the package, so that a
new name or parameter without bad values here fails."""

from __future__ import annotations

import inspect
import math
import re
import traceback
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.errors import REFUSED, refused
from torch import nn

import fastdfa
from fastdfa import activations, matrices, projectors, signals

PACKAGE = Path(fastdfa.__file__).parent
NAN, INF, HUGE = math.nan, math.inf, 10**5000  # an int that Python refuses to print

# Values of another kind.
NO_FLAG = ("yes", 1, 0.0, None, [], bool)
NO_INT = ("3", 2.5, NAN, True, [1], int, torch.ones(2), torch.tensor(True), np.bool_(True))
NO_SIZE = (*NO_INT, None, -1)
NO_NUMBER = ("3", True, [1.0], float, 1j, torch.ones(2), NAN, INF, -INF, 10**400, -HUGE)
NO_SEED = (*NO_INT, -1, 2**63, HUGE)
NO_MODULE = (3, "net", None, nn.Linear, torch.tanh, [nn.Linear(2, 2)])
NO_FUNCTION = (3, "f", [], nn.MSELoss)
NO_NAME = (3, b"tanh", [], object(), "no such name", "")
NO_TENSOR = (3, [1.0], None, "x", torch.Tensor)
NO_DEVICE, NO_DTYPE = ("gpu?", 2.5, [], "cpu:x"), ("float32", torch.int64, float, torch.bool)
NO_SIZES = ("3", 2.5, NAN, True, int, torch.ones(2), None, -1, [0.5], (3, 3, 3), (), -HUGE)


def network():
    return nn.Sequential(fastdfa.Linear(4, 5, activation="tanh"), fastdfa.Linear(5, 3))


def run(**options):
    """A root that has run once."""
    model = fastdfa.DFA(network(), **options)
    model(torch.ones(2, 4))
    return model


def sgd():
    return torch.optim.SGD(network().parameters(), lr=1.0)


def step():
    model = fastdfa.DFA(network())
    return fastdfa.StreamingStep(model, torch.optim.SGD(model.parameters(), lr=1.0))


def with_defaults(call, **defaults):
    return lambda **given: call(**{**defaults, **given})


def loss(y, target):
    return (y - target).square().sum()


def inspected(model=None, loss=None):
    return fastdfa.inspect(fastdfa.DFA(network()) if model is None else model, loss=loss)


def checked(model=None, loss=None):
    return fastdfa.check(fastdfa.DFA(network()) if model is None else model, loss=loss)


def streamed(model=None, optimizer=None):
    model = fastdfa.DFA(network()) if model is None else model
    return fastdfa.StreamingStep(model, sgd() if optimizer is None else optimizer)


def set_attribute(name):
    return lambda **given: setattr(run(), name, given[name])


FEEDBACK = {
    "distribution": NO_NAME, "error": NO_NAME, "shared": NO_FLAG, "dense": NO_FLAG[:3],
    "scale": (*NO_NUMBER, None, 0, -1.0, "lecun"), "seed": NO_SEED,
    "signal": (3, None, [], "signs", signals.Sign, nn.Module), "rank": (*NO_INT, 0, -HUGE),
    "density": (*NO_NUMBER, None, 0, 1.5), "anchor": (*NO_INT, 0),
}  # fmt: skip
SIGNAL = {"raw": NO_FLAG, "centred": NO_FLAG}
RULE = (3, None, [], "feedback?", fastdfa.Feedback)
OUTPUT = (3, ["0"], "no such name", "", nn.Linear)
CUT = (None, 2.5, True, 0, -HUGE, ["x"], [3], "x", nn.Linear)
MATRICES = (
    3, [torch.ones(3, 5)], {1: torch.ones(3, 5)}, {None: torch.ones(3, 5)}, {"1": None},
    torch.ones(3, 5).to_sparse(), torch.ones(3, 5).to_sparse_csr(), torch.full((3, 5), NAN),
    torch.full((3, 5), INF), torch.ones(3), torch.ones(3, 5).long(), {"1": torch.ones(3, 5, 1)},
    torch.nested.nested_tensor([torch.ones(5)]), np.ones((3, 5)), {"1": torch.full((3, 5), -INF)},
)  # fmt: skip
LAYER = {"bias": NO_FLAG, "device": NO_DEVICE, "dtype": NO_DTYPE,
         "activation": (3, torch.tanh, nn.Tanh, "rleu", [])}  # fmt: skip
CONVOLUTION = {
    "in_channels": NO_SIZE, "out_channels": NO_SIZE, "kernel_size": (*NO_SIZES, 0),
    "stride": (*NO_SIZES, 0), "padding": (*NO_SIZES, "full"), "dilation": (*NO_SIZES, 0),
    "groups": (*NO_SIZE, 0), "padding_mode": NO_NAME, **LAYER,
}  # fmt: skip
CONVERT = {
    "model": NO_MODULE, "feedback": RULE[:1] + RULE[2:], "output": OUTPUT, "blocks": (3, [], [3]),
    "rule": (*NO_NAME, None), "point": (3, fastdfa.FeedbackPoint), "fold": NO_FLAG,
    "allow_bypass": NO_FLAG, "allow_tied": NO_FLAG, "cut": CUT,
}  # fmt: skip


def converted(**given):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    more = {"blocks": "0"} if "point" in given else {}
    return fastdfa.convert(**{"model": model, **more, **given})


# By the name of a public callable: how it is called, and bad values of every parameter.
TABLE = {
    "DFA": (with_defaults(fastdfa.DFA, module=network()), {
        "module": NO_MODULE, "feedback": RULE[:1] + RULE[2:], "output": OUTPUT,
        "allow_bypass": NO_FLAG, "direct_gradients": NO_FLAG, "matrices": MATRICES,
        "projector": (*NO_FUNCTION, projectors.OpticalProcessor), "cut": CUT}),
    "DFA.feedback": (set_attribute("feedback"), {"feedback": (3, [], "no such name")}),
    "DFA.cut": (set_attribute("cut"), {"cut": CUT}),
    "DFA.feedback_matrix": (lambda **given: run().feedback_matrix(**given), {
        "name": (3, None, ["1"])}),
    "DFA.learn_feedback": (
        lambda **given: run(feedback=fastdfa.Feedback(rank=2)).learn_feedback(**given),
        {"rule": (3, None, "hebb", nn.Linear), "compression": (3, "pca", nn.Linear)}),
    "AlignmentMonitor": (
        with_defaults(fastdfa.AlignmentMonitor, model=fastdfa.DFA(network()), loss_fn=loss),
        {"model": NO_MODULE, "loss_fn": (*NO_FUNCTION, None), "every": (*NO_SIZE, 0, -HUGE),
         "gated": NO_FLAG, "weights": NO_FLAG}),
    "alignment": (
        with_defaults(fastdfa.alignment, model=fastdfa.DFA(network()), loss_fn=loss, x=0, y=0),
        {"model": NO_MODULE, "loss_fn": (*NO_FUNCTION, None), "gated": NO_FLAG,
         "weights": NO_FLAG}),
    "inspect": (inspected, {"model": (*NO_MODULE[:2], *NO_MODULE[3:]), "loss": NO_FUNCTION}),
    "check": (checked, {"model": (*NO_MODULE[:2], *NO_MODULE[3:]), "loss": NO_FUNCTION}),
    "backprop": (lambda **given: fastdfa.backprop(**given).__enter__(), {"model": NO_MODULE}),
    "forward_gradient": (with_defaults(fastdfa.forward_gradient, x=0), {"model": NO_MODULE}),
    "Feedback": (fastdfa.Feedback, FEEDBACK),
    "FeedbackPoint": (fastdfa.FeedbackPoint, {
        "rows": (*NO_INT, -1), "features": NO_INT}),
    "FeedbackPoint.forward": (lambda **given: fastdfa.FeedbackPoint()(**given), {
        "input": NO_TENSOR}),
    "LayerFeedback": (with_defaults(fastdfa.LayerFeedback, module=network()), {
        "module": NO_MODULE, "rule": (*NO_NAME, None, "dfa"), "seed": NO_SEED,
        "scale": (*NO_NUMBER, None, 0, "launay2019")}),
    "LayerFeedback.feedback_matrix": (
        lambda **given: fastdfa.LayerFeedback(network()).feedback_matrix(**given),
        {"name": (3, None)}),
    "Linear": (with_defaults(fastdfa.Linear, in_features=4, out_features=3), {
        "in_features": NO_SIZE, "out_features": NO_SIZE, **LAYER}),
    "Linear.forward": (lambda **given: fastdfa.Linear(4, 3)(**given), {
        "input": (*NO_TENSOR, torch.ones(2, 5), torch.ones(()), torch.ones(2, 4).double())}),
    "Conv1d": (
        with_defaults(fastdfa.Conv1d, in_channels=2, out_channels=3, kernel_size=3), CONVOLUTION),
    "Conv2d": (
        with_defaults(fastdfa.Conv2d, in_channels=2, out_channels=3, kernel_size=3),
        {**CONVOLUTION, **{name: (*CONVOLUTION[name], (3,))
                           for name in ("kernel_size", "stride", "padding", "dilation")}}),
    "Conv1d.forward": (lambda **given: fastdfa.Conv1d(2, 3, 3)(**given), {
        "input": (*NO_TENSOR, torch.ones(1, 3, 8), torch.ones(1, 2, 2), torch.ones(8))}),
    "Conv2d.forward": (lambda **given: fastdfa.Conv2d(2, 3, 3, padding="same")(**given), {
        "input": (*NO_TENSOR, torch.ones(1, 3, 8, 8), torch.ones(2, 8), torch.ones(2, 0, 8))}),
    "StreamingStep": (streamed, {"model": (*NO_MODULE[:2], *NO_MODULE[3:]),
                                 "optimizer": (3, "sgd", torch.optim.SGD, [])}),
    "StreamingStep.__call__": (lambda **given: step()(**given), {
        "closure": (*NO_FUNCTION, None, torch.ones(()))}),
    "Surrogate": (with_defaults(fastdfa.Surrogate, f=torch.sign, g=torch.cos), {
        "f": (*NO_FUNCTION, None), "g": (*NO_FUNCTION, None)}),
    "convert": (converted, CONVERT),
    "activations.make": (activations.make, {"activation": (3, torch.tanh, nn.Tanh, "rleu", [])}),
    "signals.make": (signals.make, {"signal": FEEDBACK["signal"]}),
    "signals.Error": (signals.Error, SIGNAL),
    "signals.Sign": (signals.Sign, SIGNAL),
    "signals.Target": (signals.Target, SIGNAL),
    "signals.Ternary": (signals.Ternary, {**SIGNAL, "threshold": (*NO_NUMBER, None, 1, -0.1)}),
    "signals.Quantized": (signals.Quantized, {**SIGNAL, "bits": (*NO_SIZE, 1, 17, HUGE)}),
    "signals.Function": (with_defaults(signals.Function, function=torch.sign), {
        **SIGNAL, "function": (*NO_FUNCTION, None), "width": (*NO_INT, 0)}),
    "projectors.OpticalProcessor": (with_defaults(projectors.OpticalProcessor, features=8), {
        "features": (*NO_SIZE, 0), "output": (*NO_NAME, None), "bits": (*NO_INT, 0, HUGE),
        "noise": (*NO_NUMBER, None, -0.1), "noise_bits": (*NO_NUMBER, 0),
        "seed": (*NO_SEED, None)}),
    "projectors.OpticalProcessor.__call__": (
        lambda **given: projectors.OpticalProcessor(8)(**given),
        {"signal": (*NO_TENSOR, torch.ones(3), torch.ones(2, 3).long())}),
}  # fmt: skip

# What a model and a loss take, of any kind.
THEIRS = {"alignment": {"x", "y"}, "convert": {"example"}, "AlignmentMonitor.__call__": {"x", "y"},
          "forward_gradient": {"x"}, "Surrogate.forward": {"input"}}  # fmt: skip

# What the engine calls with what it has checked, not a user.
OF_THE_ENGINE = {
    "matrices", "signals.made", "signals.given", "signals.Signal", "projectors.Projected",
    "activations.Gate", "activations.apply", "activations.gate_of", "activations.has_options",
    "activations.hooked",
    *(f"DFA.{name}" for name in ("run", "finish", "columns", "after", "follows", "install_tap",
                                 "names_of_points", "holds")),
    "LayerFeedback.backward_weight", "FeedbackPoint.cut", "Feedback.deviation", "Feedback.rows",
    "Feedback.stream",
}  # fmt: skip
METHODS_OF_THE_ENGINE = {"of", "columns", "reads", "input_shape", "extra_repr"}


def public():
    """Yields the name of every public callable, and its parameters."""
    found = {name: getattr(fastdfa, name) for name in fastdfa.__all__}
    for module in (activations, matrices, projectors, signals):
        short = module.__name__.rpartition(".")[2]
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and name[0] != "_":
                found[f"{short}.{name}"] = value
    for name, value in found.items():
        if isinstance(value, types.ModuleType) or not callable(value):
            continue
        yield name, value
        for each in vars(value) if isinstance(value, type) else ():
            method = inspect.getattr_static(value, each)
            if each in METHODS_OF_THE_ENGINE or (each[0] == "_" and each != "__call__"):
                continue
            if isinstance(method, property) and method.fset is not None:
                yield f"{name}.{each}", method.fset
            elif isinstance(method, types.FunctionType):
                yield f"{name}.{each}", method


def parameters(call):
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in inspect.signature(call).parameters.values()
            if p.kind not in kinds and p.name != "self"}  # fmt: skip


def of_the_engine(name):
    return any(f"{name}.".startswith(f"{each}.") for each in OF_THE_ENGINE)


def test_every_parameter_of_every_public_callable_has_bad_values():
    missing = {}
    for name, call in public():
        known = set(TABLE[name][1]) if name in TABLE else set()
        lacking = parameters(call) - known - THEIRS.get(name, set())
        if lacking and not of_the_engine(name):
            missing[name] = sorted(lacking)
    assert missing == {}


def test_the_table_has_no_parameter_that_is_gone():
    there = {name: parameters(call) for name, call in public()}
    inherited = {"Conv1d.forward", "Conv2d.forward"}  # from what they share
    assert set(TABLE) - inherited <= set(there)
    for name in set(TABLE) - inherited:
        assert set(TABLE[name][1]) <= there[name], name


ROWS = [(name, parameter) for name, (_, row) in TABLE.items() for parameter in row]


@pytest.mark.parametrize("name, parameter", ROWS, ids=[f"{a}-{b}" for a, b in ROWS])
def test_bad_values_are_refused_by_name(name, parameter):
    call, row = TABLE[name]
    for value in row[parameter]:
        with pytest.raises(REFUSED if parameter == "input" else (TypeError, ValueError)) as info:
            call(**{parameter: value})
        last, text = traceback.extract_tb(info.tb)[-1], str(info.value)
        what = f"{name}({parameter}={type(value)}): {text}"
        assert PACKAGE in Path(last.filename).parents and last.line.startswith("raise"), what
        assert re.search(rf"\b{parameter}\b", text), what
        assert len(text) < 600 and "\n" not in text, what
        assert "got" in text, what


def test_what_is_right_is_taken():
    """Numbers of numpy and torch too, which come out as those of Python."""
    rule = fastdfa.Feedback(
        scale=np.float32(0.5), seed=np.int64(7), rank=torch.tensor(2), density=torch.tensor(0.5)
    )
    assert (rule.scale, rule.seed, rule.rank, rule.density) == (0.5, 7, 2, 0.5)
    kinds = [type(value) for value in (rule.scale, rule.seed, rule.rank, rule.density)]
    assert kinds == [float, int, int, float]
    assert fastdfa.Linear(np.int64(4), torch.tensor(3)).weight.shape == (3, 4)
    layer = fastdfa.Conv2d(2, 4, [3, 1], padding="same", stride=(1, 1), device="cpu")
    assert layer.kernel_size == (3, 1)
    assert fastdfa.FeedbackPoint(features=-1).features == -1
    assert signals.Quantized(bits=np.uint8(3)).bits == 3
    assert type(projectors.OpticalProcessor(np.int32(8), noise=0).noise) is float


def test_a_network_without_submodules_has_nothing_to_name():
    module = fastdfa.Linear(2, 3)
    with refused(["output", "submodules, of which there are none", "'x'"], ValueError):
        fastdfa.DFA(module, output="x")
    with refused(["cut", "points, of which there are none", "'x'"], ValueError):
        fastdfa.DFA(module, cut="x")


def test_a_long_list_of_names_is_cut():
    deep = nn.Sequential(*[fastdfa.Linear(2, 2) for _ in range(300)])
    with pytest.raises(ValueError, match=r"one of '0', '1', .*'19', \.\.\., got 'x'"):
        fastdfa.DFA(deep, output="x")
