"""Two processes with DistributedDataParallel or FSDP2 (contract 6, 7 and 8).

They talk over the loopback device, which a sandbox may lack: gloo then waits without end. So every
wait here is bounded, and what torch's own DistributedDataParallel cannot do is no failure of ours.
"""

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.kinds import ResidualBlock, data, run
from helpers.kinds import build as build_kind
from helpers.networks import RULE, assert_close, gradients, mlp, randn, step
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import fastdfa

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
    ),
]

ROWS, SEEDS = 8, (11, 22)
DDP = ("fused", "general", "separate", "in place")
KINDS = ("cnn", "transformer", "fa", "usf", "learning")
SHARDED = ("mlp", "cnn", "resnet", "transformer", "recurrent", "converted")
CUT_AT_THE_END = ("resnet", "converted", "fused")  # of networks whose blocks are sharded whole
OPTIONS = {
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
    "buckets": {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4},
    "unused buckets": {"find_unused_parameters": True, "bucket_cap_mb": 1e-4},
}
COMMUNICATION = ("hook", "compressed")
COMPILED = ("compiled",)  # in small buckets torch itself fails: "First bucket should be smaller"
TRIED = ("mlp", "resnet", "transformer")
WAYS = [(kind, way) for kind in TRIED for way in (*OPTIONS, *COMMUNICATION)]
WAYS += [(kind, way) for kind in ("mlp", "transformer") for way in COMPILED]
POLICIES = {
    "low": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}
SHARDED_AS = {"low": ("mlp", "transformer"), "offload": TRIED}  # batch norm's buffers stay as wide
LOW = {"low": 3e-2, "compressed": 2e-3}  # tolerances
SECONDS = 60  # that torch alone may take; 3 are usual, for all


def build(kind, seed):
    torch.manual_seed(seed)  # every process starts with other weights and another seed
    rule = fastdfa.Feedback(seed=seed, shared=kind != "separate")
    if kind == "in place":
        layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)]
        return fastdfa.convert(nn.Sequential(*layers).double(), rule)
    if kind == "general":
        layers = [fastdfa.Linear(5, 8, activation="tanh"), nn.LayerNorm(8), nn.ReLU()]
        return fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(8, 3)).double(), feedback=rule)
    return mlp([5, 8, 7, 3], feedback=rule)


def train(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    nn.parallel.DistributedDataParallel(nn.Linear(2, 1))(torch.ones(1, 2)).sum().backward()
    Path(folder, f"torch-works-{rank}").touch()
    found = {}
    for kind in DDP:
        model = build(kind, SEEDS[rank])
        wrapped = nn.parallel.DistributedDataParallel(model)
        rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        x, target = randn(ROWS, 5)[rows], (torch.arange(ROWS) % 3)[rows]
        for _ in range(2):
            wrapped.zero_grad()
            nn.functional.cross_entropy(wrapped(x), target).backward()
        B = {name: model.feedback_matrix(name) for name in model.feedback_points}
        found[kind] = dict(
            seed=int(model.seed), gradients=gradients(model), B=B, state=model.state_dict()
        )
    for kind in KINDS:
        found[kind] = half_of(kind, rank, nn.parallel.DistributedDataParallel)
    for kind, way in WAYS:
        found[kind, way] = half_of(kind, rank, partial(wrapped_as, way), averages=True)
    for kind in TRIED:
        found[kind, "no_sync"] = accumulated(kind, rank)
    found["with unused layers"] = with_unused_layers(rank)
    found["anchored"] = anchored(nn.parallel.DistributedDataParallel, rank)
    mesh = init_device_mesh("cpu", (2,))
    for kind in SHARDED:
        for by_block in (False, True):
            wrap = partial(shard, mesh=mesh, by_block=by_block)
            found[kind, by_block] = half_of(kind, rank, wrap)
    for kind in CUT_AT_THE_END:
        for with_root in (False, True):
            wrap = partial(shard_whole, mesh=mesh, with_root=with_root)
            found[kind, "whole", with_root] = half_of(kind, rank, wrap)
    for policy in POLICIES:
        for kind in SHARDED_AS[policy]:
            wrap = partial(shard, mesh=mesh, by_block=True, **POLICIES[policy])
            found[kind, policy] = half_of(kind, rank, wrap)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def build_any(kind):
    """One of kinds.py, or of those whose blocks end in a cut, with the kind that has its inputs."""
    torch.manual_seed(0)
    if kind == "converted":
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        model = nn.Sequential(nn.Embedding(11, 8), encoder, nn.Linear(8, 3)).double()
        return fastdfa.convert(model, RULE, blocks=["0", nn.TransformerEncoderLayer]), "transformer"
    if kind == "fused":
        ends = [
            nn.Sequential(fastdfa.Linear(n, m, activation="tanh"), fastdfa.FeedbackPoint())
            for n, m in ((5, 8), (8, 8))
        ]
        return fastdfa.DFA(nn.Sequential(*ends, nn.Linear(8, 3)).double(), RULE), "mlp"
    if kind in ("fa", "usf"):
        layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)]
        return fastdfa.LayerFeedback(nn.Sequential(*layers).double(), kind, seed=1), "mlp"
    if kind == "learning":
        model = build_kind("mlp")
        run(model, *data("mlp", ROWS))
        model.zero_grad()
        model.learn_feedback()
        return model, "mlp"
    return build_kind(kind), kind


def trained(model):
    """The parameters of a network and the B that learn, by name."""
    matrices = getattr(model, "matrices", None) or {}
    network = model if isinstance(model, nn.Sequential) else model.module  # of convert
    return {**dict(network.named_parameters()), **{f"B {k}": B for k, B in matrices.items()}}


def wrapped_as(way, model):
    """In DistributedDataParallel with these options, communication, or compiler."""
    sizes = {"bucket_cap_mb": 1e-4} if way.endswith("buckets") else {}
    ddp = nn.parallel.DistributedDataParallel(model, **OPTIONS.get(way, sizes))
    if way == "hook":
        ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    if way == "compressed":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return torch.compile(ddp, backend="aot_eager") if way.startswith("compiled") else ddp


def accumulated(kind, rank):
    """The gradients of two passes, of which the first waits for no process."""
    model, like = build_any(kind)
    ddp = nn.parallel.DistributedDataParallel(model.eval())
    inputs, g = data(like, ROWS)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    with ddp.no_sync():
        run(ddp, [x[rows] for x in inputs], 2 * g[rows])
    run(ddp, [x[rows] for x in inputs], 2 * g[rows])
    return {name: p.grad for name, p in trained(model).items()}


def with_unused_layers(rank):
    model, like = build_any("transformer")
    model.module.unused = nn.Linear(3, 3).double()
    ddp = nn.parallel.DistributedDataParallel(model.eval(), find_unused_parameters=True)
    inputs, g = data(like, ROWS)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for _ in range(2):
        ddp.zero_grad()
        run(ddp, [x[rows] for x in inputs], 2 * g[rows])
    return {name: p.grad for name, p in trained(model).items()}


def half_of(kind, rank, wrap, averages=False):
    """The gradients of the second of two backward passes of this process's half of the batch, of
    the parameters that an optimizer would hold."""
    model, like = build_any(kind)
    wrapped = wrap(model.eval())  # so that batch normalisation does not see the half
    parameters = trained(model)
    inputs, g = data(like, ROWS)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for _ in range(2):
        wrapped.zero_grad()
        run(wrapped, [x[rows] for x in inputs], 2 * g[rows])  # as the gradients are averaged
    if averages or wrap is nn.parallel.DistributedDataParallel:  # which must have done so itself
        return {name: p.grad for name, p in parameters.items()}
    return {name: averaged(p.grad) for name, p in parameters.items()}


def anchored(wrap, rank=None):
    """The gradients of the first pass between anchors, and B: of this process's half of the batch,
    or of all of it. Only the sums over both halves give both the B of all."""
    model = build_kind("mlp", feedback=replace(RULE, anchor=100))
    wrapped = wrap(model)
    (x,), g = data("mlp", ROWS)
    rows = slice(None) if rank is None else slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for number in range(4):
        wrapped.zero_grad()
        error = g * (1 + number * x[:, :1])
        run(wrapped, [x[rows] + number], (1 if rank is None else 2) * error[rows])
    return gradients(model) | {name: model.feedback_matrix(name) for name in model.feedback_points}


def averaged(gradient):
    """Over the processes; what is sharded is so already, and the rest where there is no root."""
    if gradient is None:
        return None
    if isinstance(gradient, DTensor):
        return gradient.full_tensor()
    dist.all_reduce(gradient)
    return gradient / 2


def shard(model, mesh, by_block, **policy):
    """The root; with `by_block`, before it each block, but for the cut at a residual block's end:
    FSDP gathers the weights of a module when a gradient reaches its output, which there is cut."""
    blocks = (
        fastdfa.Linear, fastdfa.Conv2d, nn.TransformerEncoderLayer, nn.GRUCell, ResidualBlock
    )  # fmt: skip
    found = [m for m in model.modules() if by_block and isinstance(m, blocks)]
    for module in [*found, model]:
        inner = module.inner if isinstance(module, ResidualBlock) else module
        fully_shard(inner, mesh=mesh, **policy)
    return model


def shard_whole(model, mesh, with_root):
    """Every block, and the cut at its end with it."""
    blocks = (ResidualBlock, nn.TransformerEncoderLayer, nn.Embedding)
    for module in list(model.modules()):
        ends_cut = isinstance(module, nn.Sequential) and isinstance(
            module[-1], fastdfa.FeedbackPoint
        )
        if isinstance(module, blocks) or ends_cut:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh) if with_root else model


def finish(processes, seconds):
    """Whether they ended in that time; an exception in one is raised here."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if processes.join(timeout=1):
            return True
    return False


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    processes = torch.multiprocessing.spawn(train, (str(folder),), nprocs=2, join=False)

    def torch_works():
        return len(list(folder.glob("torch-works-*"))) == 2

    try:
        ended = finish(processes, SECONDS)
        ended = ended or (torch_works() and finish(processes, 3 * SECONDS))
    except torch.multiprocessing.ProcessRaisedException as error:
        if torch_works():
            raise
        pytest.skip(f"two processes cannot meet here: {str(error).splitlines()[-1]}")
    finally:
        for process in processes.processes:
            process.kill()
    if not torch_works():
        pytest.skip(f"two processes did not meet in {SECONDS} s: no loopback device?")
    assert ended, f"torch alone works, the networks did not finish in {3 * SECONDS} s more"
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", DDP)
def test_the_seed_is_broadcast(found, kind):
    """So every rank has the matrices of rank 0."""
    one, two = (f[kind] for f in found)
    assert one["seed"] == two["seed"] == SEEDS[0]
    for name in one["B"]:
        assert torch.equal(one["B"][name], two["B"][name])


@pytest.mark.parametrize("kind", DDP)
def test_gradients_are_those_of_the_joint_batch(found, kind):
    one, two = (f[kind] for f in found)
    assert_close(two["gradients"], one["gradients"], 0)
    joint = build(kind, 5)
    joint.load_state_dict(one["state"])
    x, target = randn(ROWS, 5), torch.arange(ROWS) % 3
    nn.functional.cross_entropy(joint(x), target).backward()
    assert_close(one["gradients"], gradients(joint))


ALONE = [*KINDS, *((k, by_block) for k in SHARDED for by_block in (False, True))]
WHOLE = [(k, "whole", with_root) for k in CUT_AT_THE_END for with_root in (False, True)]


@pytest.mark.parametrize("kind", [*ALONE, *WHOLE], ids=str)
def test_networks_have_the_gradients_of_the_joint_batch(found, kind):
    """Under DistributedDataParallel, and sharded as a whole, by blocks, or by blocks that end in a
    cut, with a root round them and without."""
    joint, like = build_any(kind if isinstance(kind, str) else kind[0])
    run(joint.eval(), *data(like, ROWS))
    for rank in (0, 1):
        assert_close(found[rank][kind], {name: p.grad for name, p in trained(joint).items()})


POLICED = [(kind, policy) for policy in POLICIES for kind in SHARDED_AS[policy]]


@pytest.mark.parametrize(("kind", "way"), [*WAYS, *POLICED])
def test_options_change_no_gradient(found, kind, way):
    """Those of DistributedDataParallel, communication hooks, a compiler around it, and FSDP2 of
    mixed precision or with its weights in the memory of the host."""
    joint, like = build_any(kind)
    run(joint.eval(), *data(like, ROWS))
    expected = {name: p.grad for name, p in trained(joint).items()}
    for rank in (0, 1):
        assert_close(found[rank][kind, way], expected, LOW.get(way, 1e-10))


@pytest.mark.parametrize("kind", TRIED)
def test_gradients_that_were_accumulated_without_synchronization(found, kind):
    joint, like = build_any(kind)
    for _ in range(2):
        run(joint.eval(), *data(like, ROWS))
    for rank in (0, 1):
        expected = {name: p.grad for name, p in trained(joint).items()}
        assert_close(found[rank][kind, "no_sync"], expected)


def test_layers_that_a_pass_does_not_use(found):
    joint, like = build_any("transformer")
    run(joint.eval(), *data(like, ROWS))
    for rank in (0, 1):
        gradients = found[rank]["with unused layers"]
        unused = [gradients.pop(f"unused.{name}") for name in ("weight", "bias")]
        assert all(gradient is None or not gradient.any() for gradient in unused)
        assert_close(gradients, {name: p.grad for name, p in trained(joint).items()})


def test_anchors_fit_b_to_the_joint_batch(found):
    joint = anchored(lambda model: model)
    for rank in (0, 1):
        assert_close(found[rank]["anchored"], joint)


def test_the_joint_batch_sees_both_halves():
    """What the test above compares is not the gradient of one half."""
    model = build("fused", 5)
    step(model, randn(ROWS, 5)[:4], randn(ROWS, 3)[:4])
    half = gradients(model)["0.weight"]
    model.zero_grad()
    step(model, randn(ROWS, 5), randn(ROWS, 3))
    assert not torch.allclose(half, gradients(model)["0.weight"])
