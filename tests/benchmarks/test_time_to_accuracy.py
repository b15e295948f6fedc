"""The benchmark of time to an accuracy: every side trains the same network on the same batches."""

import json

import pytest
import torch
from helpers.networks import assert_close

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks.accuracy import time_to_accuracy as benchmark
from benchmarks.accuracy.time_to_accuracy import SIDES, TASKS, ByHand, best_rate, reached
from benchmarks.harness.figures.training import seconds_to

SMALL = TASKS["digits"]._replace(
    targets=(0.5, 0.8, 1.1), epochs=3, options=f"{TASKS['digits'].options} --width 32"
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(TASKS, "digits", SMALL)
    return SMALL


def options(*line):
    return benchmark.arguments(["digits", *line])


def learner(side, seed=0):
    kind, method = SIDES[side]
    config = benchmark.configured("digits", options(), "--seed", str(seed), "--lr", "0.001")
    return kind(method, config, benchmark.loaded(config))


def weights(of):
    return {f"{i}": p.detach().clone() for i, p in enumerate(of.model.parameters())}


def test_the_loop_learns_what_fastdfa_does(small):
    """An epoch with dropout: the same weights, to float32's rounding, which Adam makes larger."""
    loop, fast = learner("PyTorch DFA loop"), learner("fastdfa")
    before = weights(loop)
    assert_close(before, weights(fast), 0)
    for each in (loop, fast):
        each.train_epoch(1, lambda method: None)
    assert_close(weights(loop), weights(fast), 1e-3)
    assert all((before[k] - after).norm() > 0.01 for k, after in weights(loop).items())
    other = learner("PyTorch DFA loop", seed=1)
    assert not torch.equal(before["0"], weights(other)["0"])


def test_the_loop_has_the_matrix_of_fastdfa(small):
    loop, fast = learner("PyTorch DFA loop"), learner("fastdfa")
    assert isinstance(loop, ByHand)
    fast.model(fast.data.train_x[:2])
    matrix = fast.model.feedback_matrix(fast.model.feedback_points[-1])
    assert torch.equal(loop.loop.feedback, matrix)


def test_when_a_target_is_reached():
    curve = [{"accuracy": accuracy} for accuracy in (0.5, 0.9, 0.8, 0.95)]
    assert [reached(curve, target) for target in (0.4, 0.9, 0.91, 0.96)] == [1, 2, 4, None]


def test_the_best_rate():
    """First how many targets it reaches, then how soon, then how far it gets."""
    curves = {1: [0.5, 0.9, 0.9], 2: [0.9, 0.5, 0.91], 3: [0.7, 0.7, 0.99], 4: [0.6, 0.7, 0.98]}
    rows = [{"method": "bp", "lr": lr, "accuracies": curve} for lr, curve in curves.items()]
    assert best_rate(rows, "bp", (0.6, 0.9)) == 2
    assert best_rate(rows, "bp", (0.8, 0.95)) == 3
    assert best_rate(rows, "bp", (0.995,)) == 3
    assert best_rate([*rows, {"method": "dfa", "lr": 9, "accuracies": [1]}], "bp", (0.6, 0.9)) == 2


def test_rates_are_chosen_and_times_measured(small, tmp_path):
    where = ["--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="with --rates"):
        benchmark.main(["digits", *where])
    benchmark.main(["digits", "--rates", *where])
    rates = json.loads((tmp_path / "rates-digits.json").read_text())["rows"]
    assert len(rates) == 2 * len(benchmark.RATES)
    for seeds, found in (("0,1", [0, 1]), ("1,2", [0, 1, 2])):  # adds to what is there
        benchmark.main(["digits", "--seeds", seeds, "--no-compile", *where])
        rows = json.loads((tmp_path / "accuracy-digits.json").read_text())["rows"]
        assert [row["seed"] for row in rows] == [seed for seed in found for _ in range(3)]
    for row in rows:
        seconds = [point["seconds"] for point in row["epochs"]]
        assert len(seconds) == small.epochs and seconds == sorted(seconds) and seconds[0] > 0
        assert row["reached"][-1] is None  # no accuracy is above 1
        assert row["lr"] == best_rate(rates, SIDES[row["side"]][1], small.targets)
    assert any(row["reached"][0] for row in rows)
    assert (tmp_path / "accuracy-digits.png").stat().st_size > 1000


def test_warming_up_meets_every_size_of_batch(small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    compiled, sizes = learner("backprop compiled"), []
    compiled.model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
    assert compiled.warm_up() > 0
    assert sizes == [128, 1437 % 128]
    assert all(p.grad is None for p in compiled.model.parameters())


@pytest.mark.slow  # compiles
def test_compiled_backprop_learns_what_backprop_does(small, monkeypatch):
    """On batches of one size, a third of the digits, so that one graph is compiled."""
    without_dropout = small.options.replace("--input-dropout 0.1", "--input-dropout 0")
    without_dropout = without_dropout.replace("--batch 128", "--batch 479")
    monkeypatch.setitem(TASKS, "digits", small._replace(options=without_dropout))
    plain, compiled = learner("backprop"), learner("backprop compiled")
    assert compiled.warm_up() > 0
    assert_close(weights(compiled), weights(plain), 0)  # nothing is learned by warming up
    for each in (plain, compiled):
        each.train_epoch(1, lambda method: None)
    assert_close(weights(compiled), weights(plain), 1e-3)


def test_a_side_ends_at_its_last_target(small, monkeypatch):
    task = small._replace(targets=(0.1,), epochs=5)
    curves = benchmark.run({"backprop": learner("backprop")}, task, "digits")
    assert len(curves["backprop"]) == next(
        n for n, point in enumerate(curves["backprop"], 1) if point["accuracy"] >= 0.1
    )


def test_what_the_readme_says_of_seeds():
    """The mean over seeds that all reach the target; else how many do not."""
    row = {"epochs": [{"seconds": 2.0}, {"seconds": 5.0}], "reached": [1, 2, None]}
    other = {"epochs": [{"seconds": 3.0}, {"seconds": 6.0}], "reached": [2, 2, 2]}
    assert seconds_to([row, other], 0) == ("4.0 s (1.5)", 4.0)
    assert seconds_to([row, other], 1) == ("5.5 s (2.0)", 5.5)
    assert seconds_to([row, other], 2) == ("not in 1 of 2 runs", None)
