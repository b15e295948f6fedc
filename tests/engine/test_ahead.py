"""Layers of any module are computed ahead of their calls from the second pass on: what was computed
ahead is taken only where nothing has changed since."""

import copy

import pytest
import torch
from helpers.networks import RULE, assert_close, blockwise_gradients, gradients, randn
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdfa

X, G = randn(6, 5), randn(6, 3)


class Custom(nn.Module):
    """Three layers, called by a forward of their own; `second` is how the second is called."""

    def __init__(self, second=lambda layer, h: layer(h)):
        super().__init__()
        self.a, self.b = (fastdfa.Linear(n, 8, activation="tanh") for n in (5, 8))
        self.c, self.second = fastdfa.Linear(8, 3), second

    def forward(self, x):
        return self.c(self.second(self.b, self.a(x)))


def halved(layer, h):
    with torch.no_grad():
        layer.weight.mul_(0.5)
    return layer(h)


def under_autocast(layer, h):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(h)


def checkpointed(layer, h):
    return checkpoint(layer, h, use_reentrant=False)


def lengths(monkeypatch):
    """How many layers each call of the kernel computes."""
    made, op = [], fastdfa.ops.linear_chain

    def counted(x, weights, *rest):
        made.append(len(weights))
        return op(x, weights, *rest)

    monkeypatch.setattr(fastdfa.ops, "linear_chain", counted)
    return made


def test_from_the_second_pass_on(monkeypatch):
    model, made = fastdfa.DFA(Custom().double(), RULE), lengths(monkeypatch)
    for _ in range(3):
        model(X)
    assert made == [1, 1, 2, 2]


@pytest.mark.parametrize("second", [halved, checkpointed])
def test_what_changes_between_two_layers_is_seen(second):
    """A weight, and hooks that must see what a layer saves."""
    module = Custom().double()
    model = fastdfa.DFA(module, RULE)
    for _ in range(2):  # the layers follow each other so far
        (model(X) * G).sum().backward()
    module.second = second
    for _ in range(2):
        model.zero_grad()
        twin = copy.deepcopy(module)
        if second is halved:
            twin.b.weight.data.mul_(0.5)
        y = model(X)
        (y * G).sum().backward()
        B = [model.feedback_matrix(name) for name in ("b", "c")]
        made, right = blockwise_gradients([twin.a, twin.b, twin.c], X, G, B)
        assert_close(y, right)
        names = [f"{part}.{name}" for part in "abc" for name in ("weight", "bias")]
        expected = dict(zip(names, [g for grads in made for g in grads.values()], strict=True))
        assert_close(gradients(model), expected)


def test_autocast_that_begins_between_two_layers_is_seen():
    module = Custom()
    model, seen = fastdfa.DFA(module, RULE), []
    for _ in range(2):
        model(X.float())
    module.second = lambda layer, h: seen.append(under_autocast(layer, h)) or seen[-1].float()
    for _ in range(2):
        model(X.float())
    assert [h.dtype for h in seen] == [torch.bfloat16] * 2


def test_saved_tensor_hooks_that_begin_between_two_layers_see_what_is_saved():
    module, packed = Custom().double(), []
    model = fastdfa.DFA(module, RULE)
    for _ in range(2):
        model(X)

    def watched(layer, h):
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: packed.append(x.shape) or x, lambda x: x
        )
        with hooks:
            return layer(h)

    module.second = watched
    for _ in range(2):
        packed.clear()
        model(X)
        assert len(packed) == 3  # its input, its weight, its output


def test_points_of_one_size_with_a_b_of_their_own_share_nothing():
    """Though what one product makes serves all points that agree."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(n, 8), nn.Softsign()) for n in (5, 8, 8)]
    model = fastdfa.DFA(
        nn.Sequential(*[nn.Sequential(b, fastdfa.FeedbackPoint()) for b in blocks],
                      nn.Linear(8, 3)).double(),
        fastdfa.Feedback(shared=False, seed=1),
    )  # fmt: skip
    twin = copy.deepcopy(model.module)
    (model(X) * G).sum().backward()
    B = [model.feedback_matrix(name) for name in model.feedback_points]
    parts = [twin[0][0], twin[1][0], twin[2][0], twin[3]]
    made, _ = blockwise_gradients(parts, X, G, B)
    expected = [grad for grads in made for grad in grads.values()]
    for actual, right in zip(gradients(model).values(), expected, strict=True):
        assert_close(actual, right)
