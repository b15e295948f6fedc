"""Streaming in one pass, where the signal is known ahead of it: the update of an ordinary step."""

import copy
import gc
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers.errors import refused
from helpers.kinds import FASTDFA, KINDS, Transformer, build, data
from helpers.networks import Apply, assert_close, mlp, randn
from helpers.streaming import (
    OPTIMIZERS,
    Branches,
    Counting,
    LanguageModel,
    Noisy,
    Skips,
    deep,
    ordinary,
    peak,
    same_steps,
    sgd,
    values,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastdfa
from fastdfa import signals

RULE = fastdfa.Feedback(seed=1, signal=signals.Target(raw=True))
X, G = randn(6, 5), randn(6, 3)
Y = torch.tensor([0, 2, 1, 1, 0, 2])


def count_calls(model, calls):
    """Counts what runs: whenever a layer's forward does, `calls` of its name grows by one."""
    for name, layer in model.module.named_modules():
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: calls.update({name: calls.get(name, 0) + 1})
        )


def loss_of(inputs, g, target):
    """Of a loss whose error is g, for the DFA that a model is or holds."""

    def loss(model):
        roots = [m for m in model.modules() if isinstance(m, fastdfa.DFA)]
        roots[0].target = target
        return (model(*inputs).to(g.dtype) * g).sum()

    return loss


def classification(kind):
    inputs, g = data(kind)
    return loss_of(inputs, g, torch.arange(g[..., 0].numel()).reshape(g.shape[:-1]) % 3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_an_ordinary_step(kind, optimizer, workspace):
    model = build(kind, feedback=RULE)
    step = same_steps(model, classification(kind), OPTIMIZERS[optimizer])
    moved = build(kind)
    for name, p in moved.named_parameters():
        assert not torch.equal(p, dict(model.named_parameters())[name]), f"{name} stayed"
    calls, closure = {}, classification(kind)
    count_calls(model, calls)
    closure(model)
    once = dict(calls)  # a layer that is called three times in a pass is in this one, too
    calls.clear()
    step(lambda: closure(model))
    assert calls == once


def test_by_the_formula(workspace):
    """Every layer but the last receives -t B_l / M, by hand; the last its true gradient."""
    model = mlp([5, 8, 7, 3], feedback=RULE)
    step = fastdfa.StreamingStep(model, torch.optim.SGD(model.parameters(), 0.1))
    for _ in range(3):
        before = [(m.weight.detach().clone(), m.bias.detach().clone()) for m in model.module]
        model.target = Y
        step(lambda: (model(X) * G).sum())
        h, inputs, gates = X, [], []
        for weight, bias in before:
            inputs.append(h)
            h = torch.tanh(h @ weight.T + bias)
            gates.append(1 - h**2)
        sent = -F.one_hot(Y, 3).double() / 6
        deltas = [sent @ model.feedback_matrix(name) * gates[k] for k, name in enumerate("12")]
        for layer, (weight, bias), delta, x in zip(
            model.module, before, [*deltas, G], inputs, strict=True
        ):
            assert_close(layer.weight.detach(), weight - 0.1 * delta.T @ x)
            assert_close(layer.bias.detach(), bias - 0.1 * delta.sum(0))


@dataclass(frozen=True)
class Smooth(signals.Signal):
    """A signal of one's own: label smoothing, of the target alone."""

    needs_error: ClassVar[bool] = False
    needs_target: ClassVar[bool] = True

    def of(self, error, output, target):
        return 0.1 - target


@pytest.mark.parametrize("signal, passes", [
    (signals.Target(raw=True), 1), (signals.Target(raw=True, centred=True), 1),
    (Smooth(raw=True), 1), (Smooth(), 2), ("target", 2), (signals.Sign(raw=True), 2),
    (signals.Function(raw=True, function=lambda y, t, e: -t), 2), ("error", 2),
])  # fmt: skip
def test_which_signals_need_no_error(signal, passes, workspace):
    model = mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=1, signal=signal))
    assert model.feedback.sends.known_ahead == (passes == 1)
    step = same_steps(model, loss_of((X,), G, Y))
    calls = {}
    count_calls(model, calls)
    model.target = Y
    step(lambda: (model(X) * G).sum())
    assert set(calls.values()) == {passes}


@dataclass(frozen=True)
class Wrong(signals.Signal):
    """Reads the error that it says it does not need."""

    needs_error: ClassVar[bool] = False

    def of(self, error, output, target):
        return error


def test_an_error_that_is_read_before_it_is_known():
    """Nothing that looks like one: it is seen at once."""
    model = mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=1, signal=Wrong(raw=True)))
    step = ready(model)
    assert all(p.isfinite().all() for p in model.parameters())
    model.target = Y
    step(lambda: (model(X) * G).sum())
    assert model.module[0].weight.isnan().all()


@pytest.mark.parametrize("options", [
    dict(error="sum"), dict(shared=False), dict(rank=2), dict(dense=False), dict(density=0.5),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_rules(kind, options, workspace):
    rule = fastdfa.Feedback(seed=1, signal=signals.Target(raw=True), **options)
    same_steps(build(kind, feedback=rule), classification(kind))


def test_given_matrices_and_a_projector(workspace):
    given = mlp([5, 8, 7, 3], feedback=RULE, matrices=randn(3, 8))
    same_steps(given, loss_of((X,), G, Y))
    B = randn(3, 8)
    device = mlp([5, 8, 7, 3], feedback=RULE, projector=lambda signal: signal @ B)
    same_steps(device, loss_of((X,), G, Y))


@pytest.mark.parametrize("target", [Y, F.one_hot(Y, 3), randn(6, 3), Y.where(Y > 0, -100)])
def test_targets(target, workspace):
    """Class indices, one of which is to be ignored, and rows of any dtype."""
    same_steps(mlp([5, 8, 7, 3], feedback=RULE), loss_of((X,), G, target))


@pytest.mark.parametrize("output", [None, "layers"])
def test_dropout_and_batch_norm(output, workspace):
    """The random numbers of one pass, whose statistics and buffers are updated once."""
    model = fastdfa.DFA(Noisy().double(), feedback=RULE, output=output)
    inputs, g = data("cnn")
    loss = loss_of(inputs, g, Y)
    same_steps(model, lambda net: loss(net) * torch.rand(()))
    assert model.module.passes == 3
    assert model.module.layers[1].num_batches_tracked == 3


@pytest.mark.parametrize("frozen", ["0", "1", "2", "3"])
def test_frozen_layers(frozen, workspace):
    """Also such that are frozen after the first step, or trained again."""
    model = mlp([5, 8, 7, 6, 3], feedback=RULE)
    model.module.get_submodule(frozen).requires_grad_(False)

    def between(net, n):
        net.module.get_submodule(frozen).requires_grad_(n % 2 == 0)

    same_steps(model, loss_of((X,), G, Y), steps=5, between=between)


def test_tied_parameters(workspace):
    """Of layers, of a layer called twice, and of an embedding that is also the head."""
    model = mlp([5, 8, 8, 8, 8, 3], feedback=RULE)
    model.module[3].weight = model.module[1].weight
    model.module.insert(3, model.module[2])
    same_steps(model, loss_of((X,), G, Y))

    net = Transformer(FASTDFA).double()
    net.head = fastdfa.Linear(8, 11).double()
    net.head.weight = net.token.weight
    tokens, _ = data("transformer")
    g, target = randn(6, 4, 11), tokens[0]
    same_steps(fastdfa.DFA(net, feedback=RULE), loss_of(tokens, g, target))


def test_an_embedding_that_is_also_behind_the_tap(workspace):
    """Behind it the weights are those of before the step, and learn from there as well."""
    net = LanguageModel()
    net.body.token = nn.Embedding(11, 8)
    net.norm, net.body.head = nn.LayerNorm(8), fastdfa.Linear(8, 8)
    net.token = net.body.token
    model = fastdfa.DFA(net.double(), feedback=RULE, output="norm")
    tokens, _ = data("transformer")
    target = randn(6, 4, 8)

    def loss(model):
        model.target = target
        return model(*tokens)["loss"]

    same_steps(model, loss)
    assert model.module.calls == 3


def test_what_the_loss_itself_reads(workspace):
    """A penalty on weights, and a layer outside of the DFA."""
    body = mlp([5, 8, 7, 4], feedback=RULE)
    net = nn.ModuleDict({"body": body, "head": nn.Linear(4, 3).double()})

    def loss(net):
        net["body"].target = Y
        y = net["head"](net["body"](X))
        return (y * G).sum() + 0.1 * net["body"].module[1].weight.square().sum()

    same_steps(net, loss)


def test_shared_paths(workspace):
    """Several readers of one tensor, two points behind one layer, and ways round a cut."""
    same_steps(fastdfa.DFA(Branches().double(), feedback=RULE), loss_of((X,), G, Y))
    skips = fastdfa.DFA(Skips().double(), feedback=RULE, allow_bypass=True)
    same_steps(skips, loss_of((X,), G, Y))

    class SkipToTheOutput(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (fastdfa.Linear(n, 3).double() for n in (5, 3))

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return h + self.second(h)

    skip = fastdfa.DFA(SkipToTheOutput(), feedback=RULE, allow_bypass=True)
    same_steps(skip, loss_of((X,), G, Y))


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_autocast(kind):
    """In the closure; the second step is the first in one pass."""
    inputs, g = data(kind, dtype=torch.float32)
    target = torch.zeros(g.shape[:-1], dtype=torch.int64)

    def loss(model):
        model.target = target
        with torch.autocast("cpu", torch.bfloat16):
            y = model(*inputs)
        return (y.float() * g).sum()

    tolerance = 2e-2 if kind == "cnn" else 1e-5
    model = build(kind, torch.float32, feedback=RULE)
    same_steps(model, loss, steps=2, tolerance=tolerance)


def test_other_batches_and_other_numbers_of_calls(workspace):
    """Sizes that are new take two passes, once."""
    model, sizes = mlp([5, 8, 7, 3], feedback=RULE), iter([6, 4, 6, 4] * 2)

    def partial_batch(net):
        n = next(sizes)
        net.target = Y[:n]
        return (net(X[:n]) * G[:n]).sum()

    same_steps(model, partial_batch, steps=4)
    model, lengths = build("recurrent", feedback=RULE), iter([3, 2, 5, 3, 2, 5] * 2 + [3, 2, 5, 4])
    x = randn(6, 5, 5)

    def sequences(net):
        net.target = Y
        return (net(x[:, : next(lengths)]) * G).sum()

    step, calls = same_steps(model, sequences, steps=6), {}
    count_calls(model, calls)
    found = []
    for _ in range(4):
        calls.clear()
        step(lambda: sequences(model))
        found.append((calls["cell"], calls["head"]))
    assert found == [(3, 1), (2, 1), (5, 1), (12, 3)]  # the last with a survey


def test_modes_and_layers_that_change(workspace):
    """After eval() and a layer that was replaced, a call is one that was not there before."""
    model = fastdfa.DFA(
        nn.Sequential(linear(5, 8), nn.Dropout(), linear(8, 7), linear(7, 3)), feedback=RULE
    )

    def between(net, n):
        net.train(n != 1)
        if n == 2:
            net.module[2] = linear(8, 7)  # of no optimizer
            torch.manual_seed(n)
            nn.init.normal_(net.module[2].weight)
            nn.init.zeros_(net.module[2].bias)

    same_steps(model, loss_of((X,), G, Y), steps=5, between=between)


class Deeper(nn.Module):
    """Has a layer more while it is trained."""

    def __init__(self):
        super().__init__()
        self.first, self.more, self.last = linear(5, 8), linear(8, 8), linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.more(h) if self.training else h)


def test_a_model_that_reads_other_points_in_another_mode(workspace):
    model = fastdfa.DFA(Deeper(), feedback=RULE)
    modes = [True, False, True, False, True]
    same_steps(model, loss_of((X,), G, Y), steps=5, between=lambda net, n: net.train(modes[n]))


def test_a_target_serves_one_step(workspace):
    """In one pass and in two a forgotten one is an error, not that of the batch before."""
    for rule in (RULE, fastdfa.Feedback(seed=1, signal="target")):
        model = mlp([5, 8, 7, 3], feedback=rule)
        step, closure = fastdfa.StreamingStep(model, sgd(model.parameters())), loss_of((X,), G, Y)
        for _ in range(2):
            step(lambda closure=closure, model=model: closure(model))
            assert model.target is None
        with refused(["needs the target"], RuntimeError):
            step(lambda model=model: (model(X) * G).sum())


def test_an_optimizer_that_counts_its_steps(workspace):
    step = same_steps(mlp([5, 8, 7, 3], feedback=RULE), loss_of((X,), G, Y), Counting)
    assert step.optimizer.param_groups[0]["steps"] == 3


# Memory.


@pytest.mark.parametrize("kind", ["layers", "blocks"])
def test_the_peak_does_not_depend_on_depth(kind, monkeypatch):
    """With its gradients it takes less than the activations of eight layers."""
    monkeypatch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})
    x, y = randn(512, 64, dtype=torch.float32), torch.arange(512) % 3
    peaks = []
    for depth in (8, 32):
        model = deep(depth, kind)
        model.feedback = RULE
        step = fastdfa.StreamingStep(model, sgd(model.parameters()))

        def run(step=step, model=model):
            model.target = y
            step(lambda: F.cross_entropy(model(x), y))

        state = {p: {"momentum_buffer": torch.zeros_like(p)} for p in model.parameters()}
        step.optimizer.state.update(state)
        run()
        peaks.append(peak(run))
    assert peaks[1] <= 1.02 * peaks[0]
    assert peaks[1] < 8 * x.nbytes


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_nothing_is_kept_alive(kind):
    """After a step, or a closure that fails: known without the garbage collector's help."""
    model, closure = build(kind, feedback=RULE), classification(kind)
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    step(lambda: closure(model))
    references = []

    def hook(module, args, output):
        references.append(StorageWeakRef(output.untyped_storage()))

    for layer in model.module.modules():
        if not isinstance(layer, nn.MultiheadAttention):
            layer.register_forward_hook(hook)
    gc.collect()
    gc.disable()
    try:
        step(lambda: closure(model))
        assert len(references) > 3 and all(r.expired() for r in references)

        def fails():
            closure(model)
            raise KeyError

        with pytest.raises(KeyError):
            step(fails)
        assert all(r.expired() for r in references)
    finally:
        gc.enable()
    assert all(p.grad is None for p in model.parameters())


# What is refused: before anything is written where sizes tell it, else with layers updated.


def linear(n, m):
    return fastdfa.Linear(n, m, activation="tanh", dtype=torch.float64)


def ready(model):
    """A streaming step of `model`, the next of which is in one pass."""
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    model.target = Y
    step(lambda: (model(X) * G).sum())
    return step


@pytest.mark.parametrize("target, words, kind", [
    (None, ["needs the target", "model.target"], RuntimeError),
    (Y[:4], ["target", "(6,)", "(4,)"], ValueError),
    ([0, 1], ["target", "tensor", "list"], TypeError),
])  # fmt: skip
def test_a_target_that_does_not_fit(target, words, kind):
    model = mlp([5, 8, 7, 3], feedback=RULE)
    step = ready(model)
    before = values(model, step.optimizer)
    model.target = target
    with refused(words, kind):
        step(lambda: (model(X) * G).sum())
    assert_close(values(model, step.optimizer), before, 0)


def test_inputs_that_do_not_fit():
    model = mlp([5, 8, 7, 3], feedback=RULE)
    step = ready(model)
    before = values(model, step.optimizer)
    for x, kind in ((X[:, :4], RuntimeError), (X.clone().requires_grad_(), ValueError)):
        model.target = Y
        with pytest.raises(kind):
            step(lambda x=x: (model(x) * G).sum())
    assert_close(values(model, step.optimizer), before, 0)


def hidden_are_updated(model, step, closure, words, kind):
    """The step fails when the hidden layers have learnt; what follows is as in ordinary steps."""
    twin = copy.deepcopy(model)
    other = sgd(twin.parameters())
    other.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    model.target = Y
    with refused(words, kind):
        step(closure)
    ordinary(twin, other)(lambda: loss_of((X,), G, Y)(twin))
    assert all(p.grad is None for p in model.parameters())
    found, expected = dict(model.named_parameters()), dict(twin.named_parameters())
    hidden = [name for name in found if "module.3" not in name]
    assert_close({n: found[n] for n in hidden}, {n: expected[n] for n in hidden})
    assert not torch.equal(found["module.3.weight"], expected["module.3.weight"])
    assert [len(group["params"]) for group in step.optimizer.param_groups] == [8]
    same_steps(model, loss_of((X,), G, Y))


@pytest.mark.parametrize("failing, words, kind", [
    (lambda y: {}["none"], ["none"], KeyError),
    (lambda y: (y * G).sum(1), ["closure", "scalar", "(6,)"], ValueError),
    (lambda y: y.detach().sum(), ["closure", "graph"], ValueError),
])  # fmt: skip
def test_a_closure_that_fails_after_the_model(failing, words, kind, workspace):
    model = mlp([5, 8, 8, 8, 3], feedback=RULE)
    step = ready(model)
    hidden_are_updated(model, step, lambda: failing(model(X)), words, kind)


def test_a_model_that_is_called_twice(workspace):
    model = mlp([5, 8, 8, 8, 3], feedback=RULE)
    step = ready(model)
    hidden_are_updated(
        model, step, lambda: (model(X) + model(X)).sum(), ["twice", "once"], RuntimeError
    )


def test_a_loss_that_is_not_finite(workspace):
    """It reaches the last layer alone."""
    model = mlp([5, 8, 8, 8, 3], feedback=RULE)
    step = ready(model)
    model.target = Y
    assert step(lambda: model(X).sum() * torch.nan).isnan()
    finite = [p.isfinite().all().item() for p in model.parameters()]
    assert finite == [True] * 6 + [False] * 2


@pytest.mark.parametrize("read, words", [
    ("0", ["loss", "reaches into", "output=name"]), ("1", ["second time"]),
    ("2.0", ["second time"]), ("2", ["loss", "reaches into", "output=name"]),
])  # fmt: skip
def test_a_loss_that_reaches_into_the_model(read, words, workspace):
    """Refused, by torch where it reads the inside of a block: the layers have learnt already."""
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    layers = [linear(5, 8), linear(8, 8), block, linear(8, 8), linear(8, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers), feedback=RULE)
    step, seen = ready(model), []
    model.module.get_submodule(read).register_forward_hook(lambda *args: seen.append(args[-1]))
    model.target = Y
    with refused(words, RuntimeError):
        step(lambda: (model(X) * G).sum() + seen[0].square().sum())
    assert all(p.grad is None for p in model.parameters())


def test_a_penalty_that_was_not_there_before(workspace):
    """Its gradient comes when the weight is updated; from the next step on it is known."""
    model = mlp([5, 8, 7, 3], feedback=RULE)
    step = ready(model)

    def penalised(model=model):
        model.target = Y
        return (model(X) * G).sum() + model.module[0].weight.square().sum()

    with refused(["after it was updated", "the loss"], RuntimeError):
        step(penalised)
    same_steps(model, penalised)


def test_a_model_that_calls_other_layers(workspace):
    """Under the same sizes: said, though some layers are updated by then. The step after looks at
    it anew."""
    model = fastdfa.DFA(Apply(lambda x: x), feedback=RULE)
    model.module.layers = nn.ModuleList([linear(5, 5), linear(5, 5), linear(5, 3)])
    skip = False

    def forward(x):
        first, second, head = model.module.layers
        h = first(x)
        return head(h if skip else second(h))

    model.module.function = forward
    step = ready(model)
    skip = True
    model.target = Y
    with refused(["only pass", "came to", "updated", "signals.Target()"], RuntimeError):
        step(lambda: (model(X) * G).sum())
    assert all(p.grad is None for p in model.parameters())
    calls = {}
    count_calls(model, calls)
    for passes in (3, 1):  # a survey among them
        calls.clear()
        model.target = Y
        step(lambda: (model(X) * G).sum())
        assert calls["layers.0"] == calls["layers.2"] == passes


def test_an_output_of_other_rows():
    """Under the same sizes: the signal was of as many rows as before."""
    model = mlp([5, 8, 7, 3], feedback=RULE)
    rows = 6
    model.module.append(Apply(lambda y: y[:rows]))
    step = ready(model)
    rows, model.target = 4, Y
    with refused(["only pass", "the output, of shape (4, 3)", "(6, 3)", "updated"], RuntimeError):
        step(lambda: (model(X) * G[:4]).sum())
    assert all(p.grad is None for p in model.parameters())
