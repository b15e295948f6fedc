"""Reentrant activation checkpoints, and other autograd functions that run layers without a graph:
refused, whatever is inside, and whether or not what they read has a gradient (contract 8)."""

import pytest
import torch
from helpers.networks import RULE, G, X, assert_close, expected_gradients, gradients, mlp, step
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastdfa


class Again(torch.autograd.Function):
    """As libraries have of their own: a forward pass without a graph, and one with it in
    backward."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.block(x), grad)
        return None, x.grad


WAYS = {
    "torch's": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "torch's of pieces": lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=True),
    "a library's own": Again.apply,
}


class Checkpointed(nn.Module):
    def __init__(self, way, *layers):
        super().__init__()
        self.way, self.block = WAYS[way], nn.Sequential(*layers)

    def forward(self, x):
        return self.way(self.block, x)


def tanh(n, m):
    return fastdfa.Linear(n, m, activation="tanh")


def layers(way):
    return [Checkpointed(way, tanh(5, 8), tanh(8, 8)), Checkpointed(way, tanh(8, 8), tanh(8, 6))]


def general(way):
    first = [fastdfa.Linear(5, 8), nn.LayerNorm(8)]
    return [Checkpointed(way, *first), Checkpointed(way, fastdfa.Linear(8, 6), nn.Softsign())]


def points(way):
    blocks = [[nn.Linear(n, m), nn.Tanh(), fastdfa.FeedbackPoint()] for n, m in ((5, 8), (8, 6))]
    return [Checkpointed(way, nn.Sequential(*block), nn.Identity()) for block in blocks]


def network(inside, way):
    return nn.Sequential(*inside(way), fastdfa.Linear(6, 3)).double()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inside", [layers, general, points])
def test_layers_and_points_inside_are_refused_by_name(inside, way, input_gradient):
    model = fastdfa.DFA(network(inside, way), RULE)
    with pytest.raises(RuntimeError, match=r"'0\.block\.[\d.]+'.*use_reentrant=False"):
        model(X.clone().requires_grad_(input_gradient))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("first", [True, False])
def test_a_converted_block_is_refused(first):
    """Whose call is checkpointed, as in the models of the transformers library."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in "ab"])
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            for block in self.blocks:
                again = first or block is not self.blocks[0]
                x = checkpoint(block, x, use_reentrant=True) if again else block(x)
            return self.head(x)

    model = fastdfa.convert(Model().double(), RULE, blocks=["blocks.0", "blocks.1"])
    with pytest.raises(RuntimeError, match=r"'blocks\.\d'.*use_reentrant=False"):
        model(X)


def test_it_is_refused_in_later_passes_as_well(model):
    step(model, X, G)
    inner = model.module[1].forward
    model.module[1].forward = lambda x: checkpoint(inner, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"'1'.*use_reentrant=False"):
        model(X)


def test_it_is_refused_under_rules_layer_by_layer():
    """It would run the layers again when no root is near, and so hand down by their weights."""
    model = fastdfa.LayerFeedback(network(layers, "torch's"), "usf", seed=1)
    with pytest.raises(RuntimeError, match=r"'0\.block\.0'.*use_reentrant=False"):
        model(X.clone().requires_grad_())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_it_is_refused_in_a_streaming_step():
    model = fastdfa.DFA(network(layers, "torch's"), RULE)
    update = fastdfa.StreamingStep(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match=r"'0\.block\.0'.*use_reentrant=False"):
        update(lambda: (model(X) * G).sum())


def test_layers_that_run_without_gradients_on_purpose_are_not_refused():
    class Twice(nn.Module):
        """As a network that regresses on its own output."""

        def __init__(self):
            super().__init__()
            self.net = mlp([5, 8, 7, 3]).module

        def forward(self, x):
            with torch.no_grad():
                self.net(x)
            return self.net(x)

    model = fastdfa.DFA(Twice(), RULE)
    y = step(model, X, G)
    alone = fastdfa.DFA(model.module.net, model.feedback)
    alone.activations = ["tanh", "tanh", "none"]
    names = model.feedback_points
    expected = expected_gradients(alone, X, G, [model.feedback_matrix(name) for name in names])
    assert y.requires_grad
    assert_close(gradients(model), {f"net.{name}": g for name, g in expected.items()})


@pytest.mark.parametrize("uses_reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model(model, uses_reentrant):
    """Runs the root again, and so is right."""
    model(X)
    expected = expected_gradients(model, X, G)
    y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=uses_reentrant)
    (y * G).sum().backward()
    assert_close(gradients(model), expected)
