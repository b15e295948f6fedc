"""PyTorch's own tools around every kind of network (contract 8); two processes: test_ddp.py."""

import copy
from functools import partial

import pytest
import torch
from helpers.kinds import KINDS, ResidualBlock, build, data, definition, run
from helpers.networks import RULE, Apply, assert_close, gradients, mlp, randn, step
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdfa

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _no_compiled_code_left():
    yield
    torch._dynamo.reset()


def check(kind, model, inputs, g, forward=None, tolerance=1e-10):
    """One step, by `forward` if given, has the output and the gradients of the definition."""
    model.zero_grad()
    y = run(model if forward is None else forward, inputs, g)
    y_expected, expected = definition(kind, model, inputs, g)
    assert_close(y, y_expected, tolerance)
    assert_close(gradients(model), expected, tolerance)


@every_kind
def test_one_graph_for_any_batch(kind):
    """fullgraph=True; the first size has one graph, and all others one."""
    model = build(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (6, 9, 4, 17):
        check(kind, model, *data(kind, rows), compiled)
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "transformer"])
def test_inductor(kind):
    model = build(kind)
    check(kind, model, *data(kind), torch.compile(model, fullgraph=True))


def test_one_graph_for_any_number_of_positions():
    layers = [nn.Conv1d(2, 4, 3), nn.Tanh(), fastdfa.FeedbackPoint(features=1)]
    pool = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)]
    model = fastdfa.DFA(nn.Sequential(*layers, *pool).double(), feedback=RULE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows, positions in ((6, 8), (4, 9), (5, 12), (7, 6)):
        x, g, found = randn(rows, 2, positions), randn(rows, 3), []
        for forward in (model, compiled):
            model.zero_grad()
            run(forward, (x,), g)
            found.append(gradients(model))
        assert_close(*found)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_autocast(kind, dtype):
    """With a GradScaler, whose scale passes through the feedback."""
    model = build(kind, torch.float32)
    inputs, g = data(kind, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with torch.autocast("cpu", dtype=dtype):
        loss = (model(*inputs).float() * g).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    with torch.autocast("cpu", dtype=dtype):
        _, expected = definition(kind, model, inputs, g)
    assert_close(gradients(model), expected, 3e-2 if dtype == torch.bfloat16 else 4e-3)
    assert scaler.step(optimizer) is None and scaler.get_scale() == 2.0**8


CHECKPOINTED = (
    fastdfa.Linear, fastdfa.Conv2d, ResidualBlock, nn.TransformerEncoderLayer, nn.GRUCell,
)  # fmt: skip


@every_kind
def test_activation_checkpointing(kind):
    """Of every layer and block: the wrapper changes neither the gradients nor the names."""
    model = build(kind)
    inputs, g = data(kind)
    check(kind, model, inputs, g)
    expected, names = gradients(model), model.feedback_points
    model.zero_grad()
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, CHECKPOINTED))
    run(model, inputs, g)
    assert model.feedback_points == names
    for actual, right in zip(gradients(model).values(), expected.values(), strict=True):
        assert_close(actual, right)


@every_kind
def test_an_average_of_the_weights(kind):
    """A deep copy, made before or after a step, that follows the model and trains like it."""
    model = build(kind)
    inputs, g = data(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        check(kind, model, inputs, g)
        optimizer.step()
        average.update_parameters(model)
    late = copy.deepcopy(model)
    for follower in (average.module, late):
        assert int(follower.seed) == int(model.seed)
        check(kind, follower, inputs, g)
    check(kind, model, inputs, g)


@pytest.mark.parametrize("gradients_enabled", [True, False])
@every_kind
def test_export(kind, gradients_enabled):
    """Of the model in eval mode, root and all: as without a root; training goes on after it."""
    model = build(kind).eval()
    inputs, g = data(kind)
    with torch.set_grad_enabled(gradients_enabled):
        exported = torch.export.export(model, inputs)
        assert_close(exported.module()(*inputs), model.module(*inputs))
    check(kind, model, inputs, g)


@every_kind
def test_clipping_and_parameter_groups(kind):
    """Two groups of their own rates, clipped together, as by the definition's gradients."""
    model = build(kind)
    inputs, g = data(kind)
    run(model, inputs, g)
    _, expected = definition(kind, model, inputs, g)
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD([{"params": matrices}, {"params": vectors, "lr": 0.5}], lr=0.1)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert_close(nn.utils.clip_grad_norm_(model.parameters(), 0.5 * norm), norm)
    optimizer.step()
    for name, p in model.module.named_parameters():
        rate = 0.1 if p.dim() > 1 else 0.5
        assert_close(p, before[name] - rate * 0.5 * expected[name], 1e-6)  # torch adds 1e-6


# Trainers ------------------------------------------------------------------------------------


class Task(nn.Module):
    """What a user of Lightning writes: the root is a module inside it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        inputs, g = batch
        return (self.net(*inputs) * g).sum()

    def validation_step(self, batch):
        return self.net(*batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Trainer:
    """Lightning's automatic optimisation: all of a step happens in a closure that the optimizer
    calls; gradients of several batches are accumulated, then clipped; validation in between."""

    def __init__(self, accumulate_grad_batches, gradient_clip_val):
        self.every, self.clip = accumulate_grad_batches, gradient_clip_val

    def fit(self, task, batches):
        optimizer = task.configure_optimizers()
        self.validate(task, batches[0])  # before anything was trained
        for number, batch in enumerate(batches):
            first, last = number % self.every == 0, (number + 1) % self.every == 0
            closure = partial(self.closure, task, optimizer, batch, first, last)
            if last:
                optimizer.step(closure)
                self.validate(task, batch)
            else:
                closure()

    def closure(self, task, optimizer, batch, first, last):
        loss = task.training_step(batch)
        if first:
            optimizer.zero_grad()
        loss.backward()
        if last:
            nn.utils.clip_grad_norm_(task.parameters(), self.clip)
        return loss.detach()

    def validate(self, task, batch):
        task.eval()
        with torch.inference_mode():
            task.validation_step(batch)
        task.train()


@pytest.mark.parametrize("every", [1, 2])
@every_kind
def test_a_trainer_of_closures(kind, every):
    """Ends with the weights that the definition's gradients, summed and clipped, lead to."""
    model = build(kind)
    batches = [(data(kind)[0], randn(*data(kind)[1].shape, seed=s)) for s in range(4)]
    by_hand = copy.deepcopy(model)
    by_hand(*batches[0][0])  # the definition takes its points from the latest forward pass
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    Trainer(every, gradient_clip_val := 1.0).fit(Task(model), batches)
    for start in range(0, len(batches), every):
        found = [definition(kind, by_hand, *batch)[1] for batch in batches[start : start + every]]
        total = {name: sum(gradients[name] for gradients in found) for name in found[0]}
        norm = torch.stack([gradient.norm() for gradient in total.values()]).norm()
        assert norm > gradient_clip_val
        with torch.no_grad():
            for name, p in by_hand.module.named_parameters():
                p -= 0.1 * gradient_clip_val / norm * total[name]
    for name, p in by_hand.module.named_parameters():
        actual = dict(model.module.named_parameters())[name]
        assert_close(actual - before[name], p - before[name], 1e-5)  # torch adds 1e-6 to the norm


@every_kind
def test_an_optimizer_that_calls_its_closure_often(kind):
    model = build(kind)
    inputs, g = data(kind)
    weights = []

    def closure():
        weights.append(next(model.parameters()).detach().clone())
        check(kind, model, inputs, g)
        return (model(*inputs) * g).sum().detach()

    torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=3).step(closure)
    assert len(weights) > 2 and not torch.equal(weights[0], weights[-1])


# Frozen layers -------------------------------------------------------------------------------

FROZEN = {  # the first layer; one in the middle
    "mlp": ("0", "1"), "cnn": ("0", "1"), "resnet": ("0", "2"),
    "transformer": ("token", "blocks.0"), "gcn": ("layers.0", "layers.1"),
    "recurrent": ("cell", "head"),
}  # fmt: skip


@pytest.mark.parametrize("which", [0, 1])
@every_kind
def test_frozen_layers(kind, which):
    """Have no gradient, and the others what they have without; a root frozen below a point has
    one point less, as nothing is to be fed there."""
    model = build(kind)
    inputs, g = data(kind)
    check(kind, model, inputs, g)
    expected = gradients(model)
    model.zero_grad()
    frozen = FROZEN[kind][which]
    model.module.get_submodule(frozen).requires_grad_(False)
    run(model, inputs, g)
    for name in expected:
        if name.startswith(f"{frozen}."):
            expected[name] = None
    assert_close(gradients(model), expected)


# Modules that change their input in place ----------------------------------------------------

IN_PLACE = {
    "relu": lambda: nn.ReLU(inplace=True), "dropout": lambda: nn.Dropout(0.4, inplace=True),
    "silu": lambda: nn.SiLU(inplace=True), "leaky": lambda: nn.LeakyReLU(0.1, inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("where", [
    "after a layer", "after an activation", "after a point", "after a norm", "before a layer",
])  # fmt: skip
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("conv", [False, True])
def test_a_module_in_place_is_right_or_refused(conv, change, where):
    """Right: as the same network whose module makes a new tensor."""

    def layer(n, m, **options):
        return fastdfa.Conv2d(n, m, 3, padding=1, **options) if conv else fastdfa.Linear(n, m)

    def norm(n):
        return nn.BatchNorm2d(n) if conv else nn.BatchNorm1d(n)

    def net(module):
        torch.manual_seed(0)
        between = {
            "after a layer": [layer(2, 4), module],
            "after an activation": [
                fastdfa.Conv2d(2, 4, 3, padding=1, activation="tanh") if conv
                else fastdfa.Linear(2, 4, activation="tanh"), module,
            ],
            "after a point": [layer(2, 4), nn.Tanh(), fastdfa.FeedbackPoint(), module],
            "after a norm": [layer(2, 4), norm(4), module],
            "before a layer": [layer(2, 4), nn.Tanh(), module],
        }[where]  # fmt: skip
        flat = [nn.Flatten()] if conv else []
        layers = [*between, layer(4, 4), *flat, fastdfa.Linear(64 if conv else 4, 3)]
        return fastdfa.DFA(nn.Sequential(*layers).double(), feedback=RULE)

    x, g, found = randn(5, 2, 4, 4) if conv else randn(5, 2), randn(5, 3), []
    for in_place in (False, True):
        module = IN_PLACE[change]()
        module.inplace = in_place
        model = net(module)
        torch.manual_seed(7)
        try:
            step(model, x, g)
        except RuntimeError as error:
            assert in_place and ("inplace" in str(error) or "in-place" in str(error))
            return
        found.append(gradients(model))
    assert_close(found[1], found[0])


# Adapters ------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen layer and a trained product of low rank beside it (arXiv 2106.09685)."""

    def __init__(self, layer, down=nn.Linear):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = down(8, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)

    def forward(self, h):
        return self.layer(h) + self.up(self.down(h))


def test_adapters_inside_a_block():
    """Trained alone, by the feedback at the block's end."""

    def block():
        return nn.Sequential(nn.LayerNorm(8), Adapted(nn.Linear(8, 8)), nn.Tanh())

    layers = [block(), fastdfa.FeedbackPoint(), block(), fastdfa.FeedbackPoint()]
    model = fastdfa.DFA(nn.Sequential(*layers, nn.Linear(8, 3)).double(), feedback=RULE)
    x, g = randn(6, 8), randn(6, 3)
    step(model, x, g)
    h = x
    for start in (0, 2):
        part = model.module[start]
        trained = [p for p in part.parameters() if p.requires_grad]
        out = part(h)
        e = g @ model.feedback_matrix(str(start + 1))
        for p, right in zip(trained, torch.autograd.grad(out, trained, e), strict=True):
            assert_close(p.grad, right)
        assert all(p.grad is None for p in part.parameters() if not p.requires_grad)
        h = out.detach()


def test_an_adapter_beside_a_cut():
    """Reads what the layer cuts, so that later feedback would pass through it: refused, and right
    with an adapter that cuts as well."""

    def build(down):
        first = fastdfa.Linear(5, 8, activation="tanh")
        adapted = Adapted(fastdfa.Linear(8, 8), down)
        return fastdfa.DFA(
            nn.Sequential(first, adapted, nn.Tanh(), fastdfa.Linear(8, 3)).double(), feedback=RULE
        )

    x, g = randn(6, 5), randn(6, 3)
    with pytest.raises(RuntimeError, match=r"1\.layer"):
        build(nn.Linear)(x)
    model = build(fastdfa.Linear)
    step(model, x, g)
    first, adapted = model.module[:2]
    h = first(x).detach()
    out = torch.tanh(adapted(h))
    trained = [adapted.down.weight, adapted.up.weight]
    expected = torch.autograd.grad(out, trained, g @ model.feedback_matrix("3"))
    for p, right in zip(trained, expected, strict=True):
        assert_close(p.grad, right)
    delta = g @ model.feedback_matrix("1.layer") * (1 - h**2)
    assert_close(first.weight.grad, delta.T @ x)


# A model on several devices ------------------------------------------------------------------


class TwoDevices(nn.Module):
    """A body that is computed, and layers on the meta device, which compute shapes alone."""

    def __init__(self):
        super().__init__()
        self.body = mlp([5, 8, 7, 3]).module
        self.side = mlp([5, 9, 9, 9, 4]).module.to("meta")

    def forward(self, x):
        self.side(x.to("meta"))
        return self.body(x)


class Copies(TorchDispatchMode):
    """Records the devices to which tensors are copied."""

    def __init__(self):
        super().__init__()
        self.to = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            self.to.append(kwargs["device"].type)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("error", ["mean", "sum"])
def test_the_error_is_copied_once_to_each_device(error, monkeypatch):
    """Though the layers there are several groups, as few fit the workspace."""
    monkeypatch.setitem(fastdfa.engine.stages.WORKSPACE_BYTES, "cpu", 1)
    rule = fastdfa.Feedback(seed=1, error=error)
    model = fastdfa.DFA(TwoDevices(), feedback=rule)
    x, g = randn(6, 5), randn(6, 3)
    y = model(x)
    assert model.feedback_points == ["side.1", "side.2", "side.3", "body.1", "body.2"]
    with Copies() as copies:
        (y * g).sum().backward()
    assert copies.to == ["meta"]
    for layer in model.module.side[:3]:
        for p in layer.parameters():
            assert p.grad.is_meta and p.grad.shape == p.shape
    # The widest layer is on the other device; its B is the same function.
    alone = fastdfa.DFA(copy.deepcopy(model.module.body), feedback=rule)
    alone.zero_grad()
    step(alone, x, g)
    assert_close({n: p.grad for n, p in model.module.body.named_parameters()}, gradients(alone))


def test_a_model_on_one_device_copies_nothing():
    model = mlp([5, 8, 7, 3])
    with Copies() as copies:
        step(model, randn(6, 5), randn(6, 3))
    assert copies.to == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no second device that computes")
@pytest.mark.parametrize("move", [0, 1, 2, 3])
def test_a_model_split_over_cpu_and_gpu(move):
    """Layers from `move` on are on the GPU: gradients are those of the model on the CPU."""
    whole = mlp([5, 8, 7, 6, 3])
    x, g = randn(6, 5), randn(6, 3)
    step(whole, x, g)
    split = copy.deepcopy(whole)
    split.zero_grad()
    layers = list(split.module)
    layers[move:] = [layer.cuda() for layer in layers[move:]]
    layers.insert(move, Apply(lambda h: h.cuda()))
    split.module = nn.Sequential(*layers)
    step(split, x, g.cuda())
    for actual, right in zip(gradients(split).values(), gradients(whole).values(), strict=True):
        assert_close(actual.cpu(), right)
