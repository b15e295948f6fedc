"""Two processes with DistributedDataParallel (contract 6, 7 and 8)."""

import socket

import pytest
import torch
import torch.distributed as dist
from networks import assert_close, gradients, mlp, randn, step
from torch import nn

import fastdfa

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
    ),
]

ROWS, SEEDS = 8, (11, 22)


def build(kind, seed):
    torch.manual_seed(seed)  # every process starts with other weights and another seed
    rule = fastdfa.Feedback(seed=seed, shared=kind != "separate")
    if kind == "general":
        layers = [fastdfa.Linear(5, 8, activation="tanh"), nn.LayerNorm(8), nn.ReLU()]
        return fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(8, 3)).double(), feedback=rule)
    return mlp([5, 8, 7, 3], feedback=rule)


def train(rank, address, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found = {}
    for kind in ("fused", "general", "separate"):
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
    torch.save(found, f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = tmp_path_factory.mktemp("ddp")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    torch.multiprocessing.spawn(train, (address, str(results)), nprocs=2)
    return [torch.load(results / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["fused", "general", "separate"])
def test_the_seed_is_broadcast(found, kind):
    """So every rank has the matrices of rank 0."""
    one, two = (f[kind] for f in found)
    assert one["seed"] == two["seed"] == SEEDS[0]
    for name in one["B"]:
        assert torch.equal(one["B"][name], two["B"][name])


@pytest.mark.parametrize("kind", ["fused", "general", "separate"])
def test_gradients_are_those_of_the_joint_batch(found, kind):
    one, two = (f[kind] for f in found)
    assert_close(two["gradients"], one["gradients"], 0)
    joint = build(kind, 5)
    joint.load_state_dict(one["state"])
    x, target = randn(ROWS, 5), torch.arange(ROWS) % 3
    nn.functional.cross_entropy(joint(x), target).backward()
    assert_close(one["gradients"], gradients(joint))


def test_the_joint_batch_sees_both_halves():
    """What the test above compares is not the gradient of one half."""
    model = build("fused", 5)
    step(model, randn(ROWS, 5)[:4], randn(ROWS, 3)[:4])
    half = gradients(model)["0.weight"]
    model.zero_grad()
    step(model, randn(ROWS, 5), randn(ROWS, 3))
    assert not torch.allclose(half, gradients(model)["0.weight"])
