"""The benchmark of every kind of network: its sides do the same work, which it counts right."""

import json
from itertools import pairwise

import pytest
import torch

pytest.importorskip("rich")

from helpers.kernels import needs_extension
from helpers.networks import assert_close

from benchmarks.harness.timing import FUSED
from benchmarks.speed import kinds
from benchmarks.speed.kinds import SWEEP, data_of, network, operations, steps_of

FEW = 2  # samples
# In plain PyTorch the projection e B is a product like any other, and is counted.
counts_no_projection = needs_extension


@pytest.fixture(scope="module", params=SWEEP, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def steps(case):
    made = steps_of(case, compiled=False, batch=FEW)
    for step in made.values():
        step()
    return made


@counts_no_projection
def test_the_sides_do_the_same_work(case, steps):
    """The limit makes the products of DFA, which are those of backprop without some."""
    counts = {name: operations(step) for name, step in steps.items()}
    assert counts["fastdfa"] == counts["limit"] < counts["backprop"]
    for side in ("backprop", FUSED, "fastdfa", "limit"):
        assert all(p.grad is not None for p in steps[side].parameters), side


def test_fused_backprop_has_the_gradients_of_backprop(case, steps):
    """In evaluation mode, as batch norm of two samples makes rounding large."""
    grads = {}
    for name in ("backprop", FUSED):
        step = steps[name]
        step.model.eval()
        step()
        grads[name] = torch.cat([p.grad.flatten() for p in step.parameters])
        step.model.train()
    assert_close(grads[FUSED], grads["backprop"], 1e-4)


def test_the_limit_is_cut_where_dfa_is(case, steps):
    data, x, _ = data_of(case, FEW, "cpu")
    model = network(case, data, dfa=True)
    model(x)
    assert len(steps["limit"].cuts) == len(model.feedback_points)


@counts_no_projection
def test_operations_of_an_mlp():
    """Backprop: forward, weights, inputs of all layers but the first; DFA: the first two."""
    widths = [784, 1024, 1024, 1024, 1024, 10]
    products = [2 * FEW * n * m for n, m in pairwise(widths)]
    steps = steps_of(SWEEP[0], compiled=False, batch=FEW)
    assert operations(steps["fastdfa"]) == 2 * sum(products)
    assert operations(steps["backprop"]) == 3 * sum(products) - products[0]


def test_operations_of_a_sparse_product():
    """Two for each entry of the matrix and column of the other, forward and backward."""
    sparse = torch.eye(50).to_sparse_coo()
    x = torch.randn(50, 3, requires_grad=True)
    assert operations(lambda: torch.sparse.mm(sparse, x).sum().backward()) == 2 * (2 * 50 * 3)


def test_operations_of_attention():
    """Two products forward, five backward, as torch counts them on a GPU."""
    q, k, v = (torch.randn(2, 4, 8, 16, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    product = 2 * (2 * 4) * 8 * 8 * 16
    assert operations(lambda: attend(q, k, v).sum().backward()) == 7 * product


@counts_no_projection
def test_a_network_is_written_as_it_is_measured(tmp_path, monkeypatch, capsys):
    small = [SWEEP[5]._replace(batch=FEW, depth=1), SWEEP[7]]
    monkeypatch.setattr(kinds, "QUICK", small)
    options = ["--quick", "--rounds", "2"]
    options += ["--seconds", "0.001", "--no-compile", "--out", str(tmp_path)]
    kinds.main(options)
    rows = json.loads((tmp_path / "kinds-quick.json").read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in small]
    for row in rows:
        assert row["bound"] > 1 and row["peak_mib"]["fastdfa"] > 0 and not row["failed"]
        assert {"backprop", FUSED, "fastdfa", "limit"} <= row["to_backprop"].keys()
