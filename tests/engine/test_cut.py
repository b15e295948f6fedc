"""`cut=`: where the network is cut is the root's choice, from nowhere (backprop) to everywhere."""

import copy
from itertools import pairwise

import pytest
import torch
from helpers.kinds import FASTDFA, KINDS, data
from helpers.networks import RULE, assert_close, blockwise_gradients, gradients, randn, step
from torch import nn

import fastdfa

X, G = randn(6, 5), randn(6, 3)


def hidden(n, m, *, norm=None, activation="tanh"):
    """A hidden layer, with a norm between it and its activation where one is given."""
    if norm is None:
        return [fastdfa.Linear(n, m, activation=activation)]
    # A bias in front of a batch norm has a gradient of zero, of which nothing can be said.
    return [fastdfa.Linear(n, m, bias=norm is not nn.BatchNorm1d), norm(m), nn.ReLU()]


def layers(norm=None, activation="tanh"):
    torch.manual_seed(0)
    widths = [5, 8, 7, 9, 6]
    made = [m for n, k in pairwise(widths)
            for m in hidden(n, k, norm=norm, activation=activation)]  # fmt: skip
    return nn.Sequential(*made, fastdfa.Linear(6, 3)).double()


class Custom(nn.Module):
    """The same layers, called by a forward of their own."""

    def __init__(self, module):
        super().__init__()
        self.parts = module

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


def true_gradients(module, x=X, g=G):
    """By torch's autograd through the same modules, outside of every root."""
    module.zero_grad()
    (module(x) * g).sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return found


NORMS = {"plain": None, "batch norm": nn.BatchNorm1d, "layer norm": nn.LayerNorm}
FORMS = {"sequential": lambda m: m, "custom": Custom}


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu", "leaky_relu"])
@pytest.mark.parametrize("form", FORMS)
def test_no_cut_is_backprop(form, activation):
    module = FORMS[form](layers(activation=activation))
    expected = true_gradients(module)
    model = fastdfa.DFA(module, RULE, cut=())
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
        assert_close(gradients(model), expected)
        assert model.feedback_points == []


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("form", FORMS)
def test_no_cut_through_norms(form, norm):
    module = FORMS[form](layers(NORMS[norm]))
    expected = true_gradients(copy.deepcopy(module))
    model = fastdfa.DFA(module, RULE, cut=())
    step(model, X, G)
    assert_close(gradients(model), expected)


def blocks_of(module, cuts):
    """The modules between cuts, each block an nn.Sequential."""
    blocks, block = [], []
    for name, part in module.named_children():
        if name in cuts:
            blocks.append(nn.Sequential(*block))
            block = []
        block.append(part)
    return [*blocks, nn.Sequential(*block)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cut", [("2",), ("1", "4"), ("1", "2", "3"), ("4",)])
@pytest.mark.parametrize("form", FORMS)
def test_some_cuts(form, cut, norm):
    """Between two cuts the gradient is exact: DFA by definition, block by block."""
    module = layers(NORMS[norm])
    if norm != "plain":
        cut = tuple(str(3 * int(name)) for name in cut)
    plain = copy.deepcopy(module)
    prefix = "" if form == "sequential" else "parts."
    model = fastdfa.DFA(FORMS[form](module), RULE, cut=[prefix + name for name in cut])
    for _ in range(2):
        model.zero_grad()
        step(model, X, G)
    assert model.feedback_points == [prefix + name for name in cut]
    B = [model.feedback_matrix(prefix + name) for name in cut]
    made, _ = blockwise_gradients(blocks_of(plain, cut), X, G, B)
    expected = [grad for block in made for grad in block.values()]
    for actual, right in zip(gradients(model).values(), expected, strict=True):
        assert_close(actual, right)


@pytest.mark.parametrize("k, points", [
    (1, ["1", "2", "3", "4"]), (2, ["2", "4"]), (3, ["3"]), (4, ["4"]), (9, [])
])  # fmt: skip
def test_every_kth(k, points):
    model = fastdfa.DFA(layers(), RULE, cut=k)
    step(model, X, G)
    assert model.feedback_points == points


@pytest.mark.parametrize("kind", KINDS)
def test_no_cut_in_every_kind_of_network(kind):
    """A network that is cut nowhere gives torch's gradients."""
    torch.manual_seed(0)
    module = KINDS[kind][0](FASTDFA).double()
    inputs, g = data(kind)
    twin = copy.deepcopy(module)
    (twin(*inputs) * g).sum().backward()
    model = fastdfa.DFA(module, RULE, cut=())
    (model(*inputs) * g).sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    assert_close(gradients(model), expected)


def test_blocks_of_a_converted_network():
    """Every second block ends in a cut."""
    torch.manual_seed(0)
    sizes = (5, 8, 8, 8, 8)
    blocks = [nn.Sequential(nn.Linear(n, m), nn.Tanh())
              for n, m in pairwise(sizes)]  # fmt: skip
    plain = nn.Sequential(*blocks, nn.Linear(8, 3)).double()
    model = fastdfa.convert(plain, RULE, blocks=nn.Sequential, cut=2)
    step(model, X, G)
    assert model.feedback_points == ["1", "3"]


def test_the_choice_may_change():
    model = fastdfa.DFA(layers(), RULE)
    everywhere = fresh(model)
    expected = true_gradients(copy.deepcopy(model.module))
    model.cut = ()
    assert_close(fresh(model), expected)
    model.cut = "all"
    assert_close(fresh(model), everywhere)


def fresh(model):
    model.zero_grad()
    step(model, X, G)
    return gradients(model)


@pytest.mark.parametrize("cut", [(), ("2",), "all"])
def test_copies_keep_the_choice(cut):
    model = fastdfa.DFA(layers(), RULE, cut=cut)
    assert_close(fresh(copy.deepcopy(model)), fresh(model))


def test_a_hook_sees_the_gradient_of_an_uncut_activation():
    module = Custom(layers())
    seen = []

    class Watched(nn.Module):
        def forward(self, x):
            x.register_hook(lambda grad: seen.append(grad.clone()))
            return x

    module.parts.insert(2, Watched())
    model = fastdfa.DFA(module, RULE, cut=())
    step(model, X, G)
    assert len(seen) == 1 and seen[0].abs().sum() > 0


@pytest.mark.parametrize("cut", [(), ("2",), ("1", "3")])
def test_streaming(cut):
    """A streaming step updates as an ordinary one."""
    models = [fastdfa.DFA(layers(), RULE, cut=cut) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    streaming = fastdfa.StreamingStep(models[1], optimizers[1])
    for _ in range(2):
        optimizers[0].zero_grad()
        step(models[0], X, G)
        optimizers[0].step()
        streaming(lambda: (models[1](X) * G).sum())
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in pairs)


def test_a_b_that_learns_of_some_cuts():
    model = fastdfa.DFA(layers(), RULE, cut=("2",))
    step(model, X, G)
    (B,) = model.learn_feedback()
    model.zero_grad()
    step(model, X, G)
    h = model.module[1](model.module[0](X))
    assert_close(B.grad, G.T @ h.detach())


@pytest.mark.parametrize("cut, error, words", [
    (0, ValueError, "positive"), (-1, ValueError, "positive"), (True, TypeError, "bool"),
    (2.5, TypeError, "float"), (None, TypeError, "NoneType"), ("nowhere", ValueError, "'nowhere'"),
    (("1", "x"), ValueError, "'x'"), ((1,), TypeError, "int"), (("0",), ValueError, "'0'"),
])  # fmt: skip
def test_bad_choices(cut, error, words):
    with pytest.raises(error, match="cut") as caught:
        fastdfa.DFA(layers(), RULE, cut=cut)
    assert words in str(caught.value)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("cut", [(), ("2",)])
def test_compiled(cut):
    model = fastdfa.DFA(layers(), RULE, cut=cut)
    expected = fresh(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    (compiled(X) * G).sum().backward()
    assert_close(gradients(model), expected)
