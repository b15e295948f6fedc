"""`convert` makes a network of torch's own modules train by DFA, and changes nothing else.

Gradients are compared with the definition, on a copy of the plain network: every tensor that is
cut is detached, and handed e B.
"""

import copy
import pickle
import warnings
from collections import namedtuple
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from helpers.networks import RULE, Apply, assert_close, feedback_of, gradients, randn, step
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastdfa

pytestmark = pytest.mark.filterwarnings(
    "ignore:the true gradient of the output trains",
    "ignore:enable_nested_tensor is True",
)


def by_definition(plain, model, x, g, before=(), behind=()):
    """The gradients of `plain`, cut at the input of some modules and at the output of others, with
    the feedback matrices of `model`. Names of modules are qualified."""
    tensors = []

    def cut(t):
        if not t.requires_grad:
            return t
        if not any(t is seen for seen in tensors):
            tensors.append(t)
        return t.detach()

    for name in before:
        plain.get_submodule(name).register_forward_pre_hook(lambda _, args: (cut(args[0]),))
    for name in behind:
        plain.get_submodule(name).register_forward_hook(lambda _, args, h: cut(h))
    y = plain(x)
    e = g.reshape(-1, g.shape[-1])
    signals = [(e @ B).reshape(t.shape) for t, B in zip(tensors, feedback_of(model), strict=True)]
    torch.autograd.backward([y, *tensors], [g, *signals])
    return gradients(plain)


def without_root(model):
    """The state of what was converted, without that of the root."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("fastdfa.")}


def check(plain, x, before=(), behind=(), **options):
    """Converts a copy; its outputs, names and gradients must be right. Returns it."""
    plain = plain.double()
    net = copy.deepcopy(plain)
    parameters = list(net.parameters())
    model = fastdfa.convert(net, RULE, **options)
    assert model is net and isinstance(net, type(plain))
    assert [a is b for a, b in zip(net.parameters(), parameters, strict=True)]
    assert [*net.state_dict()] == ["fastdfa.seed", *plain.state_dict()]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in plain.named_parameters()]
    y = plain(x)
    plain.load_state_dict(without_root(net))  # the pass above moved the statistics of batch norms
    g = randn(*y.shape, seed=5)
    assert_close(step(model, x, g), y)
    assert_close(gradients(model), by_definition(plain, model, x, g, before, behind))
    return model


# Networks ------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)
    )


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 2, padding="same", padding_mode="circular"), nn.GELU(),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)
        self.conv2, self.norm2 = nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        h += x
        return self.relu(h)


def resnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        ResidualBlock(4), ResidualBlock(4), ResidualBlock(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


class Transformer(nn.Module):
    """Tokens [N, T] -> logits [N, T, 11]."""

    def __init__(self, norm_first=False, tied=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 11)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens, **options):
        return self.head(self.encoder(self.embedding(tokens), **options))


TOKENS = torch.arange(12).reshape(3, 4) % 11
IMAGES = randn(4, 2, 6, 6)


class Recurrent(nn.Module):
    """A cell called T times: [N, T, 5] -> [N, 3]."""

    def __init__(self):
        super().__init__()
        self.input, self.state = nn.Linear(5, 8), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 8)
        for t in range(x.shape[1]):
            h = torch.tanh(self.input(x[:, t]) + self.state(h))
        return self.head(h)


def test_mlp():
    model = check(mlp(), randn(6, 5), before=["2", "4"])
    assert model.feedback_points == ["2", "4"]
    assert [type(m) for m in model] == [
        fastdfa.Linear, nn.Identity, fastdfa.Linear, nn.Identity, fastdfa.Linear,
    ]  # fmt: skip


def test_cnn():
    model = check(cnn(), IMAGES, before=["2", "6", "9"])
    assert model.feedback_points == ["2", "6", "9"]
    assert {n for n, m in model.named_children() if isinstance(m, nn.Identity)} == {"1", "7"}


def test_conv1d():
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    check(net, randn(4, 2, 8), before=["2", "4"])


def test_a_recurrent_cell():
    model = check(Recurrent(), randn(4, 3, 5), before=["state", "head"])
    assert model.feedback_points == ["state", "state#2", "head"]


def test_local_backprop_between_the_layers():
    """What has no layer of fastdfa's is differentiated by autograd, up to the next cut."""
    net = nn.Sequential(
        nn.GRU(5, 8, batch_first=True), Apply(lambda pair: pair[0]), nn.LayerNorm(8),
        nn.Linear(8, 6), nn.Softsign(), nn.Linear(6, 3),
    )  # fmt: skip
    check(net, randn(4, 7, 5), before=["3", "5"])


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_by_blocks(norm_first):
    names = ["embedding", "encoder.layers.0", "encoder.layers.1"]
    blocks = ["embedding", nn.TransformerEncoderLayer]
    model = check(Transformer(norm_first), TOKENS, behind=names, blocks=blocks)
    assert model.feedback_points == names
    assert model.conversion.layers == {}


def test_three_points_a_block():
    """As published for transformers (2006.12878): every part of a block learns from its own."""
    names = [f"encoder.layers.{k}.{part}" for k in (0, 1) for part in ("norm1", "linear1", "norm2")]
    model = check(
        Transformer(),
        TOKENS,
        behind=names,
        blocks=["encoder.layers.*.norm?", "encoder.layers.*.linear1"],
    )
    assert model.feedback_points == names


def test_resnet_by_blocks():
    names = ["2", "3", "4", "5"]
    model = check(resnet(), IMAGES, behind=names, blocks=["2", ResidualBlock])
    assert model.feedback_points == names


def test_a_skip_connection_is_refused_and_blocks_are_the_way_out():
    net = resnet().double()
    model = fastdfa.convert(net, RULE)
    with pytest.raises(RuntimeError, match=r"3\.conv1"):
        model(IMAGES)
    model = fastdfa.convert(model.conversion.undo(), RULE, blocks=ResidualBlock)
    model(IMAGES).sum().backward()
    assert model.feedback_points == ["3", "4", "5"]


def test_a_model_that_is_one_layer():
    net = nn.Linear(5, 3).double()
    model = fastdfa.convert(net, RULE)
    assert model is net and isinstance(net, fastdfa.Linear)
    step(model, randn(6, 5), randn(6, 3))
    assert_close(net.weight.grad, randn(6, 3).T @ randn(6, 5))


# What stays ----------------------------------------------------------------------------------


def test_everything_that_held_a_layer_holds_it_still():
    """References, the training mode, frozen parameters, hooks and their handles, an optimizer."""
    net = mlp()
    net.eval()
    net[2].weight.requires_grad_(False)
    seen = []
    handle = net[0].register_forward_pre_hook(lambda module, args: seen.append(module))
    layer, optimizer = net[0], torch.optim.SGD(net.parameters(), lr=0.1)
    model = fastdfa.convert(net)
    assert net[0] is layer and type(layer) is fastdfa.Linear
    assert not any(module.training for module in net.modules())
    model(randn(6, 5, dtype=torch.float32)).sum().backward()
    assert seen == [layer]
    handle.remove()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    model(randn(6, 5, dtype=torch.float32))
    assert seen == [layer] and net[2].weight.grad is None


def test_dtype_and_meta_device():
    net = mlp().to(torch.bfloat16)
    assert {p.dtype for p in fastdfa.convert(net).parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        net = mlp()
    assert all(p.is_meta for p in fastdfa.convert(net).parameters())


def test_a_checkpoint_of_the_plain_model_loads():
    saved = mlp().state_dict()
    model = fastdfa.convert(mlp())
    seed = model.seed.clone()
    model.load_state_dict(saved)
    assert_close(without_root(model), dict(saved))
    assert torch.equal(model.seed, seed)


class Adapter(nn.Linear):
    """A subclass with a path of its own, as LoRA's layers."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def own_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2
    return layer


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


class Lora(nn.Module):
    """Wraps a layer as peft does: it is called, and what two narrow layers make is added."""

    def __init__(self, n, dropout=0.0):
        super().__init__()
        self.base_layer = nn.Linear(n, n).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(n, 2, bias=False), nn.Linear(2, n, bias=False)
        self.lora_dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(self.lora_dropout(x)))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Adapter(8, 8)

    def forward(self, x):
        return self.layer(x=x)


made = nn.utils.parametrizations
OF_OTHER_KINDS = {
    "subclass": lambda: Adapter(8, 8),
    "own forward": lambda: own_forward(nn.Linear(8, 8)),
    "spectral norm": lambda: made.spectral_norm(nn.Linear(8, 8)),
    "weight norm": lambda: made.weight_norm(nn.Linear(8, 8, bias=False)),
    "orthogonal": lambda: made.orthogonal(nn.Linear(8, 8)),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "weight norm by hooks": lambda: nn.utils.weight_norm(nn.Linear(8, 8)),
    "pruned": lambda: pruned(nn.Linear(8, 8)),
    "adapter": lambda: Lora(8),
    "keyword": ByKeyword,
}


def of_other_kinds(kind):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), OF_OTHER_KINDS[kind](), nn.Tanh(), OF_OTHER_KINDS[kind](),
        nn.Tanh(), nn.Linear(8, 3),
    ).double()  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", OF_OTHER_KINDS)
def test_layers_of_other_kinds_are_cut_as_the_linear_layers_that_they_are(kind):
    """Parametrized, pruned, subclasses, adapters: inside all is autograd's, from their output."""
    plain, model = of_other_kinds(kind), fastdfa.convert(of_other_kinds(kind), RULE)
    names = ["2.layer", "4.layer"] if kind == "keyword" else ["2", "4"]
    assert list(model.conversion.layers) == ["0", *names, "6"] and not model.conversion.kept
    x, g = randn(6, 5), randn(6, 3)
    for _ in range(2):  # the norm of a spectral one goes on with each pass
        y = step(model, x, g)
        feedback, cuts = [], []

        def cut(module, args, kwargs, feedback=feedback, cuts=cuts):
            (h,) = [*args, *kwargs.values()]
            cuts.append(h)
            feedback.append(g @ model.feedback_matrix("6" if len(cuts) > 2 else names[0]))
            return (h.detach(),), {}

        hooks = [
            plain.get_submodule(name).register_forward_pre_hook(cut, with_kwargs=True)
            for name in (*names, "6")
        ]
        expected = plain(x)
        torch.autograd.backward([expected, *cuts], [g, *feedback])
        for hook in hooks:
            hook.remove()
        assert_close(y, expected)
    assert model.feedback_points == [*names, "6"]
    assert_close(gradients(model), gradients(plain))
    undone, before = model.conversion.undo(), list(plain.modules())
    assert [type(m).__name__ for m in undone.modules()] == [type(m).__name__ for m in before]
    hooks = [len(m._forward_pre_hooks) for m in undone.modules()]
    assert hooks == [len(m._forward_pre_hooks) for m in before]
    assert [len(m._forward_pre_hooks_with_kwargs) for m in undone.modules()] == [0] * len(before)


def test_every_kind_of_convolution_is_cut():
    net = nn.Sequential(
        nn.ConvTranspose1d(2, 3, 2), nn.Tanh(), nn.Unflatten(2, (2, 2, 2)), nn.Tanh(),
        nn.Conv3d(3, 2, 2), nn.Flatten(), nn.Linear(2, 3),
    )  # fmt: skip
    check(net, randn(4, 2, 7), before=["4", "6"])


@pytest.mark.parametrize("kind", ["spectral norm", "adapter", "own forward"])
def test_a_checkpoint_runs_them_again_as_they_were(kind):
    """Outside of every root: a layer whose input requires grad saves other tensors."""
    x, g = randn(6, 5), randn(6, 3)
    eager = fastdfa.convert(of_other_kinds(kind).eval(), RULE)
    net = of_other_kinds(kind).eval()
    model = fastdfa.convert(nn.Sequential(*net[:1], Checkpointed(net[1:6]), net[6]), RULE)
    for context in (nullcontext, lambda: fastdfa.backprop(model), nullcontext):
        for each in (eager, model):
            each.zero_grad()
            with context() if each is model else nullcontext():
                step(each, x, g)
        if context is nullcontext:
            found, expected = gradients(model).values(), gradients(eager).values()
            for a, b in zip(found, expected, strict=True):
                assert (a is None) == (b is None) and (a is None or torch.allclose(a, b))


def test_it_is_counted_and_named_by_cut():
    model = fastdfa.convert(of_other_kinds("spectral norm"), RULE, cut=2)
    model(randn(6, 5)).sum().backward()
    assert model.feedback_points == ["4"]
    model.cut = ["2"]
    model(randn(6, 5)).sum().backward()
    assert model.feedback_points == ["2"]


def test_removing_a_parametrization_leaves_a_layer_that_is_cut():
    model = fastdfa.convert(of_other_kinds("weight norm"), RULE)
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    model(randn(6, 5)).sum().backward()
    assert model.feedback_points == ["2", "4", "6"]
    assert type(model.conversion.undo()[2]) is nn.Linear and not model[2]._forward_pre_hooks


# What is left, and said to be ----------------------------------------------------------------


class OwnMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(8, 8))])

    def forward(self, x):
        return x @ self.weights[0]


LEFT = {
    "lstm": (lambda: nn.LSTM(8, 8), ["2"]),
    "gru": (lambda: nn.GRU(8, 8), ["2"]),
    "cell": (lambda: nn.GRUCell(8, 8), ["2"]),
    "attention": (lambda: nn.MultiheadAttention(8, 2), ["2", "2.out_proj"]),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), ["2"]),
    "list": (OwnMatrix, ["2.weights"]),
    "parametrized": (lambda: made.orthogonal(nn.GRU(8, 8), "weight_hh_l0"), ["2"]),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_stays_on_backprop_is_named_before_training(kind):
    make, names = LEFT[kind]
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), make(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match=f"'{names[0]}', a .*: not cut at the input") as caught:
        model = fastdfa.convert(net, RULE)
    assert [warning.filename for warning in caught] == [__file__]
    assert sorted(model.conversion.kept) == names
    assert f"{names[0]} " in str(model.conversion) and "it learns by backprop" in str(
        model.conversion
    )


def test_what_nothing_is_before_is_named_in_the_table_alone():
    net = nn.Sequential(nn.EmbeddingBag(11, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conversion = fastdfa.convert(net, RULE).conversion
        fastdfa.convert(nn.Sequential(nn.GRU(5, 8), Apply(lambda pair: pair[0]), nn.Linear(8, 3)))
        frozen = nn.Sequential(nn.Linear(5, 8), nn.GRU(8, 8).requires_grad_(False), nn.Linear(8, 3))
        fastdfa.convert(frozen)
    assert list(conversion.kept) == ["0"] and "EmbeddingBag" in str(conversion)


def test_out_proj_of_attention_is_left_alone():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 3)})
    conversion = fastdfa.convert(net).conversion
    assert list(conversion.layers) == ["head"]
    assert sorted(conversion.kept) == ["attention", "attention.out_proj"]


def test_a_layer_that_recomputes_its_weight():
    """torch.nn.utils.spectral_norm sets a plain tensor as weight before every call."""
    torch.manual_seed(1)
    plain = mlp().double().eval()
    plain[0] = nn.utils.spectral_norm(plain[0])
    check(plain, randn(6, 5), before=["2", "4"])


# Folding -------------------------------------------------------------------------------------


class Piecewise(nn.Sequential):
    """Reads its own layers one by one."""

    def forward(self, x):
        return self[0](x) + self[2](self[1](self[0](x)))


def with_hook(module):
    module.register_forward_hook(lambda module, args, h: h * 2)
    return module


def with_backward_hook(module):
    module.register_full_backward_hook(lambda module, inputs, outputs: None)
    return module


SHARED = nn.Linear(5, 5)
TANH = nn.Tanh()
FOLDS = {
    "known": (lambda: [nn.Linear(5, 5), nn.LeakyReLU(0.2)], True),
    "shared activation": (lambda: [nn.Linear(5, 5), TANH, nn.LayerNorm(5), TANH], True),
    "no kernel": (lambda: [nn.Linear(5, 5), nn.Softsign()], False),
    "parameters": (lambda: [nn.Linear(5, 5), nn.PReLU()], False),
    "something between": (lambda: [nn.Linear(5, 5), nn.Dropout(0.0), nn.Tanh()], False),
    "hook of the layer": (lambda: [with_hook(nn.Linear(5, 5)), nn.Tanh()], False),
    "backward hook": (lambda: [with_backward_hook(nn.Linear(5, 5)), nn.Tanh()], False),
    "hook of the activation": (lambda: [nn.Linear(5, 5), with_hook(nn.Tanh())], False),
    "forward of the activation": (lambda: [nn.Linear(5, 5), own_forward(nn.Tanh())], False),
    "shared layer": (lambda: [SHARED, nn.Tanh(), SHARED, nn.LayerNorm(5)], False),
    "own forward": (lambda: [Piecewise(nn.Linear(5, 5), nn.Tanh(), nn.LayerNorm(5))], False),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("case", FOLDS)
def test_which_activations_are_folded(case):
    make, folded = FOLDS[case]
    plain = nn.Sequential(*copy.deepcopy(make()), nn.Linear(5, 3)).double()
    net = copy.deepcopy(plain)
    model = fastdfa.convert(net, RULE)
    x = randn(6, 5)
    assert_close(model(x), plain(x))
    assert bool(model.conversion.folds) is folded
    assert any(isinstance(m, nn.Identity) for m in net.modules()) is folded


def test_fold_false():
    model = check(mlp(), randn(6, 5), before=["2", "4"], fold=False)
    assert model.conversion.folds == {} and type(model[1]) is nn.Tanh


@pytest.mark.filterwarnings("ignore:the output is a Sigmoid")
@pytest.mark.parametrize("output", ["2", "3"])
def test_a_tap_between_a_layer_and_its_activation(output):
    """The error is taken where `output` says, which folding would move or lose."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3), nn.Sigmoid(), nn.Hardtanh())
    model = fastdfa.convert(net.double(), RULE, output=output)
    tapped = []
    net[int(output)].register_forward_hook(lambda module, args, h: tapped.append(h))
    model(randn(6, 5)).sum().backward()
    x = randn(6, 5)
    logits = (x @ net[0].weight.T + net[0].bias).relu() @ net[2].weight.T + net[2].bias
    assert_close(tapped[0], logits if output == "2" else logits.sigmoid())
    assert list(model.conversion.folds) == ["0"]


# Blocks --------------------------------------------------------------------------------------


def nested():
    return nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Tanh())),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)),
        nn.Linear(6, 3),
    )


PATTERNS = {
    "*": ["0", "1", "2"],
    "?.2": ["0.2", "1.2"],
    "0.*.1": ["0.2.1"],
    "[01]": ["0", "1"],
    ("0", "1.0"): ["0", "1.0"],
    nn.Tanh: ["0.1", "0.2.1", "1.1"],
    (nn.Tanh, "1"): ["0.1", "0.2.1", "1", "1.1"],
}


@pytest.mark.parametrize("blocks", PATTERNS, ids=str)
def test_which_blocks_match(blocks):
    selected = list(blocks) if isinstance(blocks, tuple) else blocks
    assert list(fastdfa.convert(nested(), blocks=selected).conversion.blocks) == PATTERNS[blocks]


def test_a_block_within_a_block_is_one_point_where_they_end_together():
    model = check(nested(), randn(6, 5), behind=["0.2", "1"], blocks=["0", "0.2", "1"])
    assert model.feedback_points == ["0.2", "1"]


def test_a_block_called_twice():
    shared = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    net = nn.Sequential(shared, shared, nn.Linear(5, 3))
    model = check(net, randn(6, 5), behind=["0"], blocks="0")
    assert model.feedback_points == ["0", "0#2"]


Pair = namedtuple("Pair", "hidden extra")


@pytest.mark.parametrize("make", [lambda h: (h, 1), lambda h: [h, 1], lambda h: Pair(h, 1)])
def test_a_block_that_returns_several(make):
    """The first tensor is the point; the kind of the container stays."""
    kinds = []
    net = nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), Apply(make)),
        Apply(lambda several: kinds.append(type(several)) or several[0]),
        nn.Linear(8, 3),
    ).double()
    model = fastdfa.convert(net, RULE, blocks="0")
    x, g = randn(6, 5), randn(6, 3)
    step(model, x, g)
    assert kinds == [type(make(x))] and model.feedback_points == ["0"]
    assert_close(net[0][0].weight.grad, (g @ model.feedback_matrix("0")).T @ x)


def test_a_block_that_returns_a_dict_is_refused_in_training_alone():
    net = nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), Apply(lambda h: {"h": h})),
        Apply(lambda d: d["h"]), nn.Linear(8, 3),
    ).double()  # fmt: skip
    model = fastdfa.convert(net, RULE, blocks="0")
    with torch.no_grad():
        model(randn(6, 5))
    with pytest.raises(TypeError, match="blocks: a Sequential must return a tensor"):
        model(randn(6, 5))


def test_hooks_from_before_see_the_output_as_it_was():
    """As those do that wait for its gradient, such as fully_shard's."""
    net = nested().double()
    seen = []

    def watch(module, args, h):
        h.register_hook(seen.append)

    net[0].register_forward_hook(watch)
    model = fastdfa.convert(net, RULE, blocks=["0", "1"])
    g = randn(6, 3)
    step(model, randn(6, 5), g)
    assert_close(seen[0], g @ model.feedback_matrix("0"))


def test_a_backward_hook_that_would_never_fire_is_refused_later_too():
    model = fastdfa.convert(nested().double(), RULE, blocks=["0", "1"])
    model(randn(6, 5))
    with_backward_hook(model[1])
    with pytest.raises(ValueError, match="'Sequential' has backward hooks"):
        model(randn(6, 5))


def test_another_way_round_a_block_is_found():
    """The state of a GRU goes on uncut beside its output."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            h, last = self.gru(x)
            return self.head(h + last[0].unsqueeze(1))

    model = fastdfa.convert(Both().double(), RULE, blocks=nn.GRU)
    with pytest.raises(RuntimeError, match="gru"):
        model(randn(4, 7, 5))


def test_options_of_the_points():
    """One feedback vector for all positions, as FeedbackPoint(features=1) in its place."""
    net = resnet().double()
    by_hand = nn.Sequential(
        *copy.deepcopy(net[:4]), fastdfa.FeedbackPoint(features=1),
        *copy.deepcopy(net[4:5]), fastdfa.FeedbackPoint(features=1), *copy.deepcopy(net[5:]),
    )  # fmt: skip
    point = fastdfa.FeedbackPoint(features=1)
    model = fastdfa.convert(net, RULE, blocks=["3", "4"], point=point)
    other = fastdfa.DFA(by_hand, RULE)
    g = randn(4, 3)
    step(model, IMAGES, g)
    step(other, IMAGES, g)
    assert model.feedback_matrix("3").shape == (3, 4)
    assert_close(
        dict(enumerate(gradients(model).values())), dict(enumerate(gradients(other).values()))
    )


def test_a_tapped_block_is_not_cut():
    """What the error is taken at, and what follows, train by their true gradient."""
    plain = nested().double()
    model = fastdfa.convert(copy.deepcopy(plain), RULE, output="1", blocks=["0", "1"])
    x, g = randn(6, 5), randn(6, 3)
    step(model, x, g)
    assert model.feedback_points == ["0"]
    h = plain[0](x)
    (plain[2](plain[1](h.detach())) * g).sum().backward()
    e = g @ plain[2].weight.detach()
    h.backward(e @ model.feedback_matrix("0"))
    assert_close(gradients(model), gradients(plain))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_evaluation_of_a_converted_encoder():
    """Hooks keep torch's encoder from its fused inference; the numbers are the same, with padding
    (nested tensors) too."""
    plain = Transformer().double().eval()
    model = fastdfa.convert(copy.deepcopy(plain), blocks=nn.TransformerEncoderLayer)
    padding = torch.arange(4) >= torch.tensor([[4], [2], [3]])
    with torch.no_grad():
        assert_close(model(TOKENS), plain(TOKENS))
        seen = model(TOKENS, src_key_padding_mask=padding)
        expected = plain(TOKENS, src_key_padding_mask=padding)
    assert_close(seen[~padding], expected[~padding])


# Around it -----------------------------------------------------------------------------------

MODELS = {
    "mlp": (mlp, randn(6, 5), {}),
    "cnn": (cnn, IMAGES, {}),
    "resnet": (resnet, IMAGES, {"blocks": ResidualBlock}),
    "transformer": (Transformer, TOKENS, {"blocks": ["embedding", "encoder.layers.*"]}),
}


def converted(name):
    make, x, options = MODELS[name]
    return fastdfa.convert(make().double(), RULE, **options), x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(name, copied):
    model, x = converted(name)
    twin = copied(model)
    g = randn(*model(x).shape)
    step(model, x, g)
    twin(x)  # moves the statistics of batch norms as well
    step(twin, x, g)
    assert_close(gradients(twin), gradients(model))
    assert repr(twin.conversion) == repr(model.conversion)
    twin.conversion.undo()
    assert type(twin) is MODELS[name][0] or type(twin) is nn.Sequential
    assert not any(isinstance(m, (fastdfa.Linear, fastdfa.Conv2d)) for m in twin.modules())
    assert model(x).grad_fn is not None and model.feedback_points


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_compiled(name):
    torch._dynamo.reset()
    model, x = converted(name)
    g = randn(*model(x).shape)
    step(model, x, g)
    expected = gradients(model)
    model.zero_grad()
    step(torch.compile(model, fullgraph=True, backend="aot_eager"), x, g)
    assert_close(gradients(model), expected)
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("inside", [True, False])
def test_activation_checkpointing_of_blocks(inside):
    """Whether the cut is made inside the checkpoint, or behind it."""
    net = nested().double()
    plain = copy.deepcopy(net)
    for k in (0, 1):
        net[k] = Checkpointed(net[k])
    blocks = ["0.inner", "1.inner"] if inside else ["0", "1"]
    model = fastdfa.convert(net, RULE, blocks=blocks)
    x, g = randn(6, 5), randn(6, 3)
    step(model, x, g)
    expected = by_definition(plain, model, x, g, behind=["0", "1"])
    found = {name.replace("inner.", ""): grad for name, grad in gradients(model).items()}
    assert_close(found, expected)


# Telling and undoing -------------------------------------------------------------------------


def test_it_tells_what_it_changed():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Adapter(8, 8), nn.Linear(8, 3))
    lines = str(fastdfa.convert(net).conversion).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "0 Linear cut at its input, applies Tanh '1'",
        "2 Adapter cut at its input",
        "3 Linear cut at its input",
    ]
    text = str(fastdfa.convert(resnet(), blocks=["2", ResidualBlock]).conversion)
    assert "2  ReLU" in text and "5  ResidualBlock  feedback behind it" in text


@pytest.mark.parametrize("name", MODELS)
def test_undo(name):
    make, x, options = MODELS[name]
    net = make().double()
    before, before_keys, modules = repr(net), net.state_dict().keys(), list(net.modules())
    model = fastdfa.convert(net, RULE, **options)
    conversion = model.conversion
    assert (
        conversion.undo() is net
        and type(net) is type(make())
        and model.state_dict().keys() == before_keys
    )
    assert repr(net) == before and all(map(lambda a, b: a is b, net.modules(), modules))
    plain = make().double()
    plain.load_state_dict(net.state_dict())
    plain(x).sum().backward()
    net(x).sum().backward()
    assert_close(gradients(net), gradients(plain))
    with pytest.raises(RuntimeError, match="no longer as convert made it"):
        conversion.undo()


# Tied parameters -----------------------------------------------------------------------------


def test_tied_weights_across_a_cut_are_refused():
    with pytest.raises(ValueError, match="'embedding' and 'head' share a parameter"):
        fastdfa.convert(Transformer(tied=True), blocks=nn.TransformerEncoderLayer)
    a, b = nn.Linear(5, 5), nn.Linear(5, 5)
    b.weight = a.weight
    with pytest.raises(ValueError, match="'0' and '2' share a parameter"):
        fastdfa.convert(nn.Sequential(a, nn.Tanh(), b, nn.Linear(5, 3)))


def test_accepted_tied_weights_get_the_sum():
    names = ["embedding", "encoder.layers.0", "encoder.layers.1"]
    options = {"blocks": ["embedding", "encoder.layers.*"], "allow_tied": True}
    model = check(Transformer(tied=True), TOKENS, behind=names, **options)
    assert "head.weight" not in gradients(model)  # one parameter, of the embedding's name


def nested_tied():
    net = nested()
    net[0][2][0].bias = net[0][0].bias
    return net


def test_weights_tied_where_no_cut_is_between():
    fastdfa.convert(nested_tied(), blocks=["0", "1"])
    fastdfa.convert(nested_tied().requires_grad_(False))
    with pytest.raises(ValueError, match=r"'0\.0' and '0\.2\.0' share"):
        fastdfa.convert(nested_tied(), blocks=["0", "0.1"])


# Refusals ------------------------------------------------------------------------------------

REFUSED = {
    "no module": (lambda: None, {}, TypeError, "model must be an nn.Module, got NoneType"),
    "a DFA": (lambda: fastdfa.DFA(mlp()), {}, ValueError, "no DFA, got one itself"),
    "a DFA inside": (
        lambda: nn.Sequential(fastdfa.DFA(mlp()), nn.Linear(3, 3)), {}, ValueError, "one at '0'",
    ),
    "wrapped": (lambda: nn.DataParallel(mlp()), {}, ValueError, "convert first"),
    "nothing": (lambda: nn.Sequential(nn.LSTM(5, 8)), {}, ValueError, "nothing to convert"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), {}, ValueError, "run the model once"),
    "transformer": (Transformer, {}, ValueError, "blocks=nn.TransformerEncoderLayer"),
    "no match": (mlp, {"blocks": "a.*"}, ValueError, r"'a\.\*' matches no module, of 0, 1, 2"),
    "no such class": (mlp, {"blocks": [nn.Linear, nn.GRU]}, ValueError, "GRU'> matches no module"),
    "no blocks": (mlp, {"blocks": []}, ValueError, "at least one block"),
    "a number": (mlp, {"blocks": 3}, TypeError, "got 3"),
    "another class": (mlp, {"blocks": [int]}, TypeError, "got <class 'int'>"),
    "never called": (
        Transformer, {"blocks": ["encoder.layers", "head"]}, ValueError, "'encoder.layers.*'",
    ),
    "out_proj": (
        Transformer, {"blocks": "encoder.layers.0.self_attn.out_proj"}, ValueError, "never called",
    ),
    "backward hooks": (
        lambda: nn.Sequential(with_backward_hook(mlp()), nn.Linear(3, 3)), {"blocks": "0"},
        ValueError, "'0' has backward hooks",
    ),
    "point alone": (mlp, {"point": fastdfa.FeedbackPoint()}, ValueError, "needs blocks"),
    "no point": (mlp, {"blocks": "0", "point": 2}, TypeError, "must be a FeedbackPoint, got int"),
    "preset": (mlp, {"feedback": "launay"}, ValueError, "feedback must be one of"),
    "tap": (mlp, {"output": "9"}, ValueError, "output must be one of"),
    "tied": (nested_tied, {}, ValueError, "share a parameter"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case):
    make, options, error, text = REFUSED[case]
    net = make()
    before = state_of(net)
    with pytest.raises(error, match=text):
        fastdfa.convert(net, **options)
    assert state_of(net) == before


def state_of(net):
    modules = list(net.modules()) if net is not None else []
    return [(id(m), type(m), dict(m._modules), dict(m._forward_hooks)) for m in modules]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_module_is_a_block_once_it_is_in_an_ordinary_one():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 8), nn.Tanh()))
    net = nn.Sequential(nn.Sequential(scripted), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="cannot see into a scripted module"):
        fastdfa.convert(net)
    with pytest.raises(ValueError, match=r"'0\.0', scripted, takes no hook"):
        fastdfa.convert(net, blocks=["1", "0.0"])
    assert not net[1]._forward_hooks
    model = fastdfa.convert(net, RULE, blocks="0")
    x, g = randn(6, 5, dtype=torch.float32), randn(6, 3, dtype=torch.float32)
    step(model, x, g)
    h = torch.tanh(x @ scripted[0].weight.T + scripted[0].bias)
    delta = (g @ model.feedback_matrix("0")) * (1 - h * h)
    assert_close(scripted[0].weight.grad, delta.T @ x, 1e-5)


# Bottlenecks -----------------------------------------------------------------------------------


def stack(*widths):
    layers = [[nn.Linear(n, m), nn.Tanh()] for n, m in pairwise(widths)]
    return nn.Sequential(*[layer for pair in layers for layer in pair][:-1])


def test_a_bottleneck_is_warned_of():
    """A layer narrower than the error (of 10 classes 9 dimensions) and than what is before it."""
    with pytest.warns(UserWarning, match="'2' has 8 units between 32 and an error of 10") as caught:
        fastdfa.convert(stack(20, 32, 8, 32, 10), RULE)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match="'0.2' has 4 units between 32 and an error of 6"):
        model = nn.ModuleDict({"0": stack(20, 32, 4, 6), "1": nn.Linear(6, 2)})
        fastdfa.convert(model, RULE, output="0")


NO_BOTTLENECKS = {
    "as wide as the error": lambda: stack(20, 32, 9, 32, 10),
    "nothing wider before it": lambda: stack(6, 8, 8, 32, 10),
    "the head": lambda: stack(20, 32, 32, 4),
    "beside other layers": lambda: nn.ModuleList(
        [nn.Linear(20, 32), nn.Linear(20, 4), nn.Linear(32, 10)]
    ),
    "a gate of channels": lambda: nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Linear(64, 4), nn.Linear(4, 64), nn.Linear(64, 10)
    ),
}


@pytest.mark.parametrize("case", NO_BOTTLENECKS)
def test_no_bottleneck(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdfa.convert(NO_BOTTLENECKS[case](), RULE)
