"""Small networks and what is read from them, shared by the tests."""

import copy
import gc

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastdfa

from .formulas import ACTIVATIONS, Layer, mlp_gradients

RULE = fastdfa.Feedback(seed=1)


def randn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mlp(widths, activation="tanh", bias=True, dtype=torch.float64, **options):
    """DFA of an MLP. `activation` is one key of ACTIVATIONS, or one for each hidden layer; `bias`
    one truth value or one for each layer."""
    depth = len(widths) - 1
    names = [activation] * (depth - 1) if isinstance(activation, str) else list(activation)
    biases = [bias] * depth if isinstance(bias, bool) else list(bias)
    options.setdefault("feedback", RULE)
    layers = [
        fastdfa.Linear(n, m, b, dtype=dtype, activation=ACTIVATIONS[name].argument())
        for n, m, b, name in zip(widths[:-1], widths[1:], biases, [*names, "none"], strict=True)
    ]
    model = fastdfa.DFA(nn.Sequential(*layers), **options)
    model.activations = [*names, "none"]
    return model


def layers_of(model, activation="tanh"):
    """The layers of `mlp` for the formulas; a copy, so that it stays when the model changes."""
    linears = [m for m in model.module if isinstance(m, nn.Linear)]
    names = getattr(model, "activations", [activation] * (len(linears) - 1) + ["none"])
    return [
        Layer(m.weight.detach().clone(), None if m.bias is None else m.bias.detach().clone(), name)
        for m, name in zip(linears, names, strict=True)
    ]


def step(model, x, g):
    """Forward and backward of the loss (y * g).sum(), whose error is g. Returns y."""
    y = model(x)
    (y * g).sum().backward()
    return y


def gradients(model):
    """{name inside the wrapped module: gradient}, a copy."""
    module = model.module if isinstance(model, fastdfa.DFA) else model
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }


def feedback_of(model):
    """The scaled B_l of every point of the last forward pass."""
    return [model.feedback_matrix(name) for name in model.feedback_points]


def expected_gradients(model, x, error, feedback=None, reduction="mean", sent=None):
    """What `gradients` must be for a DFA of an MLP, by the formulas of formulas.py. `feedback` are
    the matrices to use, by default those that the model names for its points; `sent` is projected,
    by default the error."""
    feedback = feedback_of(model) if feedback is None else feedback
    pairs = mlp_gradients(layers_of(model), x, error, feedback, reduction, sent)
    names = [n for n, m in model.module.named_children() if isinstance(m, nn.Linear)]
    expected = {}
    for name, (weight, bias) in zip(names, pairs, strict=True):
        expected[f"{name}.weight"] = weight
        if bias is not None:
            expected[f"{name}.bias"] = bias
    return expected


def difference(actual, expected):
    """Relative distance in the Euclidean norm, in float64."""
    assert actual is not None, "there is no gradient"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    a, b = actual.detach().double(), expected.detach().double()
    norm = b.norm().item()
    distance = (a - b).norm().item()
    return distance / norm if norm else distance


def assert_close(actual, expected, tolerance=1e-10):
    """Tensors, or dicts of them with the same keys, within a relative norm. None equals None."""
    if not isinstance(expected, dict):
        actual, expected = {"tensor": actual}, {"tensor": expected}
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        if right is None:
            assert actual[name] is None, f"{name} has a gradient"
            continue
        d = difference(actual[name], right)
        assert d <= tolerance, f"{name}: relative difference {d:.3g}, allowed {tolerance:.3g}"


def blockwise_gradients(blocks, x, g, feedback, factor=1.0):
    """DFA by definition, for any blocks of plain PyTorch: every block is differentiated on its own,
    and the output of block l but the last receives e B_l. Returns [{name: gradient}] and y."""
    outputs, h = [], x
    for block in blocks:
        h = block(h.detach())
        outputs.append(h)
    e = g.reshape(-1, g.shape[-1])
    for out, B in zip(outputs, [*feedback, None], strict=True):
        signal = g if B is None else (factor * (e @ B.to(e))).reshape(out.shape)
        if out.requires_grad:
            out.backward(signal)
    return [{n: p.grad for n, p in block.named_parameters()} for block in blocks], h


# A batch of nine for networks of these widths: input, error and target.
WIDTHS = [5, 7, 6, 4]
BATCH, ERROR = randn(9, 5), randn(9, 4, seed=1)
TARGET = torch.tensor([0, 3, 1, 1, 2, 0, 3, 2, 1])


def assert_streams_as_it_steps(make, give=lambda model: model):
    """A StreamingStep of one model from `make` updates as an ordinary step of another does; `give`
    comes before each forward pass. Returns the ordinary one."""
    ordinary, streamed = make(), make()
    streamed.load_state_dict(ordinary.state_dict())
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (ordinary, streamed))
    streaming = fastdfa.StreamingStep(streamed, other)
    before = [p.detach().clone() for p in ordinary.module.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(give(ordinary)(BATCH), TARGET).backward()
        optimizer.step()
        give(streamed)
        streaming(lambda: F.cross_entropy(streamed(BATCH), TARGET))
    after = list(ordinary.module.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert_close(dict(streamed.named_parameters()), dict(ordinary.named_parameters()))
    return ordinary


class Apply(nn.Module):
    """Any function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def assert_nothing_is_kept_alive(model, x, g, until, monkeypatch):
    """The outputs of the hidden layers are freed at the end of backward, or with y before it.

    Returns the name of the node behind y.
    """
    references, op = [], fastdfa.ops.linear_chain

    def watched(*args):
        hidden = op(*args)
        references.extend(StorageWeakRef(h.untyped_storage()) for h in hidden)
        return hidden

    monkeypatch.setattr(fastdfa.ops, "linear_chain", watched)
    gc.collect()
    gc.disable()
    try:
        y = model(x)
        name = y.grad_fn.name()
        assert len(references) == 3 and not any(r.expired() for r in references)
        if until == "backward":
            (y * g).sum().backward()
        del y
        assert all(r.expired() for r in references)
    finally:
        gc.enable()
    return name


X, G = randn(6, 5), randn(6, 3)  # an input and an error for the `model` of conftest.py


def fresh(model, x=X, g=G):
    """The gradients of one pass from zero; leaves none behind."""
    model.zero_grad()
    step(model, x, g)
    found = gradients(model)
    model.zero_grad()
    return found


def one_by_one(model):
    """A copy that computes no layer ahead."""
    other = copy.deepcopy(model)
    other.looks_ahead = False
    return other


def same_gradients(model, other):
    for (name, a), b in zip(gradients(model).items(), gradients(other).values(), strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
