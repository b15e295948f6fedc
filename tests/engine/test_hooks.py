"""Hooks of layers, tensors, parameters and saved tensors, and activation checkpointing
(contract 8)."""

import pytest
import torch
from helpers.networks import (
    RULE,
    G,
    X,
    assert_close,
    expected_gradients,
    fresh,
    gradients,
    step,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdfa


def test_a_hook_of_a_point_sees_its_feedback(model):
    """h.register_hook inside the model, as people do to look at gradients."""
    seen = {}
    plain = model.module[0].forward

    def watched(x):
        h = plain(x)
        h.register_hook(lambda gradient: seen.update(h=gradient.clone()))
        return h

    model.module[0].forward = watched
    step(model, X, G)
    expected = expected_gradients(model, X, G)
    assert_close(seen["h"], G @ model.feedback_matrix("1"))
    assert_close(gradients(model), expected)


def test_a_hook_of_a_point_changes_its_feedback(model):
    expected = fresh(model)

    def doubled(module, args, output):
        output.register_hook(lambda gradient: 2 * gradient)

    model.module[0].register_forward_hook(doubled)
    found = fresh(model)
    assert_close(found["0.weight"], 2 * expected["0.weight"])
    assert_close(found["1.weight"], expected["1.weight"])


def test_retain_grad_of_a_point_is_its_feedback(model):
    kept = []

    def retain(module, args, output):
        output.retain_grad()
        kept.append(output)

    model.module[0].register_forward_hook(retain)
    step(model, X, G)
    assert_close(kept[0].grad, G @ model.feedback_matrix("1"))
    assert_close(gradients(model), expected_gradients(model, X, G))


def test_a_forward_hook_that_replaces_the_output(model):
    model.module[0].register_forward_hook(lambda module, args, output: 2 * output)
    step(model, X, G)
    layer = model.module[0]
    h = torch.tanh(X @ layer.weight.T + layer.bias).detach()
    delta = 2 * (G @ model.feedback_matrix("1")) * (1 - h * h)
    assert_close(layer.weight.grad, delta.T @ X)
    second = model.module[1]
    h2 = torch.tanh(2 * h @ second.weight.T + second.bias).detach()
    assert_close(second.weight.grad, ((G @ model.feedback_matrix("2")) * (1 - h2 * h2)).T @ (2 * h))


def test_a_forward_pre_hook_that_replaces_the_input(model):
    expected = fresh(model, 2 * X)
    model.module[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    assert_close(fresh(model), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_full_backward_hooks_run_and_change_nothing(model):
    expected, seen = fresh(model), []
    for name, layer in model.module.named_children():
        layer.register_full_backward_hook(
            lambda module, grad_input, grad_output, name=name: seen.append((name, grad_output[0]))
        )
    assert_close(fresh(model), expected)
    found = dict(seen)
    assert sorted(found) == ["0", "1", "2"]
    model(X)
    assert_close(found["2"], G)
    assert_close(found["1"], G @ model.feedback_matrix("2"))
    assert_close(found["0"], G @ model.feedback_matrix("1"))


def test_hooks_of_parameters(model):
    expected, seen = fresh(model), []
    weight, bias = model.module[0].weight, model.module[0].bias
    weight.register_hook(lambda gradient: 3 * gradient)
    bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step(model, X, G)
    assert_close(weight.grad, 3 * expected["0.weight"])
    assert_close(seen[0], expected["0.bias"])
    assert len(seen) == 1


def test_global_forward_hooks(model):
    expected = fresh(model)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: calls.append(m))
    try:
        found = fresh(model)
    finally:
        handle.remove()
    assert_close(found, expected)
    assert model.module[1] in calls


def test_anomaly_detection(model):
    expected = fresh(model)
    with torch.autograd.set_detect_anomaly(True):
        assert_close(fresh(model), expected)


def test_saved_tensor_hooks(model):
    """Offloading: what is saved goes through pack and unpack."""
    expected = fresh(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        found = fresh(model)
    assert_close(found, expected)


# Checkpointing --------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False)
        return self.blocks[-1](x)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "Softsign", None])
@pytest.mark.parametrize("per_block", [1, 2])
def test_activation_checkpointing(per_block, activation):
    def build():
        torch.manual_seed(0)
        make = nn.Softsign() if activation == "Softsign" else activation
        layers = [
            fastdfa.Linear(a, b, activation=make) for a, b in ((5, 8), (8, 8), (8, 6), (6, 7))
        ]
        blocks = [nn.Sequential(*layers[i : i + per_block]) for i in range(0, 4, per_block)]
        return nn.ModuleList([*blocks, fastdfa.Linear(7, 3)]).double()

    plain = fastdfa.DFA(nn.Sequential(*build()), feedback=RULE)
    model = fastdfa.DFA(Checkpointed(*build()), feedback=RULE)
    step(plain, X, G)
    step(model, X, G)
    assert len(list(model.feedback_points)) == 4
    for a, b in zip(gradients(model).values(), gradients(plain).values(), strict=True):
        assert_close(a, b)


def test_checkpointing_of_the_whole_model(model):
    expected = fresh(model)
    y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False)
    (y * G).sum().backward()
    assert_close(gradients(model), expected)
