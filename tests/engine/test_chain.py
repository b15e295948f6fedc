"""Layers of an nn.Sequential that are computed ahead of their calls: equal to the layers one by
one, to the last bit, and right whatever else is done with them (DESIGN 5.1)."""

import copy
import warnings

import pytest
import torch
from helpers.kernels import FROM_OUTPUT
from helpers.networks import (
    RULE,
    assert_close,
    assert_nothing_is_kept_alive,
    expected_gradients,
    gradients,
    mlp,
    one_by_one,
    randn,
    same_gradients,
    step,
)
from torch import nn

import fastdfa
from fastdfa.engine import stages
from fastdfa.engine.planner import Planner


@pytest.fixture(autouse=True)
def no_whole_networks(monkeypatch):
    """Here every pass has a tape, and its plan, also where a network is nothing but a chain."""
    monkeypatch.setattr(Planner, "whole", lambda *args: None)


@pytest.fixture
def chains(monkeypatch):
    """The lengths of the chains that were computed."""
    lengths, op = [], fastdfa.ops.linear_chain

    def counted(x, weights, *args):
        if len(weights) > 1:
            lengths.append(len(weights))
        return op(x, weights, *args)

    monkeypatch.setattr(fastdfa.ops, "linear_chain", counted)
    return lengths


X, G = randn(6, 5), randn(6, 3)
WIDTHS = [5, 12, 8, 9, 3]


# What it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", [name for name in FROM_OUTPUT if name != "none"])
def test_a_chain_by_the_formulas(name, bias, chains):
    model = mlp(WIDTHS, name, bias)
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G))
    assert chains == [3]
    assert model.feedback_points == ["1", "2", "3"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [(), (1,), (6,), (2, 3), (2, 1, 4)])
def test_it_equals_the_layers_one_by_one(rows, dtype, chains):
    model = mlp(WIDTHS, ["tanh", "relu", "sigmoid"], [True, False, True, True], dtype=dtype)
    other, x, g = one_by_one(model), randn(*rows, 5, dtype=dtype), randn(*rows, 3, dtype=dtype)
    for times in (1, 2):  # the second pass follows the plan of the first
        y, expected = step(model, x, g), step(other, x, g)
        assert torch.equal(y, expected) and len(chains) == times
        same_gradients(model, other)


@pytest.mark.parametrize("rule", [
    fastdfa.Feedback(seed=1, shared=False), fastdfa.Feedback(seed=1, error="sum"),
    fastdfa.Feedback(seed=1, dense=False), "tinydfa", "drtp",
])  # fmt: skip
def test_every_rule(rule, chains):
    torch.manual_seed(3)
    model = mlp(WIDTHS, feedback=rule)
    other = one_by_one(model)
    for _ in range(2):
        step(model, X, G), step(other, X, G)
        same_gradients(model, other)
    assert len(chains) == 2


def test_a_chain_in_a_chain_of_blocks(chains):
    """Nested, after other modules, and read by what is no layer of ours."""
    torch.manual_seed(0)
    layers = [fastdfa.Linear(n, m, activation="tanh") for n, m in ((8, 7), (7, 6), (6, 9), (9, 4))]
    model = fastdfa.DFA(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Sequential(*layers), nn.LayerNorm(4),
                      fastdfa.Linear(4, 3)).double(),
        feedback=RULE,
    )  # fmt: skip
    other = one_by_one(model)
    step(model, X, G), step(other, X, G)
    same_gradients(model, other)
    assert chains == [4]  # the last one's output is read by the normalisation
    assert model.feedback_points == ["2.0", "2.1", "2.2", "2.3", "4"]


def test_a_converted_network_is_a_chain(chains):
    """Though an nn.Identity stands where each activation was; a hook may make it something else."""
    torch.manual_seed(0)
    sizes = ((5, 8), (8, 7), (7, 6))
    layers = [module for n, m in sizes for module in (nn.Linear(n, m), nn.Tanh())]
    plain = nn.Sequential(*layers, nn.Linear(6, 3)).double()
    model = fastdfa.convert(plain, feedback=RULE)
    other = one_by_one(model)
    step(model, X, G), step(other, X, G)
    same_gradients(model, other)
    for each in (model, other):
        each[3].register_forward_hook(lambda module, args, h: 2 * h)
    y, expected = step(model, X, G), step(other, X, G)
    assert_close(y, expected)
    for a, b in zip(gradients(model).values(), gradients(other).values(), strict=True):
        assert_close(a, b)
    assert chains == [3, 3]


def test_layers_that_are_not_called_are_computed_ahead_once(chains):
    model = fastdfa.DFA(Used("stops early").double(), feedback=RULE)
    other = one_by_one(model)
    for _ in range(3):
        step(model, X, G), step(other, X, G)
    same_gradients(model, other)
    assert chains == [4, 2, 2]  # from then on those alone that were called


def test_it_is_one_product_and_one_node(monkeypatch):
    calls, project_gate = [], fastdfa.ops.project_gate

    def counted(e, dense, saved, *args, **options):
        calls.append(len(saved))
        return project_gate(e, dense, saved, *args, **options)

    monkeypatch.setattr(fastdfa.ops, "project_gate", counted)
    model = mlp([5, *[8] * 10, 3])
    y = model(X)
    nodes, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [after for after, _ in node.next_functions]
    names = [node.name() for node in nodes]
    assert names.count("SegmentNodeBackward") == 1
    (y * G).sum().backward()
    assert calls == [10]


# Where layers are not computed ahead ----------------------------------------------------------


def frozen(model):
    model.module[1].weight.requires_grad_(False)


def hooked(method):
    return lambda model: getattr(model.module[1], method)(lambda *args: None)


def patched(model):
    layer = model.module[1]
    layer.forward = lambda x: type(layer).forward(layer, x)


def with_a_hook_on_its_activation(model):
    model.module[1].activation.register_forward_hook(lambda *args: None)


def with_an_activation_patched(model):
    model.module[1].activation.forward = lambda a: torch.tanh(3 * a)


def of_another_kind(model):
    model.module[1].activation = nn.Softsign()


def from_the_input(model):
    model.module[1].activation = nn.GELU()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("change", [
    frozen, patched, with_a_hook_on_its_activation, with_an_activation_patched, of_another_kind,
    from_the_input,
    hooked("register_forward_hook"), hooked("register_forward_pre_hook"),
    hooked("register_full_backward_hook"), hooked("register_full_backward_pre_hook"),
])  # fmt: skip
def test_what_a_change_of_a_layer_turns_off(change, chains):
    model = mlp([5, 12, 8, 9, 7, 3])
    step(model, X, G)
    assert chains == [4]
    model.zero_grad()
    change(model)
    other = one_by_one(model) if change is not patched else None
    step(model, X, G)
    assert chains == [4, 2]  # the layers behind it
    if other is not None:
        step(other, X, G)
        for a, b in zip(gradients(model).values(), gradients(other).values(), strict=True):
            assert_close(a, b)


def test_replaced_layers_and_parameters(chains):
    """Of what the network is now, whatever it was when it was wrapped."""
    model = mlp(WIDTHS)
    step(model, X, G)
    torch.manual_seed(8)
    model.module[1] = fastdfa.Linear(12, 8, activation="relu").double()
    model.module[2].weight = nn.Parameter(randn(9, 8))
    model.module[0].activation = nn.LeakyReLU(0.3)
    model.activations = ["LeakyReLU(0.3)", "relu", "tanh", "none"]
    model.zero_grad()
    step(model, X, G)
    expected = one_by_one(model)
    expected.zero_grad()
    step(expected, X, G)
    same_gradients(model, expected)
    model.module[0].activation.negative_slope = 0.7
    expected.module[0].activation.negative_slope = 0.7
    step(model, X, G), step(expected, X, G)
    same_gradients(model, expected)
    model.module.append(nn.Identity())
    step(model, X, G), step(expected, X, G)
    same_gradients(model, expected)
    assert chains == [3] * 4


def test_saved_tensor_hooks_see_every_tensor(chains):
    model, other, packed = mlp(WIDTHS), None, []
    other = one_by_one(model)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(1) or x, lambda x: x):
        step(model, X, G)
    step(other, X, G)
    assert len(packed) > 6 and chains == []
    for a, b in zip(gradients(model).values(), gradients(other).values(), strict=True):
        assert_close(a, b)


# Whatever else is done with the layers --------------------------------------------------------


class Used(nn.Module):
    """Calls the layers of an nn.Sequential itself."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *[fastdfa.Linear(n, 8, activation="tanh") for n in (5, 8, 8, 8)], fastdfa.Linear(8, 8)
        )
        self.norm = nn.LayerNorm(8)
        self.head = fastdfa.Linear(8, 3)
        self.how = how

    def forward(self, x):
        a, b, c, d, _ = self.layers
        if self.how == "stops early":
            return self.head(b(a(x)))
        if self.how == "skips a layer":
            return self.head(d(b(a(x))))
        if self.how == "twice":
            return self.head(b(b(a(x))))
        if self.how == "changed between":
            return self.head(c(b(a(x) * 2)))
        if self.how == "normalised between":
            return self.head(c(self.norm(b(a(x)))))
        if self.how == "an output of two readers":
            h = a(x)
            return self.head(b(h) + c(h))
        if self.how == "read by another first":
            h = a(x)
            other = self.head(h)
            return other + self.head(c(b(h)))
        if self.how == "under no_grad":
            with torch.no_grad():
                h = b(a(x))
            return self.head(c(h))
        self.odd = not getattr(self, "odd", False)
        if self.how == "in turns fewer layers":
            return self.head(b(a(x)) if self.odd else c(b(a(x))))
        if self.how == "in turns one tensor or two":
            h = a(x)
            between = c(self.norm(h))
            return self.head(b(h) + between + d(h.clone() if self.odd else h))
        h = a(x)  # "two passes"
        self.layers(x)
        return self.head(c(b(h)))


USES = [
    "stops early", "skips a layer", "twice", "changed between", "normalised between",
    "an output of two readers", "read by another first", "under no_grad", "two passes",
    "in turns fewer layers", "in turns one tensor or two",
]  # fmt: skip


@pytest.mark.parametrize("how", USES)
def test_layers_that_are_called_by_hand(how):
    model = fastdfa.DFA(Used(how).double(), feedback=RULE, allow_bypass=True)
    other = one_by_one(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            other.planner._plan = None
            y, expected = step(model, X, G), step(other, X, G)
            assert_close(y, expected)
    assert model.feedback_points == other.feedback_points
    for (name, a), b in zip(gradients(model).items(), gradients(other).values(), strict=True):
        assert (a is None) == (b is None), name
        assert_close(torch.zeros(1) if a is None else a, torch.zeros(1) if b is None else b)


def test_an_output_that_leaves_the_chain_has_its_gradient():
    """The true one, beside the feedback: of its own layer, as every input is cut."""

    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp([5, 12, 8, 9, 3]).module

        def forward(self, x):
            hidden = [x]
            for layer in self.layers:
                hidden.append(layer(hidden[-1]))
            self.seen = hidden[2]
            return hidden[-1]

    model = fastdfa.DFA(Leaves(), feedback=RULE)
    other = one_by_one(model)
    for each in (model, other):
        y = each(X)
        ((y * G).sum() + (each.module.seen**2).sum()).backward()
    for a, b in zip(gradients(model).values(), gradients(other).values(), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("rule", [
    RULE, fastdfa.Feedback(seed=1, shared=False), fastdfa.Feedback(seed=1, dense=False),
    fastdfa.Feedback(seed=1, dense=False, shared=False),
])  # fmt: skip
def test_groups_of_which_no_layer_is_fed(rule, monkeypatch):
    """The top ones, where layers computed ahead are not called, or their outputs not read."""
    monkeypatch.setitem(stages.FEW_CLASSES_BYTES, "cpu", 1)
    for how in ("stops early", "normalised between"):
        model = fastdfa.DFA(Used(how).double(), feedback=rule)
        other = one_by_one(model)
        step(model, X, G), step(other, X, G)
        for a, b in zip(gradients(model).values(), gradients(other).values(), strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_a_skip_round_a_chain_is_refused():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(5, 8, activation="tanh")
            self.layers = nn.Sequential(
                *[fastdfa.Linear(8, 8, activation="tanh") for _ in range(3)], fastdfa.Linear(8, 8)
            )
            self.head = fastdfa.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(h + self.layers(h))

    with pytest.raises(RuntimeError, match=r"'head' back to the input of 'layers\.0'"):
        fastdfa.DFA(Skip().double())(X)


def test_the_true_gradient_of_an_output_is_that_of_its_layer():
    """Of a chain the warning names the one layer whose output reaches the end."""

    class Reaches(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.norm = mlp(WIDTHS).module, nn.LayerNorm(8).double()

        def forward(self, x):
            hidden = [x]
            for layer in self.layers:
                hidden.append(layer(hidden[-1]))
            return hidden[-1] + self.norm(hidden[2]).sum(-1, keepdim=True)

    with pytest.warns(UserWarning, match="trains 'layers.1', 'layers.3', 'norm'"):
        fastdfa.DFA(Reaches(), feedback=RULE, allow_bypass=True)(X)


@pytest.mark.parametrize("passes_before", [0, 1])
@pytest.mark.parametrize("what", ["output", "output without autograd", "input"])
def test_a_modification_in_place_is_refused(what, passes_before):
    class Modifies(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.passes = mlp(WIDTHS).module, 0

        def forward(self, x):
            first, *rest = self.layers
            h = first(x)
            self.passes += 1
            if self.passes > passes_before:
                with torch.set_grad_enabled(what == "output"):
                    (x if what == "input" else h).mul_(2)
            for layer in rest:
                h = layer(h)
            return h

    model = fastdfa.DFA(Modifies(), feedback=RULE)
    for _ in range(passes_before):
        step(model, X.clone(), G)
    with pytest.raises(RuntimeError, match=r"modified .*in-?place"):
        step(model, X.clone(), G)


def test_the_features_of_a_point_stay():
    """Of a sequence that is fed flattened, under an error of one row a sample."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(WIDTHS).module

        def forward(self, x):
            return self.layers(x).mean(1)

    model = fastdfa.DFA(Mean(), feedback=RULE)
    other = one_by_one(model)
    for _ in range(2):
        x = randn(6, 4, 5)
        step(model, x, G), step(other, x, G)
        for a, b in zip(gradients(model).values(), gradients(other).values(), strict=True):
            assert_close(a, b)
    with pytest.raises(ValueError, match=r"expected 48 features .* got 36"):
        model(randn(6, 3, 5))


@pytest.mark.parametrize("watch", ["hook", "retain_grad"])
def test_a_gradient_that_is_watched_is_made(watch):
    seen = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp(WIDTHS).module

        def forward(self, x):
            for i, layer in enumerate(self.layers):
                x = layer(x)
                if i == 1 and self.watching:
                    x.register_hook(seen.append) if watch == "hook" else x.retain_grad()
                    self.h = x
            return x

    model = fastdfa.DFA(Watched(), feedback=RULE)
    model.module.watching = False
    step(model, X, G)
    model.module.watching = True
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
        gradient = seen.pop() if watch == "hook" else model.module.h.grad
        assert_close(gradient, G @ model.feedback_matrix("layers.2"))
        plain = mlp(WIDTHS)
        plain.module.load_state_dict(model.module.layers.state_dict())
        step(plain, X, G)
        for a, b in zip(gradients(model).values(), gradients(plain).values(), strict=True):
            assert_close(a, b)


# Autograd around it ---------------------------------------------------------------------------


def test_backward_again_and_several_forwards():
    model = mlp(WIDTHS)
    other = one_by_one(model)
    for each in (model, other):
        y, z = each(X), each(2 * X)
        (y * G).sum().backward(retain_graph=True)
        (z * G).sum().backward()
        (y * G).sum().backward()
    same_gradients(model, other)
    with pytest.raises(RuntimeError, match="second time"):
        (y * G).sum().backward()


def test_gradients_of_some_parameters_alone():
    model = mlp(WIDTHS)
    step(model, X, G)
    expected = gradients(model)
    y = model(X)
    wanted = [model.module[1].weight, model.module[2].bias]
    got = torch.autograd.grad((y * G).sum(), wanted)
    assert_close(got[0], expected["1.weight"])
    assert_close(got[1], expected["2.bias"])


def test_no_gradient_is_copied():
    """What the kernel made is what .grad holds."""
    made, op = [], fastdfa.ops.weight_gradients

    def kept(*args):
        grads = op(*args)
        made.extend(grad.data_ptr() for grad in grads)
        return grads

    model = mlp(WIDTHS, dtype=torch.float32)
    fastdfa.ops.weight_gradients = kept
    try:
        step(model, X.float(), G.float())
    finally:
        fastdfa.ops.weight_gradients = op
    assert [layer.weight.grad.data_ptr() for layer in model.module[:3]] == made


@pytest.mark.parametrize("until", ["forward", "backward"])
def test_nothing_is_kept_alive(until, monkeypatch):
    model = mlp(WIDTHS)
    step(model, X, G)
    node = assert_nothing_is_kept_alive(model, X, G, until, monkeypatch)
    assert node == "RootNodeBackward"


def test_under_autocast(chains):
    model = mlp([5, 16, 16, 16, 3], dtype=torch.float32)
    other = one_by_one(model)
    for each in (model, other):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(X.float())
        (y * G).sum().backward()
    assert chains == [3]
    same_gradients(model, other)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_may_not_change_its_width(layer):
    """Of any layer of a chain: B has a fixed size, whatever plan was kept."""
    model = mlp(WIDTHS)
    step(model, X, G)
    first, second = model.module[layer], model.module[layer + 1]
    width = len(first.weight)
    first.weight = nn.Parameter(first.weight[:-1].detach())
    first.bias = nn.Parameter(first.bias[:-1].detach())
    second.weight = nn.Parameter(second.weight[:, :-1].detach())
    with pytest.raises(ValueError, match=f"expected {width} features .* got {width - 1}"):
        model(X)


# The plan of a forward pass -------------------------------------------------------------------


def test_a_plan_serves_no_other_pass():
    """Other batches, another seed, another rule, a frozen layer, in any order."""
    model = mlp(WIDTHS)
    for rows in (6, 4, 6, 1):
        model.zero_grad()
        x, g = randn(rows, 5, seed=rows), randn(rows, 3, seed=rows + 1)
        step(model, x, g)
        assert_close(gradients(model), expected_gradients(model, x, g))
    step(model, X, G)
    state = model.state_dict() | {"seed": torch.tensor(77)}
    model.load_state_dict(state)
    model.zero_grad()
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G))
    model.module[1].requires_grad_(False)
    model.zero_grad()
    step(model, X, G)
    expected = expected_gradients(model, X, G, [model.feedback_matrix("1"), randn(3, 8) * 0,
                                                model.feedback_matrix("3")])  # fmt: skip
    expected["1.weight"] = expected["1.bias"] = None
    assert_close(gradients(model), expected)
    model.module[1].requires_grad_(True)
    step(model, X, G)
    model.feedback = fastdfa.Feedback(seed=1, error="sum")
    model.zero_grad()
    copied = fastdfa.DFA(copy.deepcopy(model.module), feedback=model.feedback)
    copied.load_state_dict(model.state_dict())
    step(model, X, G), step(copied, X, G)
    same_gradients(model, copied)
