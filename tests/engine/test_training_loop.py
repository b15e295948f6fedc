"""What PyTorch offers to a training loop, tried on every kind of network, each against the
definition (contract 8). Autograd: test_autograd.py; compiled: test_compile.py; several processes:
test_ddp.py; hooks: test_hooks.py; other tools: test_around.py."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from helpers.kinds import KINDS, build, by_hand, data, definition, run
from helpers.networks import assert_close, expected_gradients, gradients, mlp, randn, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdfa

every_kind = pytest.mark.parametrize("kind", KINDS)


def check(kind, model, inputs, g, tolerance=1e-10):
    """One step has the output and the gradients of the definition."""
    model.zero_grad()
    y = run(model, inputs, g)
    y_expected, expected = definition(kind, model, inputs, g)
    assert_close(y, y_expected, tolerance)
    assert_close(gradients(model), expected, tolerance)


# The host waits for nothing --------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for, and what has a size that depends on
    values: neither may be in a CUDA graph."""

    REFUSED = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select",
               "_unique2", "unique_dim", "is_pinned", "_assert_async")  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.partition("::")[2] in self.REFUSED:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [
    {}, {"error": "sum"}, {"shared": False}, {"signal": "sign"}, {"signal": "ternary"},
    {"signal": "quantized"}, {"rank": 2}, {"density": 0.5}, {"dense": True},
], ids=str)  # fmt: skip
@every_kind
def test_a_step_after_the_first_waits_for_no_value(kind, rule):
    """So that it may be in a CUDA graph, optimizer and clipping included."""
    model = build(kind, feedback=fastdfa.Feedback(seed=1, **rule))
    optimizer = torch.optim.Adam(model.parameters(), capturable=False, foreach=True)
    inputs, g = data(kind)
    run(model, inputs, g)
    with NoSync():
        optimizer.zero_grad()
        run(model, inputs, g)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(p.grad is not None for p in model.parameters())


def test_reading_a_value_is_noticed():
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        torch.ones(()).item()


# Modes of torch --------------------------------------------------------------------------------


@every_kind
def test_autocast_off_inside_autocast(kind):
    """The network at full precision, in a step that is otherwise at half."""
    model, (inputs, g) = build(kind, torch.float32), data(kind, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = model(*inputs)
            assert y.dtype == torch.float32
        loss = (y * g).sum()
    loss.backward()
    y_expected, expected = definition(kind, model, inputs, g)
    assert_close(y, y_expected, 1e-5)
    assert_close(gradients(model), expected, 1e-4)


class Partly(nn.Module):
    """Its middle runs under autocast of its own, or without."""

    def __init__(self, **mode):
        super().__init__()
        self.below, self.above = (
            fastdfa.Linear(16, 24, activation="tanh"), fastdfa.Linear(20, 3)
        )  # fmt: skip
        self.middle = nn.Sequential(
            fastdfa.Linear(24, 24, activation="relu"), fastdfa.Linear(24, 20, activation="tanh")
        )
        self.mode = mode

    def forward(self, x):
        h = self.below(x)
        with torch.autocast("cpu", **self.mode):
            h = self.middle(h.float() if not self.mode.get("enabled", True) else h)
        return self.above(h if torch.is_autocast_enabled("cpu") else h.to(self.above.weight.dtype))


@pytest.mark.parametrize("outside", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [None, torch.bfloat16, torch.float16], ids=str)
def test_autocast_nested_inside_the_network(inside, outside):
    model = Partly(enabled=False) if inside is None else Partly(dtype=inside)
    model = fastdfa.DFA(model, fastdfa.Feedback(seed=1))
    exact = copy.deepcopy(model).double()
    exact.module.mode = {"enabled": False}
    exact.module.middle.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    x, g = randn(20, 16), randn(20, 3)
    for _ in range(2):
        model.zero_grad()
        off = nullcontext() if outside is None else torch.autocast("cpu", dtype=outside)
        with off:
            y = model(x.float())
        (y.float() * g.float()).sum().backward()
    assert y.dtype == (outside or torch.float32)
    step(exact, x, g)
    assert_close(gradients(model), gradients(exact), 3e-2)


@every_kind
def test_another_default_dtype(kind):
    """The network, its B and its gradients are of the default dtype, and right."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = build(kind, torch.float32)
        check(kind, model, *data(kind, dtype=torch.float32), tolerance=1e-4)
        model = build(kind)
        check(kind, model, *data(kind))
        for name in model.feedback_points:
            assert model.feedback_matrix(name).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("rule", [{}, {"dense": True}, {"rank": 2}, {"signal": "sign"}], ids=str)
@every_kind
def test_another_default_device(kind, rule):
    """What is made in a step is made where the model is, not where factories make tensors."""
    feedback = fastdfa.Feedback(seed=1, **rule)
    model, (inputs, g) = build(kind, feedback=feedback), data(kind)
    run(model, inputs, g)
    expected = gradients(model)
    other = build(kind, feedback=feedback)
    torch.set_default_device("meta")
    try:
        run(other, inputs, g)
    finally:
        torch.set_default_device(None)
    assert_close(gradients(other), expected, 0)


@every_kind
def test_inference_mode_before_and_between_training(kind):
    """Nothing that is kept from it is an inference tensor."""
    model, (inputs, g) = build(kind), data(kind)
    for _ in range(2):
        with torch.inference_mode():
            model(*inputs)
        check(kind, model, inputs, g)
    other = build(kind)
    with torch.inference_mode():
        other.load_state_dict(model.state_dict())
        other(*inputs)
    check(kind, other, inputs, g)


def test_a_network_of_inference_tensors_trains_where_torch_lets_it():
    """An input made in inference mode is refused by torch itself, once it would be saved."""
    model = mlp([5, 8, 7, 3])
    with torch.inference_mode():
        x = randn(6, 5).clone()
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors"):
        step(model, x, randn(6, 3))
    model.zero_grad()
    step(model, x.clone(), randn(6, 3))
    assert_close(gradients(model), expected_gradients(model, x, randn(6, 3)))


# The same bits ---------------------------------------------------------------------------------


def trained(kind, model, optimizer, batches, scheduler=None):
    for x, g in batches:
        optimizer.zero_grad()
        run(model, x, g)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("threads", [1, 2])
@every_kind
def test_twice_the_same_bits(kind, threads):
    """In float32, of batches that several threads share, with deterministic algorithms alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            model = build(kind, torch.float32)
            optimizer = torch.optim.Adam(model.parameters())
            batches = [data(kind, n, torch.float32) for n in (64, 64, 48)]
            found.append(trained(kind, model, optimizer, batches))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    same_bits(*found)


class WithDropout(nn.Module):
    """Draws from torch's generator in each pass."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            fastdfa.Linear(5, 16, activation="relu"), nn.Dropout(0.3), nn.BatchNorm1d(16),
            fastdfa.Linear(16, 16, activation="tanh"), nn.Dropout(0.3), fastdfa.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


RESUMED = {
    "plain": {}, "rank": {"rank": 2}, "anchored": {"anchor": 3}, "drawn": {"seed": None},
    "separate": {"shared": False}, "signal": {"signal": "sign"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "learn"), [*((rule, False) for rule in RESUMED), ("plain", True), ("rank", True)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(rule, learn):
    """Bit by bit: model, optimizer, scheduler and torch's random state from a file."""

    def made(seed):
        torch.manual_seed(seed)
        feedback = fastdfa.Feedback(**{"seed": 1, **RESUMED[rule]})
        model = fastdfa.DFA(WithDropout(), feedback)
        if learn:
            model(batches[0][0][0])
            model.learn_feedback()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    batches = [((randn(8, 5, seed=s, dtype=torch.float32),), randn(8, 3, seed=s + 20,
               dtype=torch.float32)) for s in range(10)]  # fmt: skip
    parts = model, optimizer, scheduler = made(0)
    trained(rule, model, optimizer, batches[:5], scheduler)
    file = io.BytesIO()
    torch.save([[part.state_dict() for part in parts], torch.get_rng_state()], file)
    expected = trained(rule, model, optimizer, batches[5:], scheduler)
    file.seek(0)
    states, random = torch.load(file)
    parts = model, optimizer, scheduler = made(7)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    same_bits(trained(rule, model, optimizer, batches[5:], scheduler), expected)


@every_kind
def test_a_resumed_network_of_any_kind_equals_an_uninterrupted_one(kind):
    batches = [data(kind, n, torch.float32) for n in (6, 8, 6, 4)]
    parts = [build(kind, torch.float32)]
    parts.append(torch.optim.Adam(parts[0].parameters()))
    trained(kind, *parts, batches[:2])
    states = copy.deepcopy([part.state_dict() for part in parts])
    expected = trained(kind, *parts, batches[2:])
    parts = [build(kind, torch.float32, feedback=fastdfa.Feedback(seed=99))]
    parts.append(torch.optim.Adam(parts[0].parameters()))
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    same_bits(trained(kind, *parts, batches[2:]), expected)


# Data loaders ----------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows that a network of fastdfa's layers makes, in the process of the loader."""

    def __init__(self, model=None):
        self.model = model

    def __len__(self):
        return 24

    def __getitem__(self, index):
        x = randn(5, seed=index)
        if self.model is not None:
            with torch.no_grad():
                x = self.model(x.expand(64, 5))[0]
        return x, index % 3


STARTS = {"fork": [], "spawn": [pytest.mark.slow], "forkserver": [pytest.mark.slow]}  # 10 s each


@pytest.mark.parametrize("start", [pytest.param(s, marks=marks) for s, marks in STARTS.items()])
@pytest.mark.parametrize("inside", [False, True])
def test_data_loaders_of_other_processes(start, inside):
    """The kernels have run in several threads before, and run in the loaders' processes too."""
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    model = mlp([5, 8, 7, 3])
    step(model, randn(512, 5), randn(512, 3))
    made_by = mlp([5, 64, 64, 5]) if inside else None
    rows = Rows(made_by)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=12, num_workers=1, multiprocessing_context=start, timeout=60
    )
    seen = 0
    for x, target in loader:
        model.zero_grad()
        nn.functional.cross_entropy(y := model(x), target).backward()
        error = (torch.softmax(y.detach(), 1) - nn.functional.one_hot(target, 3)) / len(x)
        assert_close(gradients(model), expected_gradients(model, x, error))
        assert_close(x[0], rows[12 * seen][0])
        seen += 1
    assert seen == 2


# Programs of torch -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_an_exported_network_that_was_trained_is_that_of_torchs_modules(kind, dtype):
    """Bit by bit, from a file, by torch's own operators alone: it needs no fastdfa to run."""
    model, (inputs, g) = build(kind, dtype), data(kind, dtype=dtype)
    trained(kind, model, torch.optim.SGD(model.parameters(), 0.1), [(inputs, g)] * 3)
    model.eval()
    plain = KINDS[kind][0](by_hand(cuts=False)[0]).to(dtype).eval()
    plain.load_state_dict(model.module.state_dict())
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, inputs), file)
    file.seek(0)
    program = torch.export.load(file)
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    calls = [str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"]
    assert calls and not any("fastdfa" in call for call in calls)
    assert torch.equal(program.module()(*inputs), plain(*inputs))
    assert_close(program.module()(*inputs), model(*inputs), 1e-10 if dtype.itemsize == 8 else 1e-5)


@pytest.mark.parametrize("compiler", [
    lambda model: torch.jit.script(model), lambda model: torch.jit.trace(model, (randn(6, 5),)),
])  # fmt: skip
@pytest.mark.parametrize("of", [
    lambda: mlp([5, 8, 7, 3]), lambda: mlp([5, 8, 3]).module,
    lambda: fastdfa.LayerFeedback(mlp([5, 8, 3]).module),
    lambda: nn.Sequential(fastdfa.FeedbackPoint()),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused(of, compiler):
    model = of()
    with pytest.raises(RuntimeError, match=r"TorchScript cannot hold .* torch\.export"):
        compiler(model)
    model(randn(6, 5))  # as if nothing had been tried


# DataParallel ----------------------------------------------------------------------------------


@every_kind
def test_data_parallel_without_gpus(kind):
    """It calls the module itself."""
    model, (inputs, g) = build(kind), data(kind)
    model.zero_grad()
    run(nn.DataParallel(model), inputs, g)
    assert_close(gradients(model), definition(kind, model, inputs, g)[1])


def replicas(model, n):
    """As torch.nn.parallel.replicate makes them on GPUs: copies of one structure, of which
    parameters and buffers are tensors with a history, on the device of each."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    made = []
    for _ in range(n):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, copies, strict=True):
            for name, child in module._modules.items():
                replica._modules[name] = None if child is None else copies[index[child]]
                setattr(replica, name, replica._modules[name])
            for name, p in module._parameters.items():
                if p is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, p.clone())

            for name, buffer in module._buffers.items():
                replica._buffers[name] = buffer.clone()
        made.append(copies[0])
    return made


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gcn"])  # which is no batch
def test_replicas_train_as_data_parallel_has_them(kind):
    """Each in a thread of its own, in whose state its tape is. A cell that is called again reads
    copies of weights there, which look like something computed: paths through them are accepted."""
    model = build(kind, allow_bypass=kind == "recurrent").eval()  # batch norm would see a half
    inputs, g = data(kind)
    model(*inputs)
    expected = definition(kind, model, inputs, g)[1]
    halves = [[x[rows] for x in inputs] for rows in (slice(0, 3), slice(3, 6))]
    for _ in range(3):
        model.zero_grad()
        with ThreadPoolExecutor(2) as pool:
            ys = list(pool.map(lambda made, half: made(*half), replicas(model, 2), halves))
        (torch.cat(ys) * g).sum().backward()
        assert_close(gradients(model), expected)


# Norms of several processes --------------------------------------------------------------------


def test_norms_of_several_processes_are_torchs():
    """And train as batch norms where there is one process. (Among several torch refuses them on a
    CPU: "SyncBatchNorm expected input tensor to be on cuda".)"""

    def made():
        torch.manual_seed(0)
        blocks = [fastdfa.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
        return fastdfa.DFA(nn.Sequential(*blocks, fastdfa.Linear(8, 3)).double())

    model, other = made(), nn.SyncBatchNorm.convert_sync_batchnorm(made())
    other.load_state_dict(model.state_dict())
    x, g = randn(6, 5), randn(6, 3)
    for each in (model, other):
        step(each, x, g)
    assert_close(gradients(other), gradients(model))
