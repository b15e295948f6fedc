"""One network through every way there is, with equal gradients; and what holds of all gradients of
DFA, whatever the network (metamorphic): here no formula of the whole is needed."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.networks import assert_close, expected_gradients, gradients, mlp, randn, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdfa

WIDTHS = [5, 12, 8, 9, 3]
X, G = randn(6, 5), randn(6, 3)
RULES = {
    "shared": fastdfa.Feedback(seed=1),
    "separate": fastdfa.Feedback(seed=1, shared=False, error="sum"),
    "low rank": fastdfa.Feedback(seed=1, rank=2, density=0.5),
    "sign": fastdfa.Feedback(seed=1, signal="sign", scale="tinydfa"),
}


def idle(*arguments):
    """A hook that does nothing."""


class Custom(nn.Module):
    """The layers under the names that they have in an `nn.Sequential`, called by code of one's
    own."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in enumerate(layers):
            self.add_module(str(name), layer)

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class Checkpointed(Custom):
    """The same, each layer under activation checkpointing."""

    def forward(self, x):
        for layer in self.children():
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class ActivationsApart(Custom):
    """The same, the activations called as functions behind layers without one."""

    def __init__(self, layers):
        super().__init__(layers)
        for layer in layers:
            layer.activation = None

    def forward(self, x):
        *hidden, head = self.children()
        for layer in hidden:
            x = torch.tanh(layer(x))
        return head(x)


def hooked(layers, hook="forward", which=(1,)):
    for k in which:
        getattr(layers[k], f"register_{hook}_hook")(idle)
    return nn.Sequential(*layers)


def tensor_hooks(layers):
    """A hook that does nothing on what each layer returns."""
    for layer in layers[:-1]:
        layer.register_forward_hook(lambda layer, args, y: y.register_hook(idle) and None)
    return nn.Sequential(*layers)


WAYS = {
    "a sequence": lambda layers: nn.Sequential(*layers),
    "a forward hook": hooked,
    "forward pre-hooks": lambda layers: hooked(layers, "forward_pre", range(4)),
    "a full backward hook": lambda layers: hooked(layers, "full_backward", [2]),
    "tensor hooks": tensor_hooks,
    "a custom module": Custom,
    "activations apart": ActivationsApart,
    "checkpointed": Checkpointed,
}


def of(way, rule):
    """The same network by any way: the same weights, and the same names of the layers."""
    torch.manual_seed(0)
    model = mlp(WIDTHS, feedback=RULES[rule])
    return fastdfa.DFA(WAYS[way](list(copy.deepcopy(model.module))), feedback=RULES[rule])


def expected(rule):
    """Output and gradients of the plain sequence."""
    torch.manual_seed(0)
    model = mlp(WIDTHS, feedback=RULES[rule])
    y = step(model, X, G)
    return y.detach(), gradients(model)


def weights_of(model):
    """Gradients by the numbers of the layers."""
    found = gradients(model)
    return {name: found[name] for name in sorted(found)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_the_same_gradients(way, rule):
    model, (y, right) = of(way, rule), expected(rule)
    for _ in range(2):  # the first pass and those that know of it
        model.zero_grad()
        assert_close(step(model, X, G), y)
        assert_close(weights_of(model), dict(sorted(right.items())))
    assert model.feedback_points == ["1", "2", "3"]


def test_the_gradients_are_those_of_the_formulas():
    """So that the ways are not all wrong alike."""
    model = mlp(WIDTHS, feedback=RULES["separate"])
    step(model, X, G)
    assert_close(gradients(model), expected_gradients(model, X, G, reduction="sum"))


@pytest.mark.parametrize("nested", [True, False])
def test_other_names_have_the_same_gradients_where_b_is_shared(nested):
    """Of layers in sequences within sequences, or with an `nn.Identity` between any two."""
    torch.manual_seed(0)
    first, second, *rest = mlp(WIDTHS).module
    net = nn.Sequential(first, nn.Sequential(second, nn.Sequential(*rest)))
    if not nested:
        between = [module for layer in (first, second, *rest) for module in (layer, nn.Identity())]
        net = nn.Sequential(*between[:-1])
    model, (y, right) = fastdfa.DFA(net, feedback=RULES["shared"]), expected("shared")
    assert_close(step(model, X, G), y)
    assert_close(dict(enumerate(gradients(model).values())), dict(enumerate(right.values())))


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("way", ["a sequence", "a custom module", "activations apart"])
@pytest.mark.parametrize("rule", ["shared", "separate"])
def test_compiled_in_one_graph(way, rule):
    model, (y, right) = of(way, rule), expected(rule)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        out = run(X)
        (out * G).sum().backward()
        assert_close(out.detach(), y)
        assert_close(weights_of(model), dict(sorted(right.items())))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "checkpointed"])
def test_the_update_of_a_streaming_step(way, rule):
    """By SGD of rate 1 the gradients are what the parameters lose."""
    model, (y, right) = of(way, rule), expected(rule)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    streaming = fastdfa.StreamingStep(model, torch.optim.SGD(model.parameters(), lr=1.0))
    loss = streaming(lambda: (model(X) * G).sum())
    assert_close(loss.detach(), (y * G).sum())
    lost = {name: before[name] - p.detach() for name, p in model.module.named_parameters()}
    assert_close(dict(sorted(lost.items())), dict(sorted(right.items())))


@pytest.mark.parametrize("way", ["a sequence", "a custom module", "a forward hook"])
def test_several_threads(way):
    """Over one model, each by `autograd.grad`, and each has all of its gradients."""
    model, (_, right) = of(way, "shared"), expected("shared")
    names, parameters = zip(*model.module.named_parameters(), strict=True)

    def work(_):
        for _ in range(4):
            found = torch.autograd.grad((model(X) * G).sum(), parameters)
            assert_close(dict(zip(names, found, strict=True)), {n: right[n] for n in names})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


# Metamorphic -----------------------------------------------------------------------------------


def network(kind, rule="shared"):
    """An MLP as one node and layer by layer, and one with all that may stand between layers."""
    if kind != "between":
        return of({"whole": "a sequence", "by layer": "forward pre-hooks"}[kind], rule)
    layers = [
        fastdfa.Linear(5, 12, activation="gelu"), nn.LayerNorm(12), fastdfa.Linear(12, 8),
        nn.ReLU(inplace=True), fastdfa.FeedbackPoint(), nn.Linear(8, 9), nn.Softsign(),
        fastdfa.Linear(9, 9, bias=False), nn.PReLU(), fastdfa.Linear(9, 3),
    ]  # fmt: skip
    return fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULES[rule])


KINDS = ["whole", "by layer", "between"]


def taken(model, x, g):
    """The gradients of one pass from zero."""
    model.zero_grad()
    step(model, x, g)
    return gradients(model)


def summed(*parts):
    """Gradients added, each times its factor."""
    return {name: sum(factor * part[name] for factor, part in parts) for name in parts[0][1]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["shared", "separate", "low rank"])
def test_gradients_are_linear_in_the_error(kind, rule):
    model, other = network(kind, rule), randn(6, 3, seed=5)
    parts = summed((2.0, taken(model, X, G)), (-3.0, taken(model, X, other)))
    assert_close(taken(model, X, 2 * G - 3 * other), parts, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["shared", "low rank", "sign"])
def test_gradients_add_up_over_rows(kind, rule):
    """Of any parts of a batch, a batch of one among them."""
    model = network(kind, rule)
    parts = [(1.0, taken(model, X[rows], G[rows])) for rows in (slice(0, 1), slice(1, 6))]
    assert_close(taken(model, X, G), summed(*parts), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_later_weights_do_not_matter_for_earlier_gradients(kind, rule):
    """Given e: of each layer, what is behind it may be anything."""
    model = network(kind, rule)
    before, behind = taken(model, X, G), model.module[5 if kind == "between" else 2 :]
    later = {id(p) for p in behind.parameters()}
    with torch.no_grad():
        for p in model.module.parameters():
            if id(p) in later:
                p.mul_(-3).add_(0.1)
    after = taken(model, X, G)
    earlier = [n for n, p in model.module.named_parameters() if id(p) not in later]
    assert 0 < len(earlier) < len(before)
    assert_close({n: after[n] for n in earlier}, {n: before[n] for n in earlier}, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_rows_does_not_matter(kind, rule):
    model, order = network(kind, rule), torch.tensor([3, 0, 5, 1, 4, 2])
    assert_close(taken(model, X[order], G[order]), taken(model, X, G), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_is_the_rows_times_a_mean(kind):
    """Of all gradients but the head's, which is the true one."""
    model = network(kind)
    mean = taken(model, X, G)
    model.feedback = fastdfa.Feedback(seed=1, error="sum")
    total = taken(model, X, G)
    head = list(mean)[-2:]
    assert_close({n: total[n] for n in head}, {n: mean[n] for n in head})
    hidden = [n for n in mean if n not in head and not (kind == "between" and n.startswith("8"))]
    assert_close({n: total[n] for n in hidden}, {n: 6 * mean[n] for n in hidden}, 1e-9)
