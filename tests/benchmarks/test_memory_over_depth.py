"""The benchmark of memory over depth: its sides are one network, and all of it is written."""

import json

import pytest
import torch
from helpers.networks import assert_close

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.harness.figures.memory import memory_table
from benchmarks.speed import memory
from benchmarks.speed.memory import Case, steps_of


def test_checkpointing_and_updates_in_backward_train_what_backprop_does():
    """By SGD with momentum, over two steps."""
    steps = steps_of(Case(4, 8, 6), "cpu")
    sides = ["backprop", "checkpointed", "checkpointed, updates in backward"]
    models = [steps[name].step.model for name in sides]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    before = {name: p.clone() for name, p in models[0].named_parameters()}
    for name in sides * 2:
        steps[name]()
    trained, *others = (dict(model.named_parameters()) for model in models)
    assert all(not torch.equal(before[name], p) for name, p in trained.items())
    for other in others:
        assert_close(other, trained, 1e-5)


@pytest.mark.parametrize("more", [[], ["--one-pass"]])
def test_memory_is_written_as_it_is_measured(tmp_path, monkeypatch, more):
    monkeypatch.setattr(memory, "QUICK", [Case(2, 16, 8), Case(4, 16, 8)])
    options = ["--quick", "--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path)]
    memory.main([*options, *more])
    name = "memory-one-pass-quick" if more else "memory-quick"
    results = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["depth"] for row in results["rows"]] == [2, 4] and results["narrow"] == []
    for row in results["rows"]:
        assert not row["failed"] and row["peak_mib"].keys() == row["to_backprop"].keys()
        assert {"backprop", "fastdfa", "streaming"} <= row["peak_mib"].keys()
    if not more:
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert memory_table(results, "here").count("| 2x16 / 8 |") == 1
