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


INSIDE = {
    "layers": lambda: [fastdfa.Linear(5, 5, activation="tanh"), fastdfa.Linear(5, 5)],
    "plain layers behind points": lambda: [
        fastdfa.FeedbackPoint(), nn.Linear(5, 5), nn.Tanh(), fastdfa.FeedbackPoint(),
        nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5),
    ],
    "a frozen layer": lambda: [
        fastdfa.Linear(5, 5).requires_grad_(False), fastdfa.Linear(5, 5), fastdfa.Linear(5, 5),
    ],
    "two layers of one input": lambda: [Both(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)],
}  # fmt: skip


class Both(nn.Module):
    """The sum of a frozen layer and another, which read the same."""

    def __init__(self):
        super().__init__()
        self.one, self.other = fastdfa.Linear(5, 5).requires_grad_(False), fastdfa.Linear(5, 5)

    def forward(self, h):
        return torch.tanh(self.one(h) + self.other(h))


@pytest.mark.parametrize("cut", ["all", 2, ()])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("inside", INSIDE)
def test_a_checkpoint_cuts_again_where_the_forward_pass_did(inside, forwards, cut):
    """With as many rows as columns: what is saved behind a cut is less than without one, and one
    tensor taken for another of its shape would be no error."""
    torch.manual_seed(0)
    block = nn.Sequential(*INSIDE[inside]())
    ends = fastdfa.Linear(5, 5), nn.Sequential(nn.Tanh(), fastdfa.Linear(5, 3))
    options = {"cut": cut, "allow_bypass": True}
    plain = fastdfa.DFA(nn.Sequential(ends[0], block, ends[1]).double(), RULE, **options)
    model = fastdfa.DFA(Checkpointed(ends[0], block, ends[1]), RULE, **options)
    found = []
    for each in (plain, model):
        each.zero_grad()
        losses = [(each(k * X[:5]) * G[:5]).sum() for k in range(1, forwards + 1)]
        sum(losses).backward()
        found.append(list(gradients(each).values()))
        with fastdfa.backprop(each):
            each.zero_grad()
            step(each, X[:5], G[:5])
            found[-1] += gradients(each).values()
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


def test_checkpointing_of_the_whole_model(model):
    expected = fresh(model)
    y = checkpoint(model, X.clone().requires_grad_(), use_reentrant=False)
    (y * G).sum().backward()
    assert_close(gradients(model), expected)


class Product(nn.Module):
    """Two layers that read one tensor, one of them inside a block."""

    def __init__(self):
        super().__init__()
        self.first = fastdfa.Linear(5, 6, activation="relu")
        self.second = fastdfa.Linear(6, 6)
        self.block = nn.Sequential(fastdfa.Linear(6, 6))
        self.other = fastdfa.Linear(6, 6)
        self.head = fastdfa.Linear(6, 3)

    def forward(self, x):
        h = self.second(self.first(x))
        return self.head(torch.tanh(self.block(h) * self.other(h)))


HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


@pytest.mark.parametrize(
    "of_input", [False, True], ids=["a plain input", "an input with a gradient"]
)
@pytest.mark.parametrize("where", ["", "first", "second", "block", "block.0", "other", "head"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_module_hook_that_does_nothing_changes_nothing(kind, where, of_input):
    """Full backward hooks make torch hand a module another tensor in the place of its input."""
    torch.manual_seed(0)
    model = fastdfa.DFA(Product().double(), feedback=RULE)
    x = X.clone().requires_grad_(of_input)

    def all_gradients():
        x.grad = None
        found = fresh(model, x)
        return {**found, "x": x.grad}

    expected, points = all_gradients(), model.feedback_points
    getattr(model.module.get_submodule(where), f"register_{kind}_hook")(lambda *args: None)
    for _ in range(2):
        assert_close(all_gradients(), expected)
    assert model.feedback_points == points
    if not of_input:
        found = fastdfa.alignment(model, lambda y, g: (y * g).sum(), X, G)
        assert [point.name for point in found.points] == points


@pytest.mark.parametrize("kind", ["", "_pre"])
def test_a_global_module_hook_that_does_nothing_changes_nothing(kind):
    model = fastdfa.DFA(Product().double(), feedback=RULE)
    expected = fresh(model)
    register = getattr(nn.modules.module, f"register_module_full_backward{kind}_hook")
    handle = register(lambda *args: None)
    try:
        assert_close(fresh(model), expected)
    finally:
        handle.remove()
