"""The comparison of two versions: its networks, and its arithmetic."""

import pytest
import torch
from helpers.networks import assert_close

import fastdfa
from benchmarks.speed import versions


@pytest.mark.parametrize("kind", dict.fromkeys(case.kind for case in versions.CASES))
def test_both_networks_of_a_case_are_the_same_function(kind):
    """Of torch's layers and of fastdfa's, with the same numbers forward."""
    case = versions.Case(kind, 2, 8, 3)
    torch.manual_seed(0)
    plain = versions.network(case, ours=False).eval()
    torch.manual_seed(0)
    ours = versions.network(case, ours=True).eval()
    assert not any(isinstance(m, (fastdfa.Linear, fastdfa.Conv2d)) for m in plain.modules())
    image = kind.startswith("convolutions")
    x = torch.randn(3, *((3, 32, 32) if image else (versions.INPUTS,)))
    assert_close(ours(x), plain(x), 1e-5)


def test_every_side_makes_gradients():
    steps = versions.steps_of(versions.Case("tanh", 2, 8, 3))
    assert list(steps) == ["backprop", "fastdfa", "fused backprop"]
    for step in steps.values():
        step()


def test_a_measurement_has_milliseconds_and_a_peak():
    (case,) = [versions.Case("relu, dropout", 2, 8, 3)]
    made = versions.measure(case, 0.01)
    assert list(made) == ["fastdfa", "fused backprop"]
    assert all(value > 0 for side in made.values() for value in side.values())


def test_the_comparison_takes_medians_of_speeds():
    def run(speed):
        sides = {"fastdfa": speed, "fused backprop": 1.5}
        facts = {"backprop_ms": 3.0, "peak_mib": 1.0}
        return {"a": {name: {"speed": value, **facts} for name, value in sides.items()}}

    (row,) = versions.compared([run(2.0), run(2.0), run(9.0)], [run(3.0)])
    assert (row["before"], row["now"], row["ratio"]) == (2.0, 3.0, 1.5)
    assert row["fused_backprop"] == 1.5 and row["backprop_ms"] == 3.0


def test_a_worker_that_fails_says_why(tmp_path):
    options = versions.argparse.Namespace(threads=1, seconds=0.01, only=["no such case"])
    with pytest.raises(RuntimeError, match="expected the fastdfa of"):
        versions.run(tmp_path, options)
