"""The benchmark of norms and activations as modules: its sides are one network, all is written."""

import json

import pytest

pytest.importorskip("rich")

from helpers.networks import assert_close

from benchmarks.harness.timing import FUSED
from benchmarks.speed import recipe


@pytest.mark.parametrize("norm", recipe.NORMS)
def test_the_sides_of_one_method_have_the_same_gradients(norm):
    steps = recipe.steps_of(recipe.Case(2, 8, 6, norm), compiled=False)
    assert list(steps) == ["backprop", FUSED, "layers one by one", "fastdfa"]
    grads = {}
    for name, step in steps.items():
        step(), step()
        grads[name] = {str(i): p.grad for i, p in enumerate(step.parameters)}
    called, fused, true = (grads[name] for name in ("layers one by one", "fastdfa", "backprop"))
    uncut = grads[FUSED]
    # Biases in front of a batch norm, whose gradients are rounding.
    left_out = {"1", "5"} if "batch" in norm else set()
    for key in fused.keys() - left_out:
        assert_close(fused[key], called[key], 1e-5)
        assert_close(uncut[key], true[key], 1e-5)
    head = list(true)[-2:]
    assert_close({k: fused[k] for k in head}, {k: true[k] for k in head}, 1e-5)
    assert steps["fastdfa"].forward(steps["fastdfa"].x).grad_fn.name() == "SegmentNodeBackward"
    called = steps["layers one by one"]
    assert called.forward(called.x).grad_fn.name() != "SegmentNodeBackward"


def test_steps_are_written_as_they_are_measured(tmp_path, monkeypatch):
    case = recipe.Case(2, 8, 6)
    monkeypatch.setattr(recipe, "QUICK", [case])
    options = ["--quick", "--no-compile", "--rounds", "2"]
    options += ["--seconds", "0.001", "--out", str(tmp_path)]
    recipe.main(options)
    (row,) = json.loads((tmp_path / "recipe-quick.json").read_text())["rows"]
    assert row["case"] == case.name and not row["failed"]
    assert list(row["milliseconds"]) == ["backprop", FUSED, "layers one by one", "fastdfa"]
    assert row["to_fused"][FUSED]["median"] == 1
    assert all(value["median"] > 0 for value in row["milliseconds"].values())
    assert row["to_backprop"]["backprop"]["median"] == 1
