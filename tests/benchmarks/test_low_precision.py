"""The benchmark of low precision: the range of the deltas holds; int8 is off by its rounding."""

import json
from functools import partial

import pytest
import torch

pytest.importorskip("rich")

from helpers.formulas import Layer, mlp_forward, mlp_gradients
from helpers.networks import assert_close, difference, randn

from benchmarks.speed import low_precision, mlp
from benchmarks.speed.low_precision import LEVELS, SCHEMES, Network

WIDTHS = [6, 40, 24, 3]


def batch(rows=32):
    return randn(rows, WIDTHS[0]).float(), torch.arange(rows) % WIDTHS[-1]


def by_hand(network, x, y):
    """The gradients of `Network.gradients`, in float64."""
    layers = [Layer(p.weight.detach(), p.bias.detach(), "tanh") for p in network.layers]
    layers[-1] = layers[-1]._replace(activation="none")
    error = mlp_forward(layers, x)[0][-1].softmax(1)
    error[range(len(y)), y] -= 1
    feedback = [
        s * network.feedback[:, :n] for s, n in zip(network.scales, WIDTHS[1:-1], strict=True)
    ]
    return [g for pair in mlp_gradients(layers, x, error / len(y), feedback) for g in pair]


@pytest.mark.parametrize("scheme, tolerance", [
    ("float32", 1e-6), ("bfloat16", 1e-2), ("int8, one scale", 5e-2),
    ("int8, a scale per unit", 4e-2),
])  # fmt: skip
def test_gradients_are_near_the_formulas(scheme, tolerance):
    network = Network(WIDTHS, 0, 4.0)
    x, y = batch()
    got = network.gradients(x, y, *SCHEMES[scheme])
    expected = by_hand(network, x, y)
    assert len(got) == len(expected) == len(network.parameters)
    for grad, exact, parameter in zip(got, expected, network.parameters, strict=True):
        assert grad.dtype == torch.float32 and grad.shape == parameter.shape
        assert_close(grad, exact, tolerance)


def test_no_delta_is_above_its_range():
    """Which is reached where a row of e lies in the direction of a column of B, and f' is 1."""
    network = Network(WIDTHS, 0, 4.0)
    error, h = randn(500, 3).float(), torch.zeros(500, WIDTHS[1])
    error[7] = network.feedback[:, 5]
    error[7] *= error.norm(dim=1).max() / error[7].norm()
    delta, _, bound = network.deltas(error, 0, h)
    assert bound.shape == (WIDTHS[1],)
    assert (delta.abs() <= bound * (1 + 1e-6)).all()
    assert_close(delta[7, 5], bound[5], 1e-6)
    rounded = low_precision.rounded(delta.bfloat16(), bound / LEVELS)
    assert rounded.abs().max() == rounded[7, 5] == LEVELS


@pytest.mark.parametrize("per_unit", [False, True])
def test_int8_is_off_by_half_a_unit_of_each_factor(per_unit):
    delta, h = randn(64, 20).float() / 9, randn(64, 30, seed=1).float().tanh()
    delta *= torch.logspace(-2, 0, 20)  # columns of different ranges
    bound = delta.abs().amax(0)
    got = low_precision.int8(delta, h, bound, 1.0, per_unit)
    unit, unit_h = (bound if per_unit else bound.max()) / LEVELS, 1 / LEVELS
    # |a b - a' b'| <= |a| |b - b'| + |b'| |a - a'|, with |b'| <= 1, summed over rows.
    most = delta.abs().sum(0) * unit_h / 2 + len(delta) * unit / 2
    error = (got.double() - delta.double().T @ h.double()).abs()
    assert (error <= 1.0001 * most.view(-1, 1)).all()
    # Independent errors, each uniform on a unit: of this deviation, and small columns worse off.
    variance = delta.square().sum(0) * unit_h**2 + h.square().mean() * len(h) * unit**2
    assert difference(error.square().mean(1).sqrt(), (variance / 12).sqrt()) < 0.3


def test_an_error_of_zero_gives_gradients_of_zero():
    zero = torch.zeros(8, 16)
    assert not low_precision.int8(zero, torch.ones(8, 24), zero[0], 1.0).any()


def test_the_step_that_is_timed_is_the_one_that_trains(monkeypatch):
    """But for the compiled roundings, which are not compiled here; and int8 products are made."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    steps = low_precision.int8_steps((2, 64, 32))
    products, int_mm = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *pair: products.append(pair) or int_mm(*pair))
    made = {name: run() for name, run in steps.items()}
    assert len(products) == 4 and all(len(grads) == 6 for grads in made.values())
    near = partial(low_precision.difference, exact=made["ops, bfloat16"])
    assert 0 < near(made["int8"]) < 0.1


def test_float16_by_torch_does_not_widen(monkeypatch):
    asked = []
    monkeypatch.setattr(low_precision.gemm, "widens", lambda *matrices: asked.append(1))
    steps = low_precision.float16_steps((2, 64, 32))
    steps["fastdfa, float16 by torch"]()
    assert not asked
    steps["fastdfa, float16"]()
    assert asked


@pytest.mark.parametrize("part", ["steps", "float16", "accuracy"])
def test_what_is_measured_is_written(part, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    options = [part, "--quick", "--rounds", "2"]
    options += ["--seconds", "0.001", "--seeds", "1", "--out", str(tmp_path)]
    low_precision.main(options)
    rows = json.loads((tmp_path / f"low-precision-{part}-quick.json").read_text())["rows"]
    if part == "accuracy":
        assert [row["scheme"] for row in rows] == list(SCHEMES)
        assert all(len(row["errors"]) == 1 and row["errors"][0] < 50 for row in rows)
        assert rows[0]["difference"] == 0 and rows[2]["difference"] > 0
        return
    (row,) = rows
    assert row["case"] == mlp.Case(*low_precision.QUICK_SIZES[0]).name
    assert row["to_float32"]["fastdfa, float32"]["median"] == 1
    assert all(value["median"] > 0 for value in row["milliseconds"].values())
