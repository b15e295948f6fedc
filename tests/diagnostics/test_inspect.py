"""`fastdfa.inspect` tells from what every parameter learns: here that is written down by hand."""

import dataclasses
import io
import linecache
import warnings
from collections import OrderedDict

import pytest
import torch
from helpers.networks import RULE, Apply, fresh, mlp, randn
from torch import nn

import fastdfa
from fastdfa.engine.nodes import SegmentNode

FEEDBACK, TRUE, NOTHING = "feedback", "true gradient", "nothing"


def linear(n, m, activation="tanh", **options):
    return fastdfa.Linear(n, m, activation=activation, **options)


def dfa(*blocks, **options):
    return fastdfa.DFA(nn.Sequential(*blocks).double(), feedback=RULE, **options)


def found(model, *args, **kwargs):
    """{name of a module or parameter: the points that feed it, as a list}; nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return summary(fastdfa.inspect(model, *args, **kwargs))


def warned(model, *args, match, **kwargs):
    with pytest.warns(UserWarning, match=match) as caught:
        report = fastdfa.inspect(model, *args, **kwargs)
    assert len(caught) == 1, [str(warning.message) for warning in caught]
    assert "inspect(model" in linecache.getline(caught[0].filename, caught[0].lineno)
    return summary(report)


def summary(report):
    """Of a module's parameters those that differ from its first go by their own names."""
    entries = {}
    for row in report.rows:
        entry = [*row.points, TRUE] if row.true_gradient else list(row.points) or NOTHING
        owner = row.name.rpartition(".")[0]
        entries[owner if entries.get(owner, entry) == entry else row.name] = entry
    return entries


# What is fed, and by what ---------------------------------------------------------------------


def test_an_mlp():
    report = fastdfa.inspect(mlp([5, 8, 7, 3]), randn(6, 5))
    assert [tuple(row) for row in report.rows] == [
        ("0.weight", (8, 5), ("1",), False, False, False),
        ("0.bias", (8,), ("1",), False, False, False),
        ("1.weight", (7, 8), ("2",), False, False, False),
        ("1.bias", (7,), ("2",), False, False, False),
        ("2.weight", (3, 7), (), True, False, False),
        ("2.bias", (3,), (), True, False, False),
    ]
    assert [row.source for row in report.rows] == [FEEDBACK] * 4 + [TRUE] * 2
    assert report["1.bias"] is report.rows[3]
    with pytest.raises(KeyError, match=r"3\.weight"):
        report["3.weight"]


class Block(nn.Module):
    """h + f(h), trained inside by local backprop."""

    def __init__(self, n):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(n), nn.Linear(n, n)
        self.point = fastdfa.FeedbackPoint()

    def forward(self, h):
        return self.point(h + torch.tanh(self.inner(self.norm(h))))


class Cell(nn.Module):
    """A recurrent cell, called three times, and a head."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = linear(9, 4), linear(4, 3, None)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for _ in range(3):
            h = self.cell(torch.cat((x, h), -1))
        return self.head(h)


class Attention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.q, self.k, self.v = (linear(n, n, None) for _ in range(3))

    def forward(self, h):
        return torch.softmax(self.q(h) @ self.k(h).mT, -1) @ self.v(h)


def test_layers_on_the_general_path():
    model = dfa(
        nn.Sequential(linear(5, 8, None), nn.BatchNorm1d(8), nn.ReLU(inplace=True)),
        linear(8, 6, nn.Softsign()),
        nn.Sequential(linear(6, 8, None), nn.Dropout(0.5), nn.LayerNorm(8)),
        linear(8, 3, None),
    )
    assert found(model, randn(6, 5)) == {
        "0.0": ["1"],
        "0.1": ["1"],
        "1": ["2.0"],
        "2.0": ["3"],
        "2.2": ["3"],
        "3": [TRUE],
    }


def test_blocks():
    model = dfa(nn.Linear(5, 8), fastdfa.FeedbackPoint(), Block(8), Block(8), nn.Linear(8, 3))
    assert found(model, randn(6, 5)) == {
        "0": ["1"],
        "2.norm": ["2.point"],
        "2.inner": ["2.point"],
        "3.norm": ["3.point"],
        "3.inner": ["3.point"],
        "4": [TRUE],
    }


def test_layers_that_read_one_tensor_make_one_point():
    model = dfa(linear(5, 8), Attention(8), linear(8, 3, None))
    q, k, v = "1.q", "1.k", "1.v"
    assert found(model, randn(6, 5)) == {"0": [q], q: ["2"], k: ["2"], v: ["2"], "2": [TRUE]}


def test_a_layer_called_several_times_is_fed_at_each_call():
    model = fastdfa.DFA(Cell().double(), feedback=RULE, allow_bypass=True)
    # The inputs of its second and third call, torch.cat((x, h)), and that of the head.
    assert found(model, randn(6, 5)) == {"cell": ["cell", "cell#2", "head"], "head": [TRUE]}


def test_one_layer_fused_twice_is_fed_twice():
    layer = linear(8, 8)
    model = dfa(linear(5, 8), layer, layer, linear(8, 3, None))
    assert found(model, randn(6, 5)) == {"0": ["1"], "1": ["1#2", "3"], "3": [TRUE]}


def test_convolutions():
    model = dfa(
        fastdfa.Conv2d(2, 4, 3, activation="relu"),
        fastdfa.Conv2d(4, 4, 3, activation="tanh"),
        nn.Sequential(nn.MaxPool2d(2), nn.Flatten()),
        linear(4, 3, None),
    )
    assert found(model, randn(5, 2, 7, 7)) == {"0": ["1"], "1": ["3"], "3": [TRUE]}


def test_a_layer_that_could_be_fused_and_is_not():
    """Its rows are not those of the error, so that the feedback goes to its output."""
    model = dfa(linear(5, 8), linear(8, 4), nn.Flatten(), linear(8, 3, None))
    assert found(model, randn(6, 2, 5)) == {"0": ["1"], "1": ["3"], "3": [TRUE]}


def test_embeddings_and_sparse_gradients():
    model = dfa(nn.Embedding(11, 8, sparse=True), Block(8), linear(8, 3, None))
    assert found(model, torch.arange(12).view(3, 4) % 5) == {
        "0": ["1.point"],
        "1.norm": ["1.point"],
        "1.inner": ["1.point"],
        "2": [TRUE],
    }


def test_points_fed_as_a_mean_over_positions_or_flattened():
    model = dfa(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), fastdfa.FeedbackPoint(features=1)),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), fastdfa.FeedbackPoint()),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    assert found(model, randn(5, 2, 7, 7)) == {"0.0": ["0.2"], "1.0": ["1.2"], "3": [TRUE]}


def test_parametrized_and_tied_weights():
    model = dfa(linear(5, 8), nn.utils.parametrizations.weight_norm(linear(8, 8)), linear(8, 3))
    assert found(model, randn(6, 5)) == {
        "0": ["1"],
        "1": ["2"],
        "1.parametrizations.weight": ["2"],
        "2": [TRUE],
    }
    first, last = linear(8, 8), linear(8, 8, None)
    last.weight = first.weight
    tied = dfa(first, last)
    assert found(tied, randn(6, 8)) == {"0": ["1", TRUE], "0.bias": ["1"], "1": [TRUE]}


def test_frozen_parameters():
    model = mlp([5, 8, 7, 3])
    model.module[0].requires_grad_(False)
    model.module[1].bias.requires_grad_(False)
    report = fastdfa.inspect(model, randn(6, 5))
    assert [row.frozen for row in report.rows] == [True, True, False, True, False, False]
    assert [row.source for row in report.rows] == [NOTHING] * 2 + [FEEDBACK, NOTHING] + [TRUE] * 2
    assert str(report["1.bias"]) == "nothing (frozen)"
    model.requires_grad_(False)
    for x in randn(6, 5), randn(6, 5).requires_grad_():
        assert found(model, x) == {"0": NOTHING, "1": NOTHING, "2": NOTHING}
        assert x.grad is None


# What is wrong --------------------------------------------------------------------------------


def published(description, key):
    """As `build_dfa_from_bp` of the code of arXiv 1906.04554: a cut before every layer with weights
    but the first, kept under a key made from the layer's name."""
    modules = OrderedDict()
    for name, layer in description.items():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and modules:
            modules[key(name)] = fastdfa.FeedbackPoint()
        modules[name] = layer
    return fastdfa.DFA(nn.Sequential(modules).double(), feedback=RULE)


def cnn():
    return OrderedDict(
        conv1=nn.Conv2d(2, 4, 3),
        act1=nn.ReLU(),
        conv2=nn.Conv2d(4, 4, 3),
        act2=nn.Sequential(nn.ReLU(), nn.Flatten()),
        lin1=nn.Linear(36, 8),
        act3=nn.ReLU(),
        lin2=nn.Linear(8, 3),
    )


def test_the_published_missing_cut():
    """There the key is the last digit of the name, so that "lin2" finds its key taken by "conv2":
    there is no cut before it, and "lin1" learns by backprop."""
    x = randn(5, 2, 7, 7)
    model = published(cnn(), lambda name: f"ef{int(name[-1]) - 1}")
    assert warned(model, x, match="'lin1', 'lin2'") == {
        "conv1": ["ef1"],
        "conv2": ["ef0"],
        "lin1": [TRUE],
        "lin2": [TRUE],
    }
    model = published(cnn(), lambda name: f"before {name}")
    assert found(model, x) == {
        "conv1": ["before conv2"],
        "conv2": ["before lin1"],
        "lin1": ["before lin2"],
        "lin2": [TRUE],
    }


class LastCallFed(nn.Module):
    """As TinyDFA's `FeedbackPointsHandling.LAST`: a cut that is used at several places, of which
    only the last one is fed."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.call, self.point = calls, 0, fastdfa.FeedbackPoint()

    def forward(self, h):
        self.call += 1
        return self.point(h) if self.call % self.calls == 0 else h.detach()


def test_the_published_cut_that_nothing_feeds():
    cut = LastCallFed(2)
    layers = [nn.Linear(5, 8), nn.Tanh(), cut, nn.Linear(8, 8), nn.Tanh(), cut, nn.Linear(8, 3)]
    assert warned(dfa(*layers), randn(6, 5), match=r"nothing: '0\.weight', '0\.bias'\.") == {
        "0": NOTHING,
        "3": ["2.point"],
        "6": [TRUE],
    }
    point = fastdfa.FeedbackPoint()
    layers = [point if layer is cut else layer for layer in layers]
    assert found(dfa(*layers), randn(6, 5)) == {"0": ["2"], "3": ["2#2"], "6": [TRUE]}


def test_a_replaced_layer():
    model = mlp([5, 8, 8, 3])
    found(model, randn(6, 5))
    model.module[1] = nn.Sequential(nn.Linear(8, 8).double(), nn.Tanh())
    assert found(model, randn(6, 5)) == {"0": ["2"], "1.0": ["2"], "2": [TRUE]}
    model.module[2] = nn.Linear(8, 3).double()
    assert warned(model, randn(6, 5), match=r"'0', '1\.0', '2'") == {
        "0": [TRUE],
        "1.0": [TRUE],
        "2": [TRUE],
    }


def test_what_is_unused():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.spare, self.head = linear(5, 8), linear(8, 8), linear(8, 3, None)

        def forward(self, x):
            h = self.first(x)
            self.spare(h)
            return self.head(h)

    model = fastdfa.DFA(Spare().double(), feedback=RULE)
    expected = {"first": ["spare"], "spare": NOTHING, "head": [TRUE]}
    assert warned(model, randn(6, 5), match=r"nothing: 'spare\.weight', 'spare\.bias'") == expected


def test_an_output_that_the_model_detaches():
    """The root puts the feedback behind it all the same, where there is a point."""
    detach = Apply(torch.Tensor.detach)
    model = dfa(linear(5, 8), linear(8, 3), detach)
    assert warned(model, randn(6, 5), match=r"'1\.weight'") == {"0": ["1"], "1": NOTHING}
    assert warned(dfa(linear(5, 3), detach), randn(6, 5), match=r"'0\.weight'") == {"0": NOTHING}


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        n = base.out_features
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(n, 2, bias=False), nn.Linear(2, n, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, h):
        return self.base(h) + self.up(self.down(h))


def test_adapters_inside_blocks():
    """A new adapter's gradient is zero before its second matrix, which learns first."""
    blocks = [Block(8), Block(8)]
    for block in blocks:
        block.inner = LoRA(block.inner)
    model = dfa(nn.Linear(5, 8), fastdfa.FeedbackPoint(), *blocks, nn.Linear(8, 3))
    report = fastdfa.inspect(model, randn(6, 5))
    for name, source, zero, frozen in [
        ("2.inner.base.weight", NOTHING, False, True),
        ("2.inner.down.weight", FEEDBACK, True, False),
        ("2.inner.up.weight", FEEDBACK, False, False),
    ]:
        row = report[name]
        assert (row.source, row.zero, row.frozen) == (source, zero, frozen), name
    assert str(report["2.inner.down.weight"]) == "feedback at 2.point (zero for this input)"


def test_adapters_beside_a_cut():
    """The adapter carries later feedback round the cut of its base, if that is accepted."""
    blocks = [linear(5, 8), LoRA(linear(8, 8)), LoRA(linear(8, 8)), linear(8, 3, None)]
    with pytest.raises(RuntimeError, match="allow_bypass"):
        fastdfa.inspect(dfa(*blocks), randn(6, 5))
    points = ["1.base", "2.base", "3"]
    assert found(dfa(*blocks, allow_bypass=True), randn(6, 5)) == {
        "0": points,
        "1.base": NOTHING,
        "1.down": points[1:],
        "1.up": points[1:],
        "2.base": NOTHING,
        "2.down": points[2:],
        "2.up": points[2:],
        "3": [TRUE],
    }


def test_skips_that_are_accepted():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = linear(5, 8), linear(8, 8), linear(8, 3, None)
            self.side = nn.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(self.second(h)) + self.side(h)

    model = fastdfa.DFA(Skip().double(), feedback=RULE, allow_bypass=True)
    with pytest.warns(UserWarning, match="trains 'head', 'side':"):
        report = fastdfa.inspect(model, randn(6, 5))
    assert summary(report) == {
        "first": ["second", TRUE],
        "second": ["head"],
        "head": [TRUE],
        "side": [TRUE],
    }
    assert report["first.bias"].source == "feedback and true gradient"
    assert str(report["first.bias"]) == "feedback at second and true gradient"


def test_a_layer_of_dead_units():
    """It is connected, and what arrives is zero."""
    model = dfa(linear(5, 8, "relu"), linear(8, 3, None))
    dead = dfa(nn.Linear(5, 8), nn.ReLU(), linear(8, 3, None))
    for layer in model.module[0], dead.module[0]:
        nn.init.constant_(layer.bias, -100)
    row = fastdfa.inspect(model, randn(6, 5))["0.weight"]
    assert (row.source, row.zero) == (FEEDBACK, True)
    assert warned(dead, randn(6, 5), match=r"nothing: '0\.weight'") == {"0": NOTHING, "2": [TRUE]}


def test_what_the_backward_node_leaves_out_is_found(monkeypatch):
    """It is the backward pass of training that runs, fused layers included."""
    backward = SegmentNode.backward

    def without_bias(ctx, *grads):
        *gradients, _ = backward(ctx, *grads)
        return *gradients, None

    monkeypatch.setattr(SegmentNode, "backward", without_bias)
    model = mlp([5, 8, 7, 3])
    assert warned(model, randn(6, 5), match=r"nothing: '0\.bias', '1\.bias'\.") == {
        "0": ["1"],
        "0.bias": NOTHING,
        "1": ["2"],
        "1.bias": NOTHING,
        "2": [TRUE],
    }


# The tap, and models around the root ------------------------------------------------------------


class Language(nn.Module):
    """Returns its loss, if it is given targets, and what else one may look at."""

    def __init__(self, wrap=dict):
        super().__init__()
        self.embed, self.block = nn.Embedding(11, 8), Block(8)
        self.norm, self.head, self.wrap = linear(8, 6), nn.Linear(6, 11), wrap

    def forward(self, tokens, targets=None):
        first = self.embed(tokens)
        hidden = self.norm(self.block(first))
        logits, loss = self.head(hidden), None
        if targets is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        return self.wrap(loss=loss, logits=logits, hidden=hidden, first=first)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor
    hidden: torch.Tensor
    first: torch.Tensor


TOKENS = torch.arange(12).view(3, 4) % 11
BEFORE_THE_HEAD = {
    "embed": ["block.point"],
    "block.norm": ["block.point"],
    "block.inner": ["block.point"],
    "norm": [TRUE],
    "head": [TRUE],
}


@pytest.mark.parametrize("wrap", [dict, Output])
def test_a_loss_computed_inside(wrap):
    model = fastdfa.DFA(Language(wrap).double(), feedback=RULE, output="head")
    assert warned(model, TOKENS, targets=TOKENS, match="'norm', 'head'") == BEFORE_THE_HEAD


@pytest.mark.parametrize("wrap", [dict, Output])
def test_an_error_taken_before_the_head(wrap):
    """What is behind the tap trains by its true gradient, of which nothing is to be said."""
    model = fastdfa.DFA(Language(wrap).double(), feedback=RULE, output="norm")
    assert found(model, TOKENS, targets=TOKENS) == BEFORE_THE_HEAD
    # Without a loss the backward pass begins at all tensors, or at those that are named.
    assert found(model, TOKENS) == BEFORE_THE_HEAD | {"embed": ["block.point", TRUE]}

    def hidden(output):
        return output["hidden"] if wrap is dict else output.hidden

    expected = BEFORE_THE_HEAD | {"head": NOTHING}
    assert warned(model, TOKENS, loss=hidden, match=r"nothing: 'head\.weight'") == expected


def test_several_roots_in_a_model():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(5, 6).double()
            self.actor, self.critic = mlp([6, 8, 3]), mlp([6, 7, 1])
            self.behind = nn.Linear(3, 2).double()

        def forward(self, x):
            h = self.stem(x)
            return self.behind(self.actor(h)), self.critic(h)

    assert found(Pair(), randn(6, 5)) == {
        "stem": ["actor.1", "critic.1"],
        "actor.module.0": ["actor.1"],
        "actor.module.1": [TRUE],
        "critic.module.0": ["critic.1"],
        "critic.module.1": [TRUE],
        "behind": [TRUE],
    }


def test_inside_backprop_all_is_true_gradient():
    model = mlp([5, 8, 3])
    with fastdfa.backprop(model):
        assert found(model, randn(6, 5)) == {"0": [TRUE], "1": [TRUE]}


# What stays -----------------------------------------------------------------------------------


def test_the_model_stays_as_it_was():
    model = dfa(
        nn.Sequential(linear(5, 8, None), nn.BatchNorm1d(8), nn.Dropout(0.5)),
        nn.utils.parametrizations.spectral_norm(linear(8, 6)),
        linear(6, 3, None),
    )
    model.module[1].register_buffer("steps", torch.zeros(()))

    def count(module, args):
        module.steps = module.steps + 1  # replaced, not written to

    model.module[1].register_forward_pre_hook(count)
    model.module[2].bias.requires_grad_(False)
    model.module[0][1].eval()
    x = randn(6, 5)
    model(x).sum().backward()

    def everything():
        tensors = {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
        tensors |= {f"parameter {n}": p.clone() for n, p in model.named_parameters()}
        tensors |= {f"gradient {n}": p.grad for n, p in model.named_parameters()}
        tensors["random state"] = torch.get_rng_state()
        flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
        hooks = [len(m._forward_hooks) for m in model.modules()]
        return tensors, [id(b) for b in model.buffers()], flags, hooks, sorted(vars(model))

    before = everything()
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    fastdfa.inspect(model, x)
    after = everything()
    assert after[1:] == before[1:]
    for name, tensor in before[0].items():
        assert after[0][name] is tensor or torch.equal(after[0][name], tensor), name
    for name, p in model.named_parameters():
        assert p.grad is gradients[name] or torch.equal(p.grad, gradients[name]), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_disabled_around_it(mode):
    model, x = mlp([5, 8, 3]), randn(6, 5)
    with mode():
        assert found(model, x) == {"0": ["1"], "1": [TRUE]}


def test_training_goes_on_as_without():
    model, other = mlp([5, 8, 7, 3]), mlp([5, 8, 7, 3])
    other.load_state_dict(model.state_dict())
    fastdfa.inspect(model, randn(6, 5))
    expected = fresh(other)
    for name, gradient in fresh(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_an_exception_leaves_no_trace():
    model = mlp([5, 8, 3])
    before = sorted(vars(model))
    with pytest.raises(RuntimeError):
        fastdfa.inspect(model, randn(6, 4))
    assert sorted(vars(model)) == before
    assert found(model, randn(6, 5)) == {"0": ["1"], "1": [TRUE]}


# PyTorch around it ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(dtype, autocast):
    """Also with the errors of all rows summed: feedback that would overflow if each were 1."""
    model = fastdfa.DFA(
        nn.Sequential(linear(5, 16), linear(16, 8), linear(8, 3, None)), feedback="launay2019"
    )
    model = model if autocast else model.to(dtype)
    x = randn(4096, 5, dtype=torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        assert found(model, x) == {"0": ["1"], "1": ["2"], "2": [TRUE]}


def test_compiled_models_run_eagerly():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = mlp([5, 8, 7, 3])
    expected = {"0": ["1"], "1": ["2"], "2": [TRUE]}
    assert found(torch.compile(model, backend=backend), randn(6, 5)) == expected
    model.module[1].compile(backend=backend)
    assert found(model, randn(6, 5)) == expected
    assert not compiled
    model(randn(6, 5))
    assert compiled


def test_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, h):
            return torch.utils.checkpoint.checkpoint(self.block, h, use_reentrant=False)

    blocks = [Checkpointed(nn.Sequential(linear(8, 8), linear(8, 8))) for _ in range(2)]
    model = dfa(linear(5, 8), *blocks, linear(8, 3, None))
    assert found(model, randn(6, 5)) == {
        "0": ["1.block.0"],
        "1.block.0": ["1.block.1"],
        "1.block.1": ["2.block.0"],
        "2.block.0": ["2.block.1"],
        "2.block.1": ["3"],
        "3": [TRUE],
    }


def test_hooks_of_the_user_and_anomaly_mode():
    model = mlp([5, 8, 7, 3])
    model.module[0].register_forward_hook(lambda module, args, output: output + 0)
    model.module[1].register_full_backward_hook(lambda module, inputs, outputs: None)
    expected = {"0": ["1"], "1": ["2"], "2": [TRUE]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with torch.autograd.set_detect_anomaly(True):
            assert found(model, randn(6, 5)) == expected


@pytest.fixture
def process_group():
    """One process, which needs no network."""
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group, monkeypatch):
    """One process may ask: the others are not waited for."""
    model = nn.parallel.DistributedDataParallel(mlp([5, 8, 3]))
    monkeypatch.setattr(model, "forward", lambda x: pytest.fail("it would wait for all"))
    assert found(model, randn(6, 5)) == {"0": ["1"], "1": [TRUE]}


def test_sharded_models_are_refused(process_group):
    from torch.distributed.fsdp import fully_shard

    model = mlp([5, 8, 3])
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(ValueError, match=r"sharded.*module\.0\.weight"):
        fastdfa.inspect(fully_shard(model, mesh=mesh), randn(6, 5))


# Errors, and what is printed ------------------------------------------------------------------


def test_a_model_without_a_root_is_refused():
    with pytest.raises(ValueError, match=r"model must hold a fastdfa\.DFA, got Sequential"):
        fastdfa.inspect(nn.Sequential(linear(5, 3)), randn(6, 5))


def test_gradients_that_are_not_finite_are_refused():
    x = randn(6, 5)
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        fastdfa.inspect(mlp([5, 8, 3]), x)


def test_a_table():
    model = mlp([5, 10, 3])
    model.module[1].bias.requires_grad_(False)
    report = fastdfa.inspect(model, randn(6, 5))
    assert str(report).splitlines() == [
        "parameter  shape    trained by",
        "0.weight   [10, 5]  feedback at 1",
        "0.bias     [10]     feedback at 1",
        "1.weight   [3, 10]  true gradient",
        "1.bias     [3]      nothing (frozen)",
    ]


def test_a_table_by_rich():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=80)
    console.print(fastdfa.inspect(mlp([5, 10, 3]), randn(6, 5)))
    text = console.file.getvalue()
    for expected in ("trained by", "0.weight", "[10, 5]", "feedback at 1", "true gradient"):
        assert expected in text
