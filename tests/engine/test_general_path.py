"""Anything may stand between two points: autograd differentiates it locally, the fused path gives
the same numbers, and no input gradient of a cut input is computed (contract 3, DESIGN 5.1)."""

import itertools
from collections import Counter

import pytest
import torch
from helpers.networks import (
    RULE,
    Apply,
    assert_close,
    blockwise_gradients,
    expected_gradients,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastdfa

pytestmark = pytest.mark.usefixtures("path")


def between(kind, n):
    """What stands between two layers of width n."""
    return {
        "module": lambda: [nn.Tanh()],
        "batch norm": lambda: [nn.BatchNorm1d(n), nn.ReLU()],
        "layer norm": lambda: [nn.GELU(), nn.LayerNorm(n)],
        "dropout": lambda: [nn.ReLU(), nn.Dropout(0.4)],
        "in place": lambda: [nn.ReLU(inplace=True)],
        "reshape": lambda: [nn.Unflatten(1, (2, n // 2)), nn.Softmax(1), nn.Flatten(1)],
        "softmax": lambda: [nn.Softmax(-1)],
        "trained": lambda: [nn.PReLU(n), nn.Linear(n, n), nn.Tanh()],
        "nothing": lambda: [],
    }[kind]()


KINDS = [
    "module", "batch norm", "layer norm", "dropout", "in place", "reshape", "softmax", "trained",
    "nothing",
]  # fmt: skip


def blocks_of(kind, linear, widths=(5, 12, 8, 10, 3)):
    torch.manual_seed(3)
    bias = kind != "batch norm"  # which takes the bias away: its gradient would be noise
    blocks = [
        nn.Sequential(linear(a, b, bias), *between(kind, b))
        for a, b in itertools.pairwise(widths[:-1])
    ]
    return nn.Sequential(*blocks, nn.Sequential(linear(*widths[-2:]))).double()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind, mode):
    """Every block alone, from e B at its output, has the gradients of the whole model."""
    ours, plain = blocks_of(kind, fastdfa.Linear), blocks_of(kind, nn.Linear)
    model = fastdfa.DFA(ours, feedback=RULE)
    getattr(model, mode)(), getattr(plain, mode)()
    x, g = randn(6, 5), randn(6, 3)
    torch.manual_seed(9)  # the masks of dropout
    y = step(model, x, g)
    feedback = [model.feedback_matrix(f"{i}.0") for i in (1, 2, 3)]
    torch.manual_seed(9)
    expected, y_plain = blockwise_gradients(plain, x, g, feedback)
    assert_close(y, y_plain)
    actual = gradients(model)
    assert_close(
        actual, {f"{i}.{n}": p for i, block in enumerate(expected) for n, p in block.items()}
    )


def general(model, how):
    """The same model, where something keeps its layers off the fused path."""
    layers = list(model.module)
    if how == "modules":  # activations as modules of their own
        tanh = []
        for layer in layers:
            plain = fastdfa.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
            plain.load_state_dict(layer.state_dict())
            tanh += [plain, nn.Tanh()]
        layers = tanh[:-1]
    elif how == "identity":
        layers = [m for layer in layers for m in (layer, nn.Identity())][:-1]
    elif how == "view":
        layers = [m for layer in layers for m in (layer, Apply(lambda h: h.view_as(h)))][:-1]
    elif how == "clone":
        layers = [m for layer in layers for m in (layer, Apply(torch.clone))][:-1]
    elif how == "forward hook":
        for layer in layers:
            layer.register_forward_hook(lambda module, args, output: output * 1.0)
    elif how == "backward hook":
        for layer in layers:
            layer.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return fastdfa.DFA(nn.Sequential(*layers), feedback=RULE)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "how", ["modules", "identity", "view", "clone", "forward hook", "backward hook"]
)
@pytest.mark.parametrize("rows", [(6,), (2, 3), ()])
def test_general_equals_fused(how, rows):
    model = mlp([5, 12, 8, 3])
    x, g = randn(*rows, 5), randn(*rows, 3)
    step(model, x, g)
    expected = gradients(model)
    assert_close(expected, expected_gradients(model, x, g))
    model.zero_grad()
    other = general(model, how)
    step(other, x, g)
    for actual, right in zip(gradients(other).values(), expected.values(), strict=True):
        assert_close(actual, right)


def test_an_activation_that_is_used_twice():
    """The output of a fused layer feeds the next layer and, after a cut of its own, the head."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(4, 6, activation="tanh")
            self.second = fastdfa.Linear(6, 6, activation="tanh")
            self.point = fastdfa.FeedbackPoint()
            self.head = fastdfa.Linear(12, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(torch.cat([self.second(h), self.point(h)], -1))

    model = fastdfa.DFA(Twice().double(), feedback=RULE)
    x, g = randn(7, 4), randn(7, 3)
    step(model, x, g)
    first, B = model.module.first, model.feedback_matrix
    assert B("second").shape == (3, 6) and B("head").shape == (3, 12)
    # One tensor, one point: it is fed once, whoever reads it.
    h = torch.tanh(x @ first.weight.T + first.bias).detach()
    delta = g @ B("second") * (1 - h * h)
    assert_close(first.weight.grad, delta.T @ x)


def test_a_loss_on_an_activation_adds_its_true_gradient():
    """Beside the feedback: what a model returns with its logits is no cut tensor's output."""

    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(4, 6, activation="tanh")
            self.second = fastdfa.Linear(6, 5, activation="tanh")
            self.head = fastdfa.Linear(5, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(self.second(h)), h

    model = fastdfa.DFA(Aux().double(), feedback=RULE, output="head")
    x, g, a = randn(7, 4), randn(7, 3), randn(7, 6, seed=5)
    first = model.module.first
    for logits, aux in ((1, 1), (1, 0), (0, 1)):
        model.zero_grad()
        y, h = model(x)
        loss = (h * a).sum() * aux if not logits else (y * g).sum()
        if logits and aux:
            loss = loss + (h * a).sum()
        loss.backward()
        signal = logits * (g @ model.feedback_matrix("second")) + aux * a
        delta = signal * (1 - h.detach() ** 2)
        assert_close(first.weight.grad, delta.T @ x)
        assert_close(first.bias.grad, delta.sum(0))
        assert (model.module.head.weight.grad is not None) == bool(logits)


@pytest.mark.parametrize("activation", ["tanh", "Softsign"])
def test_tied_weights(activation):
    """One Parameter in two layers gets both gradients."""
    model = mlp([6, 6, 6, 3], activation)
    model.module[1].weight = model.module[0].weight
    x, g = randn(7, 6), randn(7, 3)
    step(model, x, g)
    expected = expected_gradients(model, x, g)
    assert_close(model.module[0].weight.grad, expected["0.weight"] + expected["1.weight"])
    assert_close(model.module[1].bias.grad, expected["1.bias"])


@pytest.mark.parametrize("activation", ["tanh", "Softsign", None])
def test_parametrized_weights(activation):
    """weight = g v / |v|: the gradient of DFA goes on to g and v."""
    layer = fastdfa.Linear(
        4, 6, activation=nn.Softsign() if activation == "Softsign" else activation
    ).double()
    layer = nn.utils.parametrizations.weight_norm(layer)
    model = fastdfa.DFA(nn.Sequential(layer, fastdfa.Linear(6, 3).double()), feedback=RULE)
    x, g = randn(7, 4), randn(7, 3)
    step(model, x, g)
    f = {"tanh": torch.tanh, "Softsign": nn.functional.softsign, None: lambda a: a}[activation]
    parameters = [layer.parametrizations.weight.original0, layer.parametrizations.weight.original1]
    h = f(x @ layer.weight.T + layer.bias)
    expected = torch.autograd.grad(h, parameters, g @ model.feedback_matrix("1"))
    for p, right in zip(parameters, expected, strict=True):
        assert_close(p.grad, right)


def test_functional_call():
    model = mlp([4, 6, 5, 3])
    weights = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    for w in weights.values():
        w.requires_grad_()
    x, g = randn(7, 4), randn(7, 3)
    y = torch.func.functional_call(model, weights, (x,))
    found = torch.autograd.grad((y * g).sum(), list(weights.values()))
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(weights[n])
    expected = expected_gradients(model, x, g)
    assert_close(dict(zip(expected, found, strict=True)), expected)


def test_an_embedding_below():
    """Tokens in, and a table that receives the feedback of its rows."""
    layers = [nn.Embedding(11, 8), fastdfa.Linear(8, 7, activation="tanh"), fastdfa.Linear(7, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)
    tokens, g = torch.arange(12).reshape(4, 3) % 11, randn(4, 3, 3)
    step(model, tokens, g)
    assert list(model.feedback_points) == ["1", "2"]
    feedback = (g @ model.feedback_matrix("1")).reshape(12, 8)
    expected = torch.zeros(11, 8, dtype=torch.float64).index_add_(0, tokens.reshape(-1), feedback)
    assert_close(layers[0].weight.grad, expected)


# Blocks that are trained by local backprop ---------------------------------------------------


class Residual(nn.Module):
    def __init__(self, n, point=True):
        super().__init__()
        self.norm = nn.LayerNorm(n)
        self.inner = nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))
        self.point = fastdfa.FeedbackPoint() if point else nn.Identity()

    def forward(self, x):
        return self.point(x + self.inner(self.norm(x)))


@pytest.mark.parametrize("rows", [(6,), (2, 3)])
def test_residual_blocks(rows):
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Linear(4, 8), fastdfa.FeedbackPoint())
    model = fastdfa.DFA(
        nn.Sequential(stem, Residual(8), Residual(8), nn.Linear(8, 3)).double(), feedback=RULE
    )
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Sequential(nn.Linear(4, 8), nn.Identity()),
        Residual(8, False),
        Residual(8, False),
        nn.Linear(8, 3),
    ).double()
    x, g = randn(*rows, 4), randn(*rows, 3)
    y = step(model, x, g)
    assert list(model.feedback_points) == ["0.1", "1.point", "2.point"]
    feedback = [model.feedback_matrix(name) for name in model.feedback_points]
    expected, y_plain = blockwise_gradients(plain, x, g, feedback)
    assert_close(y, y_plain)
    actual = gradients(model)
    assert_close(actual, {f"{i}.{n}": p for i, b in enumerate(expected) for n, p in b.items()})


def test_transformer_blocks():
    """Attention, normalisation and the MLP of a block are trained by local backprop."""

    def layer():
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def build(cut):
        torch.manual_seed(0)
        blocks = [
            nn.Sequential(layer(), *([fastdfa.FeedbackPoint()] if cut else [])) for _ in range(2)
        ]
        return nn.Sequential(nn.Sequential(nn.Linear(5, 8)), *blocks, nn.Linear(8, 3)).double()

    ours, plain = build(True), build(False)
    plain = nn.Sequential(nn.Sequential(plain[0], plain[1]), plain[2], plain[3])
    model = fastdfa.DFA(ours, feedback=RULE)
    x, g = randn(2, 4, 5), randn(2, 4, 3)
    step(model, x, g)
    feedback = [model.feedback_matrix(name) for name in ("1.1", "2.1")]
    expected, _ = blockwise_gradients(plain, x, g, feedback)
    for block, right in zip(
        (list(ours[:2].parameters()), list(ours[2].parameters()), list(ours[3].parameters())),
        expected,
        strict=True,
    ):
        for p, gradient in zip(block, right.values(), strict=True):
            assert_close(p.grad, gradient)


# The fused path ------------------------------------------------------------------------------


def test_a_fused_chain_takes_one_projection(path, monkeypatch):
    """Which gates every layer itself: nothing is left for autograd to gate. Layers that are called
    alone have one each."""
    calls = {"project_gate": [], "gate": []}
    for name, made in calls.items():
        op = getattr(fastdfa.ops, name)

        def counted(*args, op=op, made=made, **options):
            made.append(args)
            return op(*args, **options)

        monkeypatch.setattr(fastdfa.ops, name, counted)
    model = mlp([5, 12, 8, 9, 3])
    step(model, randn(6, 5), randn(6, 3))
    projections = calls["project_gate"]
    assert len(projections) == (3 if path == "layers" else 1)
    assert sorted(h.shape[1] for made in projections for h in made[2]) == [8, 9, 12]
    assert [kind for made in projections for kind in made[3]] == [3, 3, 3]  # tanh
    assert calls["gate"] == []


# The work that is not done -------------------------------------------------------------------

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_int_mm", "addr", "dot")


class Products(TorchDispatchMode):
    """Records the matrix products: which weights they read, and the length of their inner sum."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr(): n for n, p in model.named_parameters()}
        self.read = Counter()
        self.inner = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for inner, *operands in products(func.overloadpacket.__name__, args):
            self.inner[inner] += 1
            for operand in operands:
                weight = self.weights.get(operand.untyped_storage().data_ptr())
                if weight is not None:
                    self.read[weight] += 1
        return func(*args, **(kwargs or {}))


def products(name, args):
    """The matrix products of a call: the length of the inner sum, then what is multiplied."""
    if name == "linear_chain":
        return [(weight.shape[1], weight) for weight in args[1]]
    if name == "weight_gradients":
        return [(a.shape[0], a, b) for a, b in zip(*args, strict=True)]
    if name not in PRODUCTS:
        return []
    a, b = args[-2:] if name not in ("addmm", "baddbmm", "addmv", "addr") else args[1:3]
    return [(a.shape[-1], a, b)]


def layers_between(kind):
    widths, layers = [5, 12, 14, 11, 3], []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += {
            "fused": [fastdfa.Linear(a, b, activation="tanh")],
            "unknown": [fastdfa.Linear(a, b, activation=nn.Softsign())],
            "modules": [fastdfa.Linear(a, b), nn.Tanh()],
            "norm": [fastdfa.Linear(a, b, activation="relu"), nn.LayerNorm(b), nn.Dropout(0.1)],
        }[kind]
    return nn.Sequential(*layers, fastdfa.Linear(11, 3)).double()


@pytest.mark.parametrize("rows", [(7,), (2, 13)])
@pytest.mark.parametrize("kind", ["fused", "unknown", "modules", "norm"])
def test_no_product_for_a_cut_input(kind, rows):
    """Four layers: four products forward, four weight gradients, and no weight is read backward."""
    model = fastdfa.DFA(layers_between(kind), feedback=RULE)
    x, g = randn(*rows, 5), randn(*rows, 3)
    m = x.numel() // 5
    step(model, x, g)  # B exists from here on
    model.zero_grad()
    with Products(model) as forward:
        y = model(x)
    with Products(model) as backward:
        (y * g).sum().backward()
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert forward.read == Counter(f"{n}.weight" for n in linears)
    assert backward.read == Counter()
    assert backward.inner[m] == 4


def test_the_first_layer_computes_the_gradient_of_an_input_that_wants_it():
    model = mlp([5, 12, 3])
    with Products(model) as products:
        step(model, randn(6, 5).requires_grad_(), randn(6, 3))
    assert products.read["module.0.weight"] == 2 and products.read["module.1.weight"] == 1


@pytest.mark.parametrize("kind", ["fused", "modules", "norm"])
def test_flops(kind):
    """Forward and weight gradients, and at most the projection beside them."""
    model = fastdfa.DFA(layers_between(kind), feedback=RULE)
    x, g = randn(16, 5), randn(16, 3)
    with FlopCounterMode(display=False) as counter:
        step(model, x, g)
    products = 2 * 2 * 16 * (5 * 12 + 12 * 14 + 14 * 11 + 11 * 3)
    projection = 2 * 16 * 3 * (12 + 14 + 11)
    assert products <= counter.get_total_flops() <= products + projection


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_no_unused_gradient_of_an_activation():
    """Neither the tensor a layer reads nor the tensor before it keeps a .grad."""
    seen = []
    model = mlp([5, 12, 8, 3])
    for layer in model.module:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    step(model, randn(6, 5), randn(6, 3))
    assert all(h.grad is None for h in seen)
