"""The norms as kernels equal the formulas, whatever the shapes, strides and dtypes, and their twins
in plain PyTorch equal them too."""

import pytest
import torch
from helpers.kernels import DTYPES, FROM_OUTPUT, REFUSED, needs_extension, wide
from helpers.networks import assert_close, randn
from helpers.norms import EPS, MOMENTUM, Formulas, check_batch_norm, check_layer_norm

from fastdfa import ops
from fastdfa.ops import reference

SHAPES = [(2, 1), (3, 70), (17, 33), (40, 64), (130, 100), (33, 1100)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [ops, reference])
def test_batch_norm(of, dtype, training):
    for rows, n in SHAPES:
        check_batch_norm(of, randn(rows, n, dtype=dtype) + 1, dtype, training=training)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [ops, reference])
def test_layer_norm(of, dtype):
    for rows, n in [*SHAPES, (1, 5)]:
        check_layer_norm(of, randn(rows, n, dtype=dtype) + 1, dtype)


@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_every_activation(name):
    for dtype in (torch.float32, torch.float64):
        a = randn(19, 37, dtype=dtype)
        check_batch_norm(ops, a, dtype, name=name), check_layer_norm(ops, a, dtype, name=name)


@pytest.mark.parametrize("of", [ops, reference])
def test_without_weight_and_bias(of):
    a = randn(19, 37)
    check_layer_norm(of, a, a.dtype, affine=False)
    for training in (True, False):
        check_batch_norm(of, a, a.dtype, affine=False, training=training)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", [ops, reference])
def test_parameters_in_float32(of, dtype):
    """As autocast has them: their gradients and statistics lose nothing."""
    a = randn(40, 37, dtype=dtype)
    check_layer_norm(of, a, dtype, of_vectors=torch.float32)
    for training in (True, False):
        check_batch_norm(of, a, dtype, training=training, of_vectors=torch.float32)


def test_any_strides():
    def padded(x, more=3):
        return torch.nn.functional.pad(x, (1, more), value=torch.nan)[:, 1 : 1 + x.shape[1]]

    for a in (randn(33, 40).T, randn(40, 66)[:, ::2], padded(randn(40, 33)), randn(80, 33)[::2],
              randn(1, 33).expand(40, 33)):  # fmt: skip
        check_batch_norm(ops, a, a.dtype, training=a.stride(0) != 0)
        check_layer_norm(ops, a, a.dtype)
    # Delta is overwritten where it lies, and nothing beside it.
    memory = torch.nn.functional.pad(randn(40, 33), (2, 5), value=torch.nan)
    a, delta = randn(40, 33, seed=1), memory[:, 2:35]
    right = Formulas.of(a, 0)
    wanted, _ = right.backward(delta, None)
    ops.batch_norm_backward_(delta, delta.sum(0), a, right.mean, right.rstd, None, True)
    assert_close(delta, wanted)
    right = Formulas.of(a, 1)
    wanted, _ = right.backward(delta, None)
    ops.layer_norm_backward_(delta, a, right.mean, right.rstd, None)
    assert_close(delta, wanted)
    assert memory[:, :2].isnan().all() and memory[:, 35:].isnan().all()


def test_parameters_of_any_strides():
    a, strided = randn(19, 7), [randn(7, 3, seed=i).abs()[:, 1] for i in range(4)]
    copies = [x.contiguous() for x in strided]
    found = ops.batch_norm(a, *strided, True, MOMENTUM, EPS, 1)
    for actual, wanted in zip(
        found, ops.batch_norm(a, *copies, True, MOMENTUM, EPS, 1), strict=True
    ):
        assert torch.equal(actual, wanted)
    for actual, wanted in zip(strided, copies, strict=True):
        assert torch.equal(actual, wanted)


def test_running_statistics_may_be_missing():
    a = randn(19, 7)
    h, mean, _ = ops.batch_norm(a, None, None, None, None, True, MOMENTUM, EPS)
    assert_close(h, Formulas.of(a, 0).normalised)
    assert_close(mean, a.mean(0))


@pytest.mark.parametrize("of", [ops, reference])
def test_a_mean_that_is_large_beside_the_deviation(of):
    """Both are as exact as float32 can hold them; torch's are not closer."""
    for rows in (2, 17, 5000):
        a = (randn(rows, 40) + 1e4).float()
        exact = a.double()
        right = Formulas.of(exact, 0)
        h, mean, rstd = of.batch_norm(a, None, None, None, None, True, MOMENTUM, EPS, 0, 0.0)
        by_torch, torch_mean, torch_rstd = torch.native_batch_norm(
            a, None, None, None, None, True, MOMENTUM, EPS
        )
        for actual, theirs, wanted in (
            (h, by_torch, right.normalised), (mean, torch_mean, right.mean),
            (rstd, torch_rstd, right.rstd),
        ):  # fmt: skip
            theirs = (theirs - wanted).norm()
            assert (actual - wanted).norm() <= 1.5 * theirs + 3e-7 * wanted.norm()


def test_one_value_unlike_all_others():
    """The squares of all deviations from the first value would cancel."""
    a = torch.zeros(4096, 3)
    a[0, 1], a[-1, 2] = 1, 1
    _, mean, rstd = ops.batch_norm(a, None, None, None, None, True, MOMENTUM, 0.0)
    variance = (1 / 4096) * (4095 / 4096)
    assert ((mean[1:] - 1 / 4096).abs() < 1e-7).all()
    assert_close(1 / rstd[1:] ** 2, torch.full((2,), variance), 1e-5)


def test_nothing():
    empty = torch.empty(0, 5)
    ones = torch.ones(5)
    h, mean, rstd = ops.batch_norm(empty, None, None, ones, ones, False, MOMENTUM, EPS, 1)
    assert h.shape == (0, 5) and torch.equal(mean, ones) and rstd.shape == (5,)
    found = ops.batch_norm_backward_(empty, torch.zeros(5), empty, mean, rstd, None, False)
    assert not any(x.any() for x in found)
    h, mean, rstd = ops.layer_norm(empty, ones, None, EPS)
    assert h.shape == (0, 5) and mean.shape == rstd.shape == (0,)
    assert not any(x.any() for x in ops.layer_norm_backward_(empty, empty, mean, rstd, ones))
    none = torch.empty(5, 0)
    nothing = torch.empty(0)
    assert ops.batch_norm(none, None, None, None, None, True, MOMENTUM, EPS)[0].shape == (5, 0)
    ops.batch_norm_backward_(none, nothing, none, nothing, nothing, None, True)


def test_nan_and_inf_stay_in_their_column_or_row():
    for bad in (float("nan"), float("inf")):
        a = randn(19, 33)
        a[4, 2] = bad
        h, *_ = ops.batch_norm(a, None, None, None, None, True, MOMENTUM, EPS)
        assert h.isnan()[:, 2].all() and h[:, [0, 1, *range(3, 33)]].isfinite().all()
        h, *_ = ops.layer_norm(a, None, None, EPS)
        assert h.isnan()[4].all() and h[[*range(4), *range(5, 19)]].isfinite().all()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_results_do_not_depend_on_the_threads(dtype):
    a, found = randn(700, 1300, dtype=dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        delta, other = (randn(700, 1300, seed=1, dtype=dtype) for _ in range(2))
        h, mean, rstd = ops.batch_norm(a, None, None, None, None, True, MOMENTUM, EPS)
        sums = delta.sum(0, dtype=wide(dtype))
        made = ops.batch_norm_backward_(delta, sums, a, mean, rstd, None, True)
        found.append([h, mean, rstd, delta, *made])
        h, mean, rstd = ops.layer_norm(a, None, None, EPS)
        found[-1] += [h, mean, rstd, other, *ops.layer_norm_backward_(other, a, mean, rstd, None)]
    torch.set_num_threads(2)
    for others in found[1:]:
        assert all(map(torch.equal, others, found[0]))


def arguments_of_batch_norm():
    a, n = randn(4, 3), [torch.ones(3, dtype=torch.float64) for _ in range(4)]
    return dict(a=a, weight=n[0], bias=n[1], running_mean=n[2], running_var=n[3], training=True,
                momentum=MOMENTUM, eps=EPS, kind=1, param=0.0)  # fmt: skip


@pytest.mark.parametrize("changes, words", [
    (dict(a=torch.ones(3)), "a must have two dimensions"),
    (dict(a=torch.ones(4, 3, dtype=torch.int64)), "a must be torch.float32"),
    (dict(weight=torch.ones(4, dtype=torch.float64)), r"weight must have shape \[3\]"),
    (dict(bias=torch.ones(3, 1, dtype=torch.float64)), r"bias must have shape \[3\]"),
    (dict(running_mean=torch.ones(3, dtype=torch.float16)), "running_mean must be torch.float64"),
    (dict(running_var=None), "must both be given, or none"),
    (dict(running_mean=None, running_var=None, training=False), "where training is false"),
    (dict(kind=7), "kind must be 0 to 6"),
    (dict(a=torch.ones(1, 3, dtype=torch.float64)),
     r"^Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 3\]"),
])  # fmt: skip
def test_batch_norm_refuses(changes, words):
    with pytest.raises((TypeError, ValueError), match=words):
        ops.batch_norm(**arguments_of_batch_norm() | changes)


@pytest.mark.parametrize("changes, words", [
    (dict(a=torch.ones(4, 0)), "a must have columns"),
    (dict(a=torch.ones(4, 3, 2)), "a must have two dimensions"),
    (dict(weight=torch.ones(2)), r"weight must have shape \[3\]"),
    (dict(bias=torch.ones(3, dtype=torch.int64)), "bias must be torch.float32"),
    (dict(kind=-1), "kind must be 0 to 6"),
])  # fmt: skip
def test_layer_norm_refuses(changes, words):
    arguments = dict(a=torch.ones(4, 3), weight=None, bias=None, eps=EPS, kind=1, param=0.0)
    with pytest.raises((TypeError, ValueError), match=words):
        ops.layer_norm(**arguments | changes)


@pytest.mark.parametrize("changes, words", [
    (dict(a=torch.ones(4, 2)), r"a must have shape \(4, 3\)"),
    (dict(a=torch.ones(4, 3, dtype=torch.float64)), "a must be torch.float32"),
    (dict(delta=torch.ones(3, 4).T), "delta must have contiguous rows"),
    (dict(mean=torch.ones(2)), "mean must have shape"),
    (dict(rstd=torch.ones(2)), "rstd must have shape"),
    (dict(weight=torch.ones(2)), r"weight must have shape \[3\]"),
])  # fmt: skip
def test_the_backward_refuses(changes, words):
    arguments = dict(delta=torch.ones(4, 3), a=torch.ones(4, 3), weight=None) | changes
    of_rows = dict(mean=torch.ones(4), rstd=torch.ones(4))
    with pytest.raises((TypeError, ValueError), match=words):
        ops.layer_norm_backward_(**of_rows | arguments)
    of_columns = dict(mean=torch.ones(3), rstd=torch.ones(3), delta_sums=torch.ones(3))
    with pytest.raises((TypeError, ValueError), match=words):
        ops.batch_norm_backward_(**of_columns | arguments, training=True)


def test_no_argument_is_changed_where_another_is_refused():
    arguments = arguments_of_batch_norm() | dict(weight=torch.ones(4))
    with pytest.raises(REFUSED):
        ops.batch_norm(**arguments)
    assert torch.equal(arguments["running_mean"], torch.ones(3))
