"""The benchmark of one core: its sides compute one and the same, and all of it is written."""

import json

import pytest

pytest.importorskip("rich")

from helpers.kernels import needs_extension
from helpers.networks import assert_close

from benchmarks.speed import mlp, one_core
from benchmarks.speed.one_core import LIBRARIES, PARTS, Case

pytestmark = needs_extension  # the benchmark measures its kernels
SIZES = [Case(7, 20, 12), Case(7, 12, 12, layers=3), Case(64, 32, 32)]


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.name)
@pytest.mark.parametrize("part", PARTS)
def test_all_libraries_make_one_product(case, part):
    steps = one_core.product_steps(case)
    results = {
        library: {str(i): matrix for i, matrix in enumerate(steps[f"{part}, {library}"]())}
        for library in LIBRARIES
    }
    assert results["torch.mm"]["0"].abs().sum() > 0
    assert len(results["torch.mm"]) == case.layers
    for library in ("fastdfa", "oneDNN"):
        assert_close(results[library], results["torch.mm"], 1e-5)


def test_rates_and_overhead_are_written_as_they_are_measured(tmp_path, monkeypatch):
    case = Case(4, 8, 8, layers=2)
    monkeypatch.setattr(one_core, "QUICK", [case])
    monkeypatch.setattr(one_core, "OVERHEAD", [mlp.Case(2, 8, 2)])
    options = ["--quick", "--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path)]
    one_core.main(options)
    written = json.loads((tmp_path / "one-core-quick.json").read_text())
    assert written["machine"]["threads"] == 1
    (row,) = written["rows"]
    assert row["case"] == case.name and not row["failed"]
    assert row["gflops"].keys() == {f"{part}, {name}" for part in PARTS for name in LIBRARIES}
    assert all(0 < rate["low"] <= rate["high"] for rate in row["gflops"].values())
    milliseconds = written["overhead"][0]["milliseconds"]
    assert list(milliseconds) == [*one_core.SIDES, one_core.OPS]
    assert all(value["median"] > 0 for value in milliseconds.values())


def test_layers_one_by_one_make_the_same_gradients_without_a_chain():
    side = one_core.overhead_steps(mlp.Case(3, 8, 2))["layers one by one"]
    model = side.forward
    passed, grads = [], []
    for looks_ahead in (model.looks_ahead, True):
        model.looks_ahead = looks_ahead
        side()  # after one pass a network that is one chain goes round its layers
        y = model(side.x)  # whose graph must live while it is walked
        passed.append(nodes(y.grad_fn))
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert "RootNodeBackward" in passed[0] and "RootNodeBackward" not in passed[1]
    assert_close(*grads, 1e-5)


def nodes(root):
    """The names of the nodes of a graph."""
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return {type(node).__name__ for node in seen}
