"""Streaming: the update of an ordinary step, in the memory of one layer."""

import copy
import gc
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.errors import refused
from helpers.kinds import FASTDFA, KINDS, Transformer, build, data
from helpers.networks import RULE, Apply, assert_close, mlp, randn
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
from torch.utils.checkpoint import checkpoint

import fastdfa

X, G = randn(6, 5), randn(6, 3)


def loss_of(inputs, g):
    return lambda model: (model(*inputs).to(g.dtype) * g).sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_an_ordinary_step(kind, optimizer, workspace):
    model = build(kind)
    step = same_steps(model, loss_of(*data(kind)), OPTIMIZERS[optimizer])
    moved = build(kind)
    for name, p in moved.named_parameters():
        assert not torch.equal(p, dict(model.named_parameters())[name]), f"{name} stayed"
    assert step.root.feedback_points and step.root is model


@pytest.mark.parametrize("rule", [
    fastdfa.Feedback(seed=1, shared=False), fastdfa.Feedback(seed=1, error="sum"),
    fastdfa.Feedback(seed=1, dense=False), fastdfa.Feedback(seed=1, scale="tinydfa"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_rules(kind, rule, workspace):
    same_steps(build(kind, feedback=rule), loss_of(*data(kind)))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", ["kolen_pollack", "cross_correlation", lambda B, e, h: B**2])
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_that_learn(kind, rule, optimizer, workspace):
    """From the error and what a point reads; a layer is fed by its B of before the update."""
    model, loss = build(kind), loss_of(*data(kind))
    loss(model)
    matrices = model.learn_feedback(rule)
    before = [B.detach().clone() for B in matrices]
    step = same_steps(model, loss, OPTIMIZERS[optimizer], tolerance=1e-9)
    assert len(matrices) == len(step.root.feedback_points)
    assert not any(torch.equal(B, old) for B, old in zip(matrices, before, strict=True))


@pytest.mark.parametrize("options", [
    dict(feedback=fastdfa.Feedback(seed=1, signal="sign", error="sum")),
    dict(feedback=fastdfa.Feedback(seed=1, signal=fastdfa.signals.Target(raw=True))),
    dict(matrices=randn(3, 8)),
    dict(feedback=fastdfa.Feedback(seed=1, rank=2)),
    dict(feedback=fastdfa.Feedback(seed=1), rule="local_classifier"),
])  # fmt: skip
def test_matrices_that_learn_under_other_rules(options, workspace):
    """The error teaches them, whatever is projected; where one B was for all, each its own, and a Q
    for all is one parameter; a rule may read the target."""
    options = dict(options)
    rule = options.pop("rule", "kolen_pollack")
    model = mlp([5, 8, 7, 8, 3], **options)

    def loss(net):
        net.target = torch.tensor([0, 2, 1, 1, 0, 2])
        return (net(X) * G).sum()

    loss(model)
    learning = model.learn_feedback(rule)
    before = [matrix.detach().clone() for matrix in learning]
    same_steps(model, loss, tolerance=1e-9)
    assert not any(torch.equal(*pair) for pair in zip(learning, before, strict=True))


def test_matrices_that_learn_at_positions_and_behind_ways_round_a_cut(workspace):
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), fastdfa.FeedbackPoint(features=1)] * 2
    layers[3:4] = [nn.Conv2d(4, 4, 3)]
    spread = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))
    inputs, g = data("cnn")
    for net, x, options in ((spread, inputs, {}), (Skips(), (X,), {"allow_bypass": True})):
        model = fastdfa.DFA(net.double(), feedback=RULE, **options)
        model(*x)
        model.learn_feedback()
        same_steps(model, loss_of(x, g))


def test_matrices_that_stay(workspace):
    """Frozen ones, and those of no optimizer."""
    model = mlp([5, 8, 7, 3])
    model(X)
    first, _ = model.learn_feedback()
    first.requires_grad_(False)
    same_steps(model, loss_of((X,), G))
    first.requires_grad_(True)
    same_steps(model, loss_of((X,), G), lambda p: sgd([q for q in p if q.shape[0] != 3]))


def test_matrices_that_learn_are_updated_with_the_layers_that_they_feed(monkeypatch):
    """So that their gradients do not gather over depth."""
    monkeypatch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})
    model, turns = mlp([5, 8, 8, 8, 3]), []
    model(X)
    matrices = model.learn_feedback()

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            turns.append([B.grad is not None for B in matrices])
            return super().step(closure)

    step = fastdfa.StreamingStep(model, Recording(model.parameters(), 0.1))
    step(lambda: (model(X) * G).sum())
    assert turns[:3] == [[k == turn for k in range(3)] for turn in range(3)]
    assert not any(any(turn) for turn in turns[3:])


def test_a_rule_of_learning_that_fails():
    """In the middle of the step; no gradient is left."""
    model = mlp([5, 8, 7, 3])
    model(X)
    model.learn_feedback(lambda B, e, h: B[:2])
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    with refused(["rule of learning", "(3, 8)", "(2, 8)"], ValueError):
        step(lambda: (model(X) * G).sum())
    assert all(p.grad is None for p in model.parameters())


def test_activations_and_biases(workspace):
    kinds, biases = ["gelu", "relu", "Softsign", "sigmoid"], [True, False, True, False, True]
    model = mlp([5, 8, 7, 6, 9, 3], kinds, biases)
    same_steps(model, loss_of((X,), G))


@pytest.mark.parametrize("output", [None, "layers"])
def test_the_second_pass_has_the_random_numbers_and_buffers_of_the_first(output, workspace):
    model = fastdfa.DFA(Noisy().double(), feedback=RULE, output=output)
    inputs, g = data("cnn")
    same_steps(model, lambda net: (net(*inputs) * g).sum() * torch.rand(()))
    assert model.module.passes == 3
    assert model.module.layers[1].num_batches_tracked == 3


@pytest.mark.parametrize("frozen", ["0", "1", "2", "3"])
def test_frozen_layers(frozen, workspace):
    """Also such that are frozen after the first step, or trained again."""
    model = mlp([5, 8, 7, 6, 3])
    model.module.get_submodule(frozen).requires_grad_(False)

    def between(net, n):
        net.module.get_submodule(frozen).requires_grad_(n % 2 == 0)

    same_steps(model, loss_of((X,), G), steps=4, between=between)


def test_tied_parameters(workspace):
    """Of layers, of a layer called twice, and of an embedding that is also the head."""
    model = mlp([5, 8, 8, 8, 8, 3])
    model.module[3].weight = model.module[1].weight
    model.module.insert(3, model.module[2])
    same_steps(model, loss_of((X,), G))
    assert len(model.feedback_points) == 5 and "2#2" in model.feedback_points

    net = Transformer(FASTDFA).double()
    net.head = fastdfa.Linear(8, 11).double()
    net.head.weight = net.token.weight
    tokens, _ = data("transformer")
    same_steps(fastdfa.DFA(net, feedback=RULE), loss_of(tokens, randn(6, 4, 11)))


def test_points_that_share_what_is_before_them(workspace):
    same_steps(fastdfa.DFA(Branches().double(), feedback=RULE), loss_of((X,), G))


def test_ways_round_a_cut(workspace):
    """Refused as ever; where they are accepted, their feedback is the sum that it always was."""
    net = Skips().double()
    model = fastdfa.DFA(net, feedback=RULE)
    before = values(model, sgd(model.parameters()))
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    with refused(["without passing a cut", "allow_bypass"], RuntimeError):
        step(lambda: (model(X) * G).sum())
    assert_close(values(model, step.optimizer), before, 0)
    same_steps(fastdfa.DFA(net, feedback=RULE, allow_bypass=True), loss_of((X,), G))


def test_a_tap(workspace):
    model = fastdfa.DFA(LanguageModel().double(), feedback=RULE, output="norm")
    tokens, _ = data("transformer")
    same_steps(model, lambda net: net(*tokens)["loss"])
    assert model.module.calls == 3  # what follows the tap runs once a step


def test_what_the_loss_itself_reads(workspace):
    """A penalty on weights, and a layer outside of the DFA."""
    net = nn.ModuleDict({"body": mlp([5, 8, 7, 4]), "head": nn.Linear(4, 3).double()})

    def loss(net):
        penalty = sum(p.square().sum() for p in net["body"].parameters())
        return (net["head"](net["body"](X)) * G).sum() + 0.1 * penalty

    same_steps(net, loss)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_autocast(kind, workspace):
    """In the closure and around the step; a backward pass runs outside of it."""
    inputs, g = data(kind, dtype=torch.float32)

    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(*inputs)
        assert y.dtype == torch.bfloat16
        return (y.float() * g).sum()

    # The sums of a convolution's bias gradient may be taken in bfloat16 or in float32.
    tolerance = 1e-2 if kind == "cnn" else 1e-5
    same_steps(build(kind, torch.float32), loss, steps=1, tolerance=tolerance)


class InFloat32(nn.Module):
    """A block that autocast leaves alone, and one that it does not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8)
        self.point = fastdfa.FeedbackPoint()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            h = torch.tanh(self.first(x))
        h = self.point(h)
        return self.head(self.point(torch.tanh(self.second(h))))


def test_autocast_around_the_step():
    """Several steps: no cast weight of the first pass serves the second. And the backward pass of a
    block in float32 stays in it, though its point is under autocast."""
    model = fastdfa.DFA(InFloat32(), feedback=RULE)
    twin = copy.deepcopy(model)
    step = fastdfa.StreamingStep(twin, sgd(twin.parameters()))
    x, g, optimizer = X.float(), G.float(), sgd(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            step(lambda: (twin(x).float() * g).sum())
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x).float() * g).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(values(twin, step.optimizer), values(model, optimizer), 1e-5)


def test_other_batches_and_other_numbers_of_calls(workspace):
    """A partial batch; a recurrent network over sequences of several lengths."""
    model, sizes = mlp([5, 8, 7, 3]), iter([6, 4, 1, 6] * 2)
    same_steps(model, lambda net: (net(X[: (n := next(sizes))]) * G[:n]).sum(), steps=4)
    model, lengths = build("recurrent"), iter([3, 2, 5, 3] * 2)
    x = randn(6, 5, 5)
    same_steps(model, lambda net: (net(x[:, : next(lengths)]) * G).sum(), steps=4)


def test_groups_and_a_scheduler(workspace):
    def groups(parameters):
        parameters = list(parameters)
        return torch.optim.SGD([
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "lr": 0.5},
        ], lr=0.1, momentum=0.9)  # fmt: skip

    model = mlp([5, 8, 7, 3])
    found = []
    for net, make in ((copy.deepcopy(model), ordinary), (model, fastdfa.StreamingStep)):
        optimizer = groups(net.parameters())
        step = make(net, optimizer)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.5], total_steps=5)
        for _ in range(4):
            step(lambda net=net: (net(X) * G).sum())
            scheduler.step()
        found.append((net, optimizer, [group["lr"] for group in optimizer.param_groups]))
    (left, a, rates), (right, b, same_rates) = found
    assert_close(values(right, b), values(left, a))
    assert rates == same_rates
    assert [len(g["params"]) for g in b.param_groups] == [3, 3]


def test_a_checkpoint_goes_on_either_way():
    """Ordinary and streaming steps in turn, through state_dict, are one training."""
    model = mlp([5, 8, 7, 3])
    twin = copy.deepcopy(model)
    adam = OPTIMIZERS["adam"]
    optimizer, other = adam(model.parameters()), adam(twin.parameters())
    for n in range(4):
        ordinary(twin, other)(lambda: (twin(X) * G).sum())
        fresh = mlp([5, 8, 7, 3])
        fresh.load_state_dict(model.state_dict())
        loaded = adam(fresh.parameters())
        loaded.load_state_dict(optimizer.state_dict())
        model, optimizer = fresh, loaded
        step = (ordinary if n % 2 else fastdfa.StreamingStep)(model, optimizer)
        step(lambda model=model: (model(X) * G).sum())
    assert_close(values(model, optimizer), values(twin, other))


def test_an_optimizer_that_counts_its_steps(workspace):
    model = mlp([5, 8, 7, 3])
    step = same_steps(model, loss_of((X,), G), Counting)
    assert step.optimizer.param_groups[0]["steps"] == 3


def test_parameters_of_no_optimizer_stay(workspace):
    model = mlp([5, 8, 7, 3])
    same_steps(model, loss_of((X,), G), lambda p: sgd(list(p)[2:4]))


def test_hooks_of_parameters(workspace):
    model = mlp([5, 8, 7, 3])
    seen = []
    model.module[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    model.module[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum()))
    twin = copy.deepcopy(model)
    twin.module[0].weight.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    step, optimizer = fastdfa.StreamingStep(model, sgd(model.parameters())), sgd(twin.parameters())
    step(lambda: (model(X) * G).sum())
    ordinary(twin, optimizer)(lambda: (twin(X) * G).sum())
    assert_close(values(model, step.optimizer), values(twin, optimizer))
    assert len(seen) == 1


def test_activation_checkpointing_inside_a_block(workspace):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.point = nn.Linear(8, 8), fastdfa.FeedbackPoint()

        def forward(self, h):
            return self.point(checkpoint(self.residual, h, use_reentrant=False))

        def residual(self, h):
            return h + torch.tanh(self.inner(h))

    net = nn.Sequential(nn.Linear(5, 8), fastdfa.FeedbackPoint(), Block(), Block(), nn.Linear(8, 3))
    same_steps(fastdfa.DFA(net.double(), feedback=RULE), loss_of((X,), G))


def test_a_checkpoint_with_a_point_inside_is_refused():
    """It would run layers again that are updated by then."""

    class Block(nn.Sequential):
        def forward(self, h):
            return checkpoint(super().forward, h, use_reentrant=False)

    layers = [fastdfa.Linear(5, 8), Block(fastdfa.Linear(8, 8), fastdfa.Linear(8, 8))]
    model = fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(8, 3)).double(), feedback=RULE)
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    with pytest.raises(RuntimeError, match="a checkpoint has a feedback point inside"):
        step(lambda: (model(X) * G).sum())


def test_layers_compiled_one_by_one(workspace):
    model = build("resnet")
    for layer in model.module:
        layer.compile(backend="aot_eager")
    inputs, g = data("resnet")
    expected = build("resnet")
    optimizer = sgd(expected.parameters())
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    try:
        for _ in range(2):
            step(lambda: (model(*inputs) * g).sum())
            ordinary(expected, optimizer)(lambda: (expected(*inputs) * g).sum())
    finally:
        torch._dynamo.reset()
    assert_close(values(model, step.optimizer), values(expected, optimizer))


# Memory.


@pytest.mark.parametrize("kind", ["layers", "blocks"])
def test_the_peak_does_not_depend_on_depth(kind, monkeypatch):
    """Of the first step, which surveys the model, and of a later one. With its gradients it takes
    less than the activations of eight layers."""
    monkeypatch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})
    x, y = randn(512, 64, dtype=torch.float32), torch.arange(512) % 3
    first, later = [], []
    for depth in (8, 32):
        model = deep(depth, kind)
        step = fastdfa.StreamingStep(model, sgd(model.parameters()))

        def run(step=step, model=model):
            step(lambda: F.cross_entropy(model(x), y))

        state = {p: {"momentum_buffer": torch.zeros_like(p)} for p in model.parameters()}
        step.optimizer.state.update(state)
        first.append(peak(run))
        later.append(peak(run))
    assert first[1] <= 1.05 * first[0]
    assert later[1] <= 1.02 * later[0]
    assert later[1] < 8 * x.nbytes


@pytest.mark.parametrize("kind", ["layers", "blocks"])
def test_one_activation_and_one_gradient_at_a_time(kind, monkeypatch):
    monkeypatch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})
    model = deep(6, kind)
    optimizer = sgd(model.parameters())
    step = fastdfa.StreamingStep(model, optimizer)
    outputs, alive, gradients = [], [], []

    def hook(module, args, output):
        alive.append(sum(not r.expired() for r in outputs))
        outputs.append(StorageWeakRef(output.untyped_storage()))

    layers = [layer for layer in model.module if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(hook)
    update = optimizer.step

    def counted():
        gradients.append(sum(p.grad is not None for p in model.parameters()))
        update()

    optimizer.step = counted
    for _ in range(2):
        step(lambda: F.cross_entropy(model(randn(9, 64, dtype=torch.float32)), torch.arange(9) % 3))
    # The input of a layer.
    assert max(alive) == {"layers": 1, "blocks": 0}[kind]
    assert len(outputs) == 4 * len(layers)
    assert gradients == [2] * 14


@pytest.mark.parametrize("end", ["step", "closure", "second pass"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_nothing_is_kept_alive(kind, end):
    """Without the garbage collector's help, after the first step and a later one."""
    model = build(kind)
    inputs, g = data(kind)
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    references, fail = [], []

    def hook(module, args, output):
        references.append(StorageWeakRef(output.untyped_storage()))
        if end == "second pass" and fail and module is list(model.module.modules())[-1]:
            raise KeyError

    for layer in model.module.modules():
        if not isinstance(layer, nn.MultiheadAttention):
            layer.register_forward_hook(hook)

    def closure():
        loss = (model(*inputs) * g).sum()
        fail.append(True)
        if end == "closure":
            raise KeyError
        return loss

    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            if end == "step":
                step(closure)
            else:
                with pytest.raises(KeyError):
                    step(closure)
            fail.clear()
            assert len(references) > 3
            assert all(r.expired() for r in references)
    finally:
        gc.enable()
    assert all(p.grad is None for p in model.parameters())


def test_a_model_is_freed():
    model = mlp([5, 8, 3])
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    step(lambda model=model: (model(X) * G).sum())
    reference = weakref.ref(model)
    del model, step
    gc.collect()
    assert reference() is None


# What is refused, with nothing written.


def linear(n, m):
    return fastdfa.Linear(n, m, dtype=torch.float64)


@pytest.mark.parametrize("make, kind, words", [
    (lambda m: (torch.tanh, sgd(m.parameters())), TypeError, ["model", "nn.Module"]),
    (lambda m: (nn.Linear(2, 2), sgd(m.parameters())), ValueError, ["model", "DFA", "Linear"]),
    (lambda m: (nn.ModuleList([m, mlp([2, 2])]), sgd(m.parameters())), ValueError, ["DFA", "2"]),
    (lambda m: (m, torch.optim.SGD), TypeError, ["optimizer", "torch.optim.Optimizer", "type"]),
    (lambda m: (m, torch.optim.LBFGS(m.parameters())), ValueError, ["LBFGS", "closure"]),
    (lambda m: (m, sgd(mlp([2, 2]).parameters())), ValueError, ["optimizer", "parameters", "SGD"]),
])  # fmt: skip
def test_arguments(make, kind, words):
    model, optimizer = make(mlp([5, 8, 3]))
    with refused(words, kind):
        fastdfa.StreamingStep(model, optimizer)


def attempt(model, closure, words, kind, around=None, steps=1):
    """The step is refused, nothing was written, and an ordinary step follows as if nothing was."""
    twin = copy.deepcopy(model)
    optimizer = sgd(model.parameters())
    step = fastdfa.StreamingStep(model, optimizer)
    before = values(model, optimizer)
    for _ in range(steps):
        with refused(words, kind):
            step(closure) if around is None else around(step)
    assert_close(values(model, optimizer), before, 0)
    assert all(p.grad is None for p in model.parameters())
    ordinary(model, optimizer)(lambda: (model(X) * G).sum())
    other = sgd(twin.parameters())
    ordinary(twin, other)(lambda: (twin(X) * G).sum())
    assert_close(values(model, optimizer), values(twin, other), 0)
    model.zero_grad()


def test_closures(model):
    attempt(model, lambda: 1.5, ["closure", "tensor", "float"], TypeError)
    attempt(model, lambda: (model(X) * G).sum(0), ["closure", "scalar", "(3,)"], ValueError)
    attempt(model, lambda: model(X).detach().sum(), ["closure", "graph"], ValueError)
    attempt(model, lambda: torch.ones((), requires_grad=True), ["closure", "call"], RuntimeError)
    attempt(model, lambda: (model(X) + model(X)).sum(), ["twice", "once"], RuntimeError)
    attempt(model, lambda: model(X[:, :4]).sum(), ["4"], RuntimeError)

    def out_of_data():
        model(X)
        raise StopIteration

    with pytest.raises(StopIteration):
        fastdfa.StreamingStep(model, sgd(model.parameters()))(out_of_data)
    attempt(model, lambda: (model(X) + model(X)).sum(), ["twice", "once"], RuntimeError)


def test_places(model):
    def loss():
        return (model(X) * G).sum()

    def in_backprop(step):
        with fastdfa.backprop(model):
            step(loss)

    def in_no_grad(step):
        with torch.no_grad():
            step(loss)

    attempt(model, None, ["backprop", "ordinary"], RuntimeError, in_backprop)
    attempt(model, None, ["gradients disabled"], RuntimeError, in_no_grad)
    attempt(model, None, ["inside"], RuntimeError, lambda step: step(lambda: step(loss)))


def test_inputs(model):
    x = X.clone().requires_grad_()
    attempt(model, lambda: (model(x) * G).sum(), ["inputs", "require grad", "detach"], ValueError)
    x = X.clone()

    def modified():
        loss = (model(x) * G).sum()
        x.mul_(2)
        return loss

    attempt(model, modified, ["input", "in place"], RuntimeError, steps=2)
    model.module.insert(0, nn.ReLU(inplace=True))
    attempt(model, lambda: (model(X.clone()) * G).sum(), ["input", "in place"], RuntimeError)


def test_gradients_that_are_there(model):
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    (model(X) * G).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with refused(["gradient", "zero_grad"], ValueError):
        step(lambda: (model(X) * G).sum())
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, gradient)


@pytest.mark.parametrize("hook", ["pre", "post"])
def test_hooks_of_the_optimizer(model, hook):
    """Clipping by the global norm, or an average of weights, would be of a part."""
    optimizer = sgd(model.parameters())
    step = fastdfa.StreamingStep(model, optimizer)
    register = getattr(optimizer, f"register_step_{hook}_hook")
    handle = register(lambda *args: None)
    with refused(["optimizer", "hooks", "SGD"], ValueError):
        step(lambda: (model(X) * G).sum())
    with refused(["optimizer", "hooks", "SGD"], ValueError):
        fastdfa.StreamingStep(model, optimizer)
    handle.remove()
    step(lambda: (model(X) * G).sum())


def test_rows_that_fit_no_point(model):
    """In the first step, and in a later one that calls the same layers."""
    sums = fastdfa.DFA(
        nn.Sequential(*model.module, Apply(lambda y: y[: 6 - len(short)])), feedback=RULE
    )
    step = fastdfa.StreamingStep(sums, sgd(sums.parameters()))
    for short in ([], [1]):
        before = values(sums, step.optimizer)
        if not short:
            step(lambda: sums(X).sum())
            continue
        with refused(["feedback point", "rows", "(6, 8)"], ValueError):
            step(lambda: sums(X).sum())
        assert_close(values(sums, step.optimizer), before, 0)


@pytest.mark.parametrize("steps_before", [0, 1, 2])
@pytest.mark.parametrize("read", ["0", "1", "2.0", "2", "3"])
def test_a_loss_that_reaches_into_the_model(read, steps_before):
    """Refused in every step: its gradient would be lost in silence."""
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double()
    fused = [fastdfa.Linear(n, 8, activation=f).double() for n, f in ((5, "tanh"), (8, "gelu"))]
    layers = [*fused, block, linear(8, 8), linear(8, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers), feedback=RULE)
    seen = []
    model.module.get_submodule(read).register_forward_hook(lambda *args: seen.append(args[-1]))

    def loss():
        return (model(X) * G).sum() + seen[0].square().sum()

    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    for _ in range(steps_before):
        step(lambda: (model(X) * G).sum())
    seen.clear()
    before = values(model, step.optimizer)
    with refused(["loss", "reaches into", "output=name"], RuntimeError):
        step(loss)
    assert_close(values(model, step.optimizer), before, 0)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_is_not_the_same_twice():
    """Python's random numbers are not put back: said, though some layers are updated by then."""
    layers = nn.ModuleList([linear(5, 5) for _ in range(6)])
    model = fastdfa.DFA(Apply(lambda x: x), feedback=RULE)
    model.module.layers = layers

    def shuffled(x):
        for layer in random.sample(list(layers), 6):
            x = torch.tanh(layer(x))
        return x

    model.module.function = shuffled
    optimizer = sgd(model.parameters())
    step = fastdfa.StreamingStep(model, optimizer)
    random.seed(1)
    with refused(["second pass", "Linear", "updated", "torch's generators"], RuntimeError):
        step(lambda: model(X).sum())
    assert all(p.grad is None for p in model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 12


def test_a_parameter_that_is_used_otherwise_than_before():
    """Under the same calls of layers: seen at the latest when its second gradient arrives."""
    shared = nn.Parameter(randn(8, 8))
    model = mlp([5, 8, 8, 3])
    model.register_parameter("shared", shared)
    model.module.insert(1, Apply(lambda h: h @ shared))
    model.module.insert(3, Apply(lambda h: h @ shared if twice else h))
    twice = False
    step = fastdfa.StreamingStep(model, sgd(model.parameters()))
    step(lambda: (model(X) * G).sum())
    twice = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})
        with refused(["after it was updated", "uses its parameters"], RuntimeError):
            step(lambda: (model(X) * G).sum())


def test_an_optimizer_that_fails():
    """The groups are whole again, no gradient is left, and the model can be used."""
    model = mlp([5, 8, 7, 3])
    optimizer = sgd(model.parameters())

    def fail():
        raise KeyError

    optimizer.step, working = fail, optimizer.step
    step = fastdfa.StreamingStep(model, optimizer)
    random_state = torch.get_rng_state()
    with pytest.raises(KeyError):
        step(lambda: (model(X) * G).sum())
    assert len(optimizer.param_groups[0]["params"]) == 6
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    optimizer.step = working
    same_steps(model, loss_of((X,), G))


def test_distributed_data_parallel(tmp_path):
    """Its exchange of gradients waits for all of them."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = mlp([5, 8, 3])
        parallel = nn.parallel.DistributedDataParallel(model)
        step = fastdfa.StreamingStep(parallel, sgd(model.parameters()))
        before = values(model, step.optimizer)
        with refused(["one process", "DistributedDataParallel"], RuntimeError):
            step(lambda: (parallel(X) * G).sum())
        assert_close(values(model, step.optimizer), before, 0)
    finally:
        torch.distributed.destroy_process_group()
