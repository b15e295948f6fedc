"""torch.compile: the gradients are those of eager mode, in one graph, and nothing is compiled
again without need (contract 8)."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.networks import (
    RULE,
    Apply,
    assert_close,
    expected_gradients,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastdfa


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.q, self.v = fastdfa.Linear(n, n), fastdfa.Linear(n, n)
        self.k = fastdfa.Linear(n, n, bias=False)  # its gradient would be 0 but for rounding

    def forward(self, h):
        return torch.softmax(self.q(h) @ self.k(h).mT, -1) @ self.v(h)


class Residual(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(n), fastdfa.Linear(n, n, activation="gelu")
        self.point = fastdfa.FeedbackPoint()

    def forward(self, h):
        return self.point(h + self.inner(self.norm(h)))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = fastdfa.Linear(5, 8, activation="tanh")
        self.loop = fastdfa.Linear(8, 8, activation="relu")
        self.head = fastdfa.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        for _ in range(3):
            h = self.loop(h)
        return self.head(h)


def sequential(*layers, **options):
    return fastdfa.DFA(nn.Sequential(*layers).double(), **({"feedback": RULE} | options))


MODELS = {
    "fused": lambda: mlp([5, 8, 7, 9, 3], ["tanh", "gelu", "relu"]),
    "no bias": lambda: mlp([5, 8, 7, 3], bias=False),
    "generated": lambda: mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=1, dense=False)),
    "separate": lambda: mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=1, shared=False)),
    "output": lambda: mlp(
        [5, 8, 7, 3],
        feedback=fastdfa.Feedback(seed=1, rank=2, signal=lambda y, target, error: y * error),
    ),
    "sum": lambda: mlp([5, 8, 7, 3], feedback=fastdfa.Feedback(seed=1, error="sum")),
    "unknown": lambda: mlp([5, 8, 7, 3], "Softsign"),
    "modules": lambda: sequential(
        fastdfa.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), fastdfa.Linear(8, 7), nn.Tanh(),
        fastdfa.Linear(7, 3),
    ),
    "mixed": lambda: sequential(
        fastdfa.Linear(5, 8, activation="tanh"), fastdfa.Linear(8, 8, activation="relu"),
        nn.LayerNorm(8), fastdfa.Linear(8, 7, activation="silu"), fastdfa.Linear(7, 3),
    ),
    "residual": lambda: sequential(
        nn.Linear(5, 8), fastdfa.FeedbackPoint(), Residual(8), Residual(8), nn.Linear(8, 3)
    ),
    "attention": lambda: sequential(
        fastdfa.Linear(5, 8, activation="tanh"), Attention(8), nn.LayerNorm(8), fastdfa.Linear(8, 3)
    ),
    "loop": lambda: fastdfa.DFA(Loop().double(), feedback=RULE),
    "tap": lambda: sequential(
        fastdfa.Linear(5, 8, activation="tanh"), fastdfa.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3),
        output="1",
    ),
    "one layer": lambda: mlp([5, 3]),
}  # fmt: skip


def twins(name):
    """The same model twice: one for eager mode, one to compile."""
    torch.manual_seed(0)
    eager = MODELS[name]()
    return eager, copy.deepcopy(eager)


def rows_of(name):
    return (2, 3) if name == "attention" else (6,)


def check(run, model, eager, x, g, tolerance=1e-10):
    """One step of the compiled model equals one of its eager twin."""
    for m in (model, eager):
        m.zero_grad()
    y_eager = step(eager, x, g)
    y = run(x)
    (y * g).sum().backward()
    assert_close(y, y_eager, tolerance)
    assert_close(gradients(model), gradients(eager), tolerance)


@pytest.mark.parametrize("first", ["compiled", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_one_graph(name, first):
    """fullgraph=True, whether or not an eager pass went before."""
    eager, model = twins(name)
    x, g = randn(*rows_of(name), 5), randn(*rows_of(name), 3)
    if first == "eager":
        step(model, x, g)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    for k in range(2):
        check(run, model, eager, randn(*rows_of(name), 5, seed=k), g)
    assert list(model.feedback_points) == list(eager.feedback_points)


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [
    ("fused", torch.float32), ("mixed", torch.float64), ("residual", torch.float32),
])  # fmt: skip
def test_inductor(name, dtype):
    eager, model = (m.to(dtype) for m in twins(name))
    run = torch.compile(model, fullgraph=True)
    x, g = randn(6, 5, dtype=dtype), randn(6, 3, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    check(run, model, eager, x, g, tolerance)
    check(run, model, eager, 2 * x, g, tolerance)


def test_autocast():
    eager, model = (m.float() for m in twins("mixed"))
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, g = randn(6, 5, dtype=torch.float32), randn(6, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [(m(x).float() * g).sum() for m in (run, eager)]
    for loss in losses:
        loss.backward()
    assert_close(gradients(model), gradients(eager), 2e-2)


def counting(model, **options):
    """The compiled model, and what counts its compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, **options), counter


@pytest.mark.parametrize("name", ["fused", "mixed", "residual"])
def test_any_batch_with_two_graphs(name):
    """The first size, then one graph for all; a single row may take one of its own."""
    eager, model = twins(name)
    run, counter = counting(model, fullgraph=True)
    for rows in (6, 9, 4, 17, 33):
        check(run, model, eager, randn(rows, 5), randn(rows, 3))
    assert counter.frame_count <= 2
    check(run, model, eager, randn(1, 5), randn(1, 3))
    assert counter.frame_count <= 3


def test_dynamic_from_the_start():
    eager, model = twins("fused")
    run, counter = counting(model, fullgraph=True, dynamic=True)
    counts = []
    for rows in (6, 9, 4):
        check(run, model, eager, randn(rows, 5), randn(rows, 3))
        counts.append(counter.frame_count)
    # Not always one: Dynamo may start anew on finding that a float is a constant.
    assert counts[0] == counts[-1]


def test_training_compiles_once():
    """Steps of an optimizer, zeroed gradients and eager passes in between change nothing."""
    _, model = twins("mixed")
    run, counter = counting(model, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, g = randn(6, 5), randn(6, 3)
    for k in range(6):
        optimizer.zero_grad()
        (run(x) * g).sum().backward()
        optimizer.step()
        if k == 3:
            step(model, x, g)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["fused", "mixed", "residual"])
def test_layers_compiled_one_by_one(name):
    """One graph for each kind of layer, not one for each layer times its position."""
    eager, model = twins(name)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.module:
        layer.compile(backend=counter)
    x, g = randn(6, 5), randn(6, 3)
    check(model, model, eager, x, g)
    check(model, model, eager, x, g)
    warm = counter.frame_count
    assert warm <= 2 * len(model.module)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in range(3):
            check(model, model, eager, randn(6, 5, seed=k), g)
    assert counter.frame_count == warm


def test_many_equal_layers_compiled_one_by_one():
    """Thirty layers share the graph of one: Dynamo's limit of eight is not met."""
    depth = 30
    eager = mlp([8] * (depth + 1) + [3])
    model = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.module:
        layer.compile(backend=counter)
    x, g = randn(6, 8), randn(6, 3)
    check(model, model, eager, x, g)
    check(model, model, eager, x, g)
    assert counter.frame_count <= 6
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(model, model, eager, x, g)


def test_a_submodule_compiled():
    torch.manual_seed(0)
    eager = sequential(
        fastdfa.Linear(5, 8, activation="tanh"),
        nn.Sequential(
            fastdfa.Linear(8, 8, activation="tanh"), nn.LayerNorm(8), fastdfa.Linear(8, 7)
        ),
        nn.ReLU(),
        fastdfa.Linear(7, 3),
    )
    model = copy.deepcopy(eager)
    model.module[1] = torch.compile(model.module[1], backend="aot_eager")
    x, g = randn(6, 5), randn(6, 3)
    for m in (eager, model):
        step(m, x, g)
    for a, b in zip(gradients(model).values(), gradients(eager).values(), strict=True):
        assert_close(a, b)
    assert list(model.feedback_points) == list(eager.feedback_points)


@pytest.mark.parametrize("kind", ["disabled", "checkpointed"])
def test_layers_that_run_untraced(kind):
    """Amid traced ones, which hand them their feedback all the same."""

    class Block(nn.Sequential):
        def forward(self, h):
            if kind == "disabled":
                return torch.compiler.disable(super().forward)(h)
            return checkpoint(super().forward, h, use_reentrant=False)

    eager = sequential(
        fastdfa.Linear(5, 8, activation="tanh"),
        Block(
            fastdfa.Linear(8, 8, activation="tanh"), fastdfa.FeedbackPoint(), nn.Linear(8, 8),
            nn.Tanh(), fastdfa.FeedbackPoint(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 7),
        ),
        fastdfa.Linear(7, 6),
        Block(fastdfa.Linear(6, 6, activation="relu")),
        fastdfa.Linear(6, 3),
    )  # fmt: skip
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager")
    x, g = randn(8, 5), randn(8, 3)
    check(compiled, model, eager, x, g)


@pytest.mark.parametrize("where", [1, 2, 3])
def test_graph_breaks(where):
    def stop(h):
        torch._dynamo.graph_break()
        return h

    torch.manual_seed(0)
    layers = [
        fastdfa.Linear(5, 8, activation="tanh"), fastdfa.Linear(8, 7, activation="relu"),
        nn.LayerNorm(7), fastdfa.Linear(7, 3),
    ]  # fmt: skip
    layers.insert(where, Apply(stop))
    eager = sequential(*layers)
    model = copy.deepcopy(eager)
    run = torch.compile(model, backend="aot_eager")
    x, g = randn(6, 5), randn(6, 3)
    check(run, model, eager, x, g)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            check(run, model, eager, x, g)


@pytest.mark.parametrize("where", [1, 2, 3])
def test_graph_breaks_where_some_layers_are_cut(where):
    """Behind a break layers are compiled one by one, and a cut of one is not that of another."""

    def stop(h):
        torch._dynamo.graph_break()
        return h

    layers = [fastdfa.Linear(5, 5, activation="tanh") for _ in range(4)] + [fastdfa.Linear(5, 3)]
    layers.insert(where, Apply(stop))
    eager = sequential(*layers, cut=["4"])
    model = copy.deepcopy(eager)
    x, g = randn(6, 5), randn(6, 3)
    check(torch.compile(model, backend="aot_eager"), model, eager, x, g)
    assert model.feedback_points == ["4"]


def test_the_loss_and_the_model_in_one_graph():
    eager, model = twins("mixed")

    def loss_of(m, x, target):
        return nn.functional.cross_entropy(m(x), target)

    x, target = randn(6, 5), torch.arange(6) % 3
    run = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    run(model, x, target).backward()
    loss_of(eager, x, target).backward()
    assert_close(gradients(model), gradients(eager))


def test_another_seed_is_seen():
    """A checkpoint loaded after compilation changes B."""
    eager, model = twins("fused")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, g = randn(6, 5), randn(6, 3)
    check(run, model, eager, x, g)
    other = mlp([5, 8, 7, 9, 3], ["tanh", "gelu", "relu"], feedback=fastdfa.Feedback(seed=2))
    before = gradients(model)["0.weight"]
    for m in (model, eager):
        m.load_state_dict(other.state_dict())
    check(run, model, eager, x, g)
    assert_close(gradients(model), expected_gradients(eager, x, g))
    assert not torch.allclose(before, gradients(model)["0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_a_cuda_device_is_given(backend, monkeypatch):
    """Dense matrices with padded rows in the layers' 16 bits, and tf32 allowed: here on the CPU."""
    whole = fastdfa.ops.feedback

    def padded(rows, columns, **options):
        return whole(rows, columns + 16, **options)[:, :columns]

    monkeypatch.setattr(fastdfa.ops, "feedback", padded)
    monkeypatch.setattr(fastdfa.ops, "feedback_dtype", lambda device, dtype, classes: dtype)
    monkeypatch.setattr(fastdfa.ops, "allow_tf32", lambda device, dtype: True)
    for shared in (True, False):
        rule = fastdfa.Feedback(seed=1, shared=shared)
        model = mlp([5, 8, 7, 40], dtype=torch.bfloat16, feedback=rule)
        x, g = randn(6, 5, dtype=torch.bfloat16), randn(6, 40, dtype=torch.bfloat16)
        step(model, x, g)
        expected = gradients(model)
        model.zero_grad()
        step(torch.compile(model, fullgraph=True, backend=backend), x, g)
        assert_close(gradients(model), expected, 2e-2)
        matrices = list(model.bank._cache._matrices.values())
        assert [B.dtype for B in matrices] == [torch.bfloat16] * len(matrices)
        assert all(B.stride(0) == B.shape[1] + 16 for B in matrices)


def test_backprop_of_a_compiled_model():
    eager, model = twins("fused")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, g = randn(6, 5), randn(6, 3)
    check(run, model, eager, x, g)
    with fastdfa.backprop(eager), fastdfa.backprop(model):
        check(run, model, eager, x, g)
    check(run, model, eager, x, g)


def test_without_gradients():
    eager, model = twins("mixed")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, g = randn(6, 5), randn(6, 3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(run(x), eager(x))
    check(run, model, eager, x, g)


def test_frozen_layers():
    eager, model = twins("fused")
    for m in (eager, model):
        m.module[0].requires_grad_(False)
        m.module[2].bias.requires_grad_(False)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    check(run, model, eager, randn(6, 5), randn(6, 3))


@pytest.mark.parametrize("hook", [lambda g: 2 * g, lambda g: None])
def test_hooks_of_tensors(hook):
    """Registered inside the compiled forward, on what a fused layer returns."""

    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(5, 8, activation="tanh")
            self.head = fastdfa.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            h.register_hook(hook)
            return self.head(h)

    eager = fastdfa.DFA(Hooked().double(), feedback=RULE)
    model = copy.deepcopy(eager)
    check(torch.compile(model, backend="aot_eager"), model, eager, randn(6, 5), randn(6, 3))


def test_what_a_tap_returns_beside_the_output():
    """An activation that is fed and has a loss of its own gets both gradients."""

    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastdfa.Linear(5, 8, activation="tanh")
            self.head = fastdfa.Linear(8, 3)

        def forward(self, x):
            h = self.first(x)
            return self.head(h), h

    eager = fastdfa.DFA(Aux().double(), feedback=RULE, output="head")
    model = copy.deepcopy(eager)
    x, g, a = randn(6, 5), randn(6, 3), randn(6, 8, seed=4)
    for run in (eager, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y, h = run(x)
        ((y * g).sum() + (h * a).sum()).backward()
    assert_close(gradients(model), gradients(eager))


def test_an_input_that_requires_grad():
    eager, model = twins("fused")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, x_eager = randn(6, 5).requires_grad_(), randn(6, 5).requires_grad_()
    g = randn(6, 3)
    (run(x) * g).sum().backward()
    step(eager, x_eager, g)
    assert_close(gradients(model), gradients(eager))
    assert_close(x.grad, x_eager.grad)


def test_two_compiled_roots_of_one_module():
    one = MODELS["fused"]()
    two = fastdfa.DFA(one.module, feedback=fastdfa.Feedback(seed=2))
    runs = [torch.compile(m, backend="aot_eager", fullgraph=True) for m in (one, two)]
    x, g = randn(6, 5), randn(6, 3)
    two.activations = one.activations
    for run, model in zip(runs * 2, (one, two) * 2, strict=True):
        one.zero_grad()
        (run(x) * g).sum().backward()
        assert_close(gradients(model), expected_gradients(model, x, g))


# What a compiled step depends on, and a user may write afterwards: several times, and back.
WRITES = {
    "seed": lambda m, i: m.seed.fill_([7, 8, 9, 1][i]),
    "scale": lambda m, i: rule(m, scale=[2.0, 3.0, "unit", "launay2019"][i]),
    "error": lambda m, i: rule(m, error=["sum", "mean", "sum", "mean"][i]),
    "shared": lambda m, i: rule(m, shared=[False, True, False, True][i]),
    "distribution": lambda m, i: rule(
        m, distribution=["uniform", "rademacher", "uniform", "normal"][i]
    ),
    "signal": lambda m, i: rule(m, signal=["sign", "ternary", "error", "sign"][i]),
    "rank": lambda m, i: rule(m, rank=[2, 1, None, 2][i]),
    "density": lambda m, i: rule(m, density=[0.5, 0.7, 1.0, 0.5][i]),
    "dense": lambda m, i: rule(m, dense=[False, True, False, None][i]),
    "cut": lambda m, i: setattr(m, "cut", ["2", (), 2, "all"][i]),
    "frozen": lambda m, i: m.module[1].requires_grad_(i % 2 == 1),
    "mode": lambda m, i: m.train(i % 2 == 1),
    "layer": lambda m, i: m.module.__setitem__(1, made(i)),
}


def rule(model, **options):
    model.feedback = replace(model.feedback, **options)


def made(i):
    torch.manual_seed(i)
    return fastdfa.Linear(8, 7, activation=["relu", "tanh", "silu", "gelu"][i], dtype=torch.float64)


@pytest.mark.parametrize("write", WRITES)
def test_what_is_written_after_compilation_is_followed(write):
    eager, model = twins("fused")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, g = randn(6, 5), randn(6, 3)
    check(run, model, eager, x, g)
    for i in range(4):
        for each in (eager, model):
            WRITES[write](each, i)
        check(run, model, eager, x, g)


def test_a_seed_written_often_compiles_once():
    eager, model = twins("residual")
    run, counter = counting(model, fullgraph=True)
    for seed in range(10):
        for each in (eager, model):
            each.seed.fill_(seed)
        check(run, model, eager, randn(6, 5), randn(6, 3))
    assert counter.frame_count == 1


def test_a_seed_may_be_written_between_forward_and_backward_passes():
    """As DistributedDataParallel does in every forward pass, with the same value."""
    eager, model = twins("fused")
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, g = randn(6, 5), randn(6, 3)
    for each, called in ((eager, eager), (model, run)):
        losses = []
        for k in (1, 2):
            losses.append((called(k * x) * g).sum())
            each.seed.fill_(int(each.seed))
        sum(losses).backward()
    assert_close(gradients(model), gradients(eager))


def test_given_matrices_are_followed():
    matrices = {"1": randn(3, 8), "2": randn(3, 7), "3": randn(3, 9)}
    eager = mlp([5, 8, 7, 9, 3], ["tanh", "gelu", "relu"], matrices=matrices)
    model = copy.deepcopy(eager)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, g = randn(6, 5), randn(6, 3)
    for i in range(3):
        check(run, model, eager, x, g)
        for each in (eager, model):
            each.matrices["2"].data.fill_(i)
            each.matrices["3"] = nn.Parameter(randn(3, 9, seed=i), requires_grad=False)


@pytest.mark.parametrize("kind", ["forward", "forward pre", "full backward", "full backward pre"])
@pytest.mark.parametrize("where", ["0", "1", "3"])
def test_a_module_hook_that_does_nothing(kind, where):
    eager, model = twins("fused")
    register = f"register_{kind.replace(' ', '_')}_hook"
    for each in (eager, model):
        getattr(each.module.get_submodule(where), register)(lambda *args: None)
    run = torch.compile(model, backend="aot_eager")
    check(run, model, eager, randn(6, 5), randn(6, 3))
    check(run, model, eager, randn(6, 5, seed=1), randn(6, 3))
