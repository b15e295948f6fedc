"""The kernels as functions equal the formulas, whatever the shapes, strides and dtypes, and their
twins in plain PyTorch equal them too (contract 9 and 10)."""

import itertools
import math

import pytest
import torch
from helpers.formulas import ACTIVATIONS, DISTRIBUTIONS, unit_feedback
from helpers.kernels import (
    DTYPES,
    EXTENSION,
    FROM_OUTPUT,
    KINDS,
    REFUSED,
    Case,
    needs_extension,
    samples,
    saved_and_derivative,
    wide,
)
from helpers.networks import assert_close, randn

import fastdfa
from fastdfa.ops import reference


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_project_gate_of_every_kind(name, dtype, dense):
    Case(37, 10, [29, 70], [name, name], dtype, dense=dense).check()


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 129])
@pytest.mark.parametrize("classes", [1, 3, 10, 64])
def test_project_gate_of_odd_sizes(rows, classes, dense):
    for dtype in (torch.float64, torch.float32):
        Case(rows, classes, [1, 15, 16, 67, 130], ["tanh"] * 5, dtype, dense=dense).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("classes", [100, 1000, 1023])
def test_project_gate_of_many_classes(classes, dense, dtype):
    Case(17, classes, [33, 64], ["relu", "gelu"], dtype, dense=dense).check()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sum_error", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_project_gate_of_every_rule(dense, sum_error, shared, distribution):
    for dtype in (torch.float64, torch.float32):
        Case(
            21, 9, [18, 40, 7], ["tanh", "silu", "none"], dtype,
            dense=dense, sum_error=sum_error, shared=shared, distribution=distribution,
        ).check()  # fmt: skip


@pytest.mark.parametrize("rows, classes, width", list(itertools.product([0, 3], [0, 4], [0, 5])))
@pytest.mark.parametrize("dense", [True, False])
def test_project_gate_of_nothing(dense, rows, classes, width):
    """A sum over no classes or no rows is zero."""
    case = Case(rows, classes, [width, 6], ["tanh", "relu"], dense=dense)
    deltas, sums = fastdfa.ops.project_gate(*case.arguments(), **case.keywords())
    assert [d.shape for d in deltas] == [(rows, width), (rows, 6)]
    assert [s.shape for s in sums] == [(width,), (6,)]
    if rows == 0 or classes == 0:
        assert not any(t.any() for t in (*deltas, *sums))


def test_project_gate_of_no_layers():
    assert fastdfa.ops.project_gate(randn(3, 4), [], [], [], [], []) == ([], [])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [True, False])
def test_project_gate_of_any_strides(dense, dtype):
    """Transposed, sliced and broadcast errors, saved tensors and matrices."""

    def transposed(t):
        return t.T.contiguous().T

    def sliced(t):
        big = torch.full((2 * t.shape[0] + 1, 3 * t.shape[1] + 2), float("nan"), dtype=t.dtype)
        view = big[1::2, 2::3][: t.shape[0], : t.shape[1]]
        return view.copy_(t)

    def padded(t):
        big = torch.full((t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype)
        big[:, : t.shape[1]] = t
        return big[:, : t.shape[1]]

    def offset(t):
        big = torch.empty(t.numel() + 1, dtype=t.dtype)
        return big[1:].view_as(t).copy_(t)  # not aligned to a vector

    for change in (transposed, sliced, padded, offset):
        case = Case(19, 10, [33, 21], ["tanh", "gelu"], dtype, dense=dense)
        case.error = change(case.error)
        case.saved = [change(h) for h in case.saved]
        case.matrices = [(padded if change is not offset else offset)(B) for B in case.matrices]
        case.check()


def test_project_gate_of_a_broadcast_error():
    case = Case(19, 10, [33], ["tanh"])
    case.error = randn(1, 10).expand(19, 10)
    case.check()
    case.error = torch.full((), 0.25, dtype=torch.float64).expand(19, 10)
    case.check()


@pytest.mark.parametrize("dense", [True, False])
def test_project_gate_does_not_read_what_the_identity_saved(dense):
    """It may be a tensor that holds no memory: it gives shape and dtype."""
    case = Case(19, 10, [33, 8], ["none", "tanh"], dense=dense)
    case.saved[0] = torch.full((), float("nan"), dtype=torch.float64).expand(19, 33)
    case.check()


def test_project_gate_takes_the_first_columns_of_a_wider_matrix():
    case = Case(19, 10, [33, 8], ["tanh", "tanh"])
    case.matrices = [unit_feedback(case.seed, 10, 50, "normal")]
    case.check()


@pytest.mark.parametrize("error_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_gate_of_an_error_of_another_dtype(dtype, error_dtype):
    case = Case(19, 10, [33, 8], ["tanh", "relu"], dtype)
    case.error = case.error.to(error_dtype)
    case.check()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_project_gate_of_a_matrix_in_the_dtype_of_the_layers(dtype, shared):
    """Only B is rounded to it: the product is accumulated in float32."""
    case = Case(19, 100, [33, 8], ["tanh", "gelu"], dtype, shared=shared)
    case.matrices = [B.to(dtype) for B in case.matrices]
    case.check()
    found = reference.project_gate(*case.schema_arguments())
    for delta, right in zip(found[:2], case.expected()[0], strict=True):
        assert_close(delta, right, DTYPES[dtype])


def test_project_gate_ignores_tf32_on_the_cpu():
    case = Case(19, 100, [33, 8], ["tanh", "gelu"], torch.float32)
    exact = fastdfa.ops.project_gate(*case.arguments(), **case.keywords())
    found = fastdfa.ops.project_gate(*case.arguments(), **case.keywords(), allow_tf32=True)
    for a, b in zip((*found[0], *found[1]), (*exact[0], *exact[1]), strict=True):
        assert torch.equal(a, b)


def test_project_gate_scales_in_the_accumulator():
    """2^-14 e, 2^-14 scale, 2^12 rows: e B scale is flushed by fp16, their sum is not."""
    error = torch.full((4096, 1), 2.0**-14, dtype=torch.float16)
    saved = [torch.zeros(4096, 4, dtype=torch.float16)]
    B = torch.ones(1, 4)
    (delta,), (total,) = fastdfa.ops.project_gate(
        error, [B], saved, [0], [0.0], [2.0**-14], sum_error=True
    )
    assert (delta == 2.0**-16).all()
    assert_close(total, torch.full((4,), 2.0**-4), 1e-6)


def test_project_gate_accumulates_wide():
    """1000 terms of 1 and a bias gradient over 5000 rows are exact in fp32, not in bf16."""
    error = torch.ones(5000, 1000, dtype=torch.bfloat16)
    saved = [torch.zeros(5000, 3, dtype=torch.bfloat16)]
    B = torch.ones(1000, 3)
    B[0, 0] = 2
    (delta,), (total,) = fastdfa.ops.project_gate(error, [B], saved, [0], [0.0], [1 / 1001])
    assert delta[0, 0] == 1
    assert_close(total, torch.tensor([5000, 5e6 / 1001, 5e6 / 1001]), 1e-4)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gradients_do_not_depend_on_the_threads(dtype, dense):
    case = Case(1000, 10, [130, 64], ["tanh", "relu"], dtype, dense=dense)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(fastdfa.ops.project_gate(*case.arguments(), **case.keywords()))
    torch.set_num_threads(2)
    if EXTENSION:
        for deltas, sums in found[1:]:
            for a, b in zip((*deltas, *sums), (*found[0][0], *found[0][1]), strict=True):
                assert torch.equal(a, b)


def test_project_gate_lets_nan_and_inf_through():
    for bad in (float("nan"), float("inf")):
        case = Case(19, 10, [33], ["tanh"])
        case.error[4, 2] = bad
        (delta,), (total,) = fastdfa.ops.project_gate(*case.arguments(), **case.keywords())
        assert not delta[4].isfinite().any() and not total.isfinite().any()
        assert delta[:4].isfinite().all() and delta[5:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_the_twin_of_project_gate(name, dtype):
    case = Case(17, 10, [29, 30], [name, "tanh"], dtype, sum_error=True)
    found = reference.project_gate(*case.schema_arguments())
    deltas, sums = case.expected()
    for actual, right in zip(found[:2], deltas, strict=True):
        assert_close(actual, right, DTYPES[dtype])
    for actual, delta, right in zip(found[2:], deltas, sums, strict=True):
        scale = delta.abs().sum(0).norm()
        sum_tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        assert (actual.double() - right).norm() <= sum_tolerance * scale


# gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("function", [fastdfa.ops.gate, reference.gate])
def test_gate(function, name, dtype):
    kind, param, _ = KINDS[name]
    for rows, n in ((1, 1), (37, 29), (200, 65)):
        grad = randn(rows, n, dtype=dtype)
        saved, derivative = saved_and_derivative(name, randn(rows, n, seed=1, dtype=dtype))
        delta, total = function(grad, saved, kind, param)
        expected = grad.double() * derivative
        assert delta.dtype == dtype and total.dtype == wide(dtype)
        assert_close(delta, expected, DTYPES[dtype])
        scale = expected.abs().sum(0).norm()
        sum_tolerance = 1e-12 if dtype == torch.float64 else 3e-6
        assert (total.double() - expected.sum(0)).norm() <= sum_tolerance * scale


def test_gate_of_any_strides_and_of_nothing():
    saved, derivative = saved_and_derivative("tanh", randn(29, 37).T)
    for grad in (
        randn(29, 37).T,
        randn(37, 58)[:, ::2],
        randn(1, 29).expand(37, 29),
        randn(37, 29),
    ):
        delta, total = fastdfa.ops.gate(grad, saved, 3, 0.0)
        assert_close(delta, grad * derivative)
        assert_close(total, (grad * derivative).sum(0))
    for shape in ((0, 4), (3, 0), (0, 0)):
        delta, total = fastdfa.ops.gate(torch.empty(shape), torch.empty(shape), 3, 0.0)
        assert delta.shape == shape and total.shape == shape[1:] and not total.any()


@pytest.mark.parametrize("name, kind, param, at_zero", [
    ("relu", 1, 0.0, 0.0), ("leaky_relu", 2, 0.3, 0.3), ("elu", 5, 0.7, 0.7),
])  # fmt: skip
def test_the_derivative_at_zero_is_that_of_torch(name, kind, param, at_zero):
    for dtype in DTYPES:
        for zero in (0.0, -0.0):
            saved = torch.full((9, 20), zero, dtype=dtype)
            delta, _ = fastdfa.ops.gate(torch.ones_like(saved), saved, kind, param)
            assert_close(delta, torch.full_like(saved, at_zero), 1e-2)
            (delta,), _ = fastdfa.ops.project_gate(
                torch.ones(9, 1, dtype=dtype), [torch.ones(1, 20, dtype=wide(dtype))], [saved],
                [kind], [param], [1.0],
            )  # fmt: skip
            assert_close(delta, torch.full_like(saved, at_zero), 1e-2)


# activate_ -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FROM_OUTPUT)
@pytest.mark.parametrize("function", [fastdfa.ops.activate_, reference.activate_])
def test_activate(function, name, dtype):
    kind, param, _ = KINDS[name]
    biases = [None, dtype, wide(dtype)]
    for shape, bias_dtype in itertools.product(
        [(1,), (5, 1), (7, 33), (3, 4, 130), (0, 4)], biases
    ):
        x = 3 * randn(*shape, dtype=dtype)
        bias = None if bias_dtype is None else randn(shape[-1], seed=1, dtype=bias_dtype)
        a = x.double() + (0 if bias is None else bias.double())
        assert function(x, bias, kind, param) is None
        assert_close(x, ACTIVATIONS[name].f(a), DTYPES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_activate_element_by_element(name, dtype):
    """Within a few units in the last place of each number, from 1e-30 to 1e4, as torch is."""
    kind, param, _ = KINDS[name]
    size = torch.logspace(-30, 4, 3001, dtype=torch.float64)
    a = torch.cat([-size.flip(0), torch.zeros(1, dtype=torch.float64), size]).to(dtype)
    modules = {
        0: lambda t: t, 1: torch.relu, 2: lambda t: torch.nn.functional.leaky_relu(t, param),
        3: torch.tanh, 4: torch.sigmoid, 5: lambda t: torch.nn.functional.elu(t, param),
        6: lambda t: torch.nn.functional.softplus(t, param),
    }  # fmt: skip
    expected = modules[kind](a.double())
    x = a.clone()
    fastdfa.ops.activate_(x, None, kind, param)
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).tiny
    distance = (x.double() - expected).abs()
    assert (distance <= 8 * eps * expected.abs() + eps * eps + tiny).all(), (
        a[(distance / (expected.abs() + tiny)).argmax()],
        distance.max(),
    )


@pytest.mark.parametrize("name", FROM_OUTPUT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activate_of_special_values(name, dtype):
    kind, param, _ = KINDS[name]
    a = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 1e4, -1e4] * 7, dtype=dtype)
    modules = {
        0: lambda t: t, 1: torch.relu, 2: lambda t: torch.nn.functional.leaky_relu(t, param),
        3: torch.tanh, 4: torch.sigmoid, 5: lambda t: torch.nn.functional.elu(t, param),
        6: lambda t: torch.nn.functional.softplus(t, param),
    }  # fmt: skip
    x = a.clone()
    fastdfa.ops.activate_(x, None, kind, param)
    torch.testing.assert_close(x, modules[kind](a), equal_nan=True)


# fill_feedback_ ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_fill_feedback(distribution, dtype):
    for c, n in ((1, 1), (3, 2), (5, 67), (10, 128)):
        out = torch.full((c, n), float("nan"), dtype=dtype)
        fastdfa.ops.fill_feedback_(out, 2**40 + 7, 9, distribution)
        expected = unit_feedback(2**40 + 7, c, n, distribution, 9)
        assert_close(out, expected, max(DTYPES[dtype], 1e-6))
        twin = torch.empty_like(out)
        reference.fill_feedback_(twin, 2**40 + 7, 9, DISTRIBUTIONS.index(distribution))
        assert_close(twin, expected, max(DTYPES[dtype], 1e-6))


def test_fill_feedback_is_a_function_of_the_position():
    """Rows and columns may be cut anywhere, and the rest of a row is not written."""
    whole = fastdfa.ops.feedback(9, 50, seed=3)
    big = torch.full((4, 40), float("nan"))
    fastdfa.ops.fill_feedback_(big[:, :13], 3)
    assert torch.equal(big[:, :13], whole[:4, :13])
    assert big[:, 13:].isnan().all()
    fastdfa.ops.fill_feedback_(big[::2, 5:18], 3)
    assert torch.equal(big[::2, 5:18], whole[:2, :13])
    for c, n in ((0, 4), (4, 0), (0, 0)):
        assert fastdfa.ops.feedback(c, n, seed=3).shape == (c, n)


def test_fill_feedback_is_the_same_in_every_dtype():
    exact = fastdfa.ops.feedback(9, 50, seed=3, dtype=torch.float64)
    for dtype, tolerance in DTYPES.items():
        found = fastdfa.ops.feedback(9, 50, seed=3, dtype=dtype)
        assert found.dtype == dtype
        assert_close(found, exact, max(tolerance, 1e-6))


def test_the_extremes_of_a_normal_are_finite():
    """u is never 0: the logarithm is finite; the largest |B| is sqrt(-2 ln 2^-24) = 5.77."""
    B = fastdfa.ops.feedback(1000, 1000, seed=0)
    assert B.isfinite().all() and 4.5 < B.abs().max() <= math.sqrt(48 * math.log(2)) + 1e-5


# The choices for a device ---------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize("device, dtype, classes, expected", [
    (CPU, torch.bfloat16, 1000, torch.float32),
    (CPU, torch.float64, 1000, torch.float64),
    (CUDA, torch.bfloat16, 31, torch.float32),
    (CUDA, torch.bfloat16, 32, torch.bfloat16),
    (CUDA, torch.float16, 1000, torch.float16),
    (CUDA, torch.float32, 1000, torch.float32),
    (CUDA, torch.float64, 1000, torch.float64),
])  # fmt: skip
def test_the_dtype_of_a_dense_matrix(device, dtype, classes, expected):
    assert fastdfa.ops.feedback_dtype(device, dtype, classes) == expected


@pytest.fixture
def tf32():
    """Sets whether torch allows tf32; puts back what was set."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    yield lambda allowed: setattr(setting, "fp32_precision", "tf32" if allowed else "ieee")
    setting.fp32_precision = before


@pytest.mark.parametrize("compiled", [False, True])
def test_tf32_is_allowed_where_torch_allows_it(tf32, compiled):
    def answers(x):
        dtypes = (torch.float32, torch.bfloat16, torch.float64)
        return x + 1, [fastdfa.ops.allow_tf32(d, t) for d in (CUDA, CPU) for t in dtypes]

    if compiled:
        torch._dynamo.reset()
        answers = torch.compile(answers, fullgraph=True, backend="eager")
    for allowed in (False, True, False):
        tf32(allowed)
        assert answers(torch.zeros(2))[1] == [allowed, False, False, False, False, False]


# Registration --------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("index", range(21))
def test_opcheck(index):
    op, arguments = list(samples())[index]
    torch.library.opcheck(op.default, arguments)


@needs_extension
def test_there_are_so_many_samples():
    assert len(list(samples())) == 21


# Errors --------------------------------------------------------------------------------------


def project_gate(**changes):
    """project_gate of two tanh layers, with some arguments changed."""
    arguments = dict(
        error=randn(6, 3),
        feedback=[randn(3, 8)],
        saved=[randn(6, 8), randn(6, 5)],
        kinds=[3, 3],
        params=[0.0, 0.0],
        scales=[1.0, 1.0],
    )
    return fastdfa.ops.project_gate(**(arguments | changes))


@pytest.mark.parametrize("changes, words", [
    (dict(error=randn(6)), ["error", "(6,)"]),
    (dict(error=randn(6, 3).long()), ["error", "int64"]),
    (dict(error=[[1.0]]), ["error", "list"]),
    (dict(error=randn(5, 3)), ["saved", "5", "6"]),
    (dict(saved=[randn(6, 8), randn(4, 5)]), ["saved[1]", "4", "6"]),
    (dict(saved=[randn(6, 8), randn(6, 5).float()]), ["saved[1]", "float64", "float32"]),
    (dict(saved=[randn(6, 8), randn(6, 5, 1)]), ["saved[1]", "(6, 5, 1)"]),
    (dict(feedback=[randn(4, 8)]), ["feedback[0]", "3", "(4, 8)"]),
    (dict(feedback=[randn(3, 7)]), ["feedback[0]", "8", "(3, 7)"]),
    (dict(feedback=[randn(3, 8), randn(3, 4)]), ["feedback[1]", "5", "(3, 4)"]),
    (dict(feedback=[randn(3, 8)] * 3), ["feedback", "3"]),
    (dict(feedback=[randn(3, 8).float()]), ["feedback[0]", "float64", "float32"]),
    (
        dict(feedback=[randn(3, 8).half()], saved=[randn(6, 8).bfloat16(), randn(6, 5).bfloat16()]),
        ["feedback[0]", "float32 or torch.bfloat16", "float16"],
    ),
    (
        dict(feedback=[randn(3, 8).float(), randn(3, 8).half()], saved=[randn(6, 8).half()] * 2),
        ["feedback[1]", "float32", "float16"],
    ),
    (dict(feedback=[randn(3, 8).to("meta")]), ["feedback[0]", "meta"]),
    (dict(feedback=[], streams=[0, 1, 2]), ["streams", "3"]),
    (dict(feedback=[], streams=[]), ["streams"]),
    (dict(feedback=[], distribution="cauchy"), ["distribution", "normal", "cauchy"]),
    (dict(kinds=[3]), ["kinds", "2", "1"]),
    (dict(kinds=[3, 10]), ["kind", "10"]),
    (dict(kinds=[3, -1]), ["kind", "-1"]),
    (dict(params=[0.0]), ["params", "2", "1"]),
    (dict(kinds=[2, 3], params=[-0.5, 0.0]), ["param", "leaky_relu", "-0.5"]),
    (dict(scales=[1.0] * 3), ["scales", "2", "3"]),
])  # fmt: skip
def test_project_gate_refuses(changes, words):
    with pytest.raises(REFUSED) as error:
        project_gate(**changes)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("arguments, words", [
    ((randn(6), randn(6), 3), ["grad", "(6,)"]),
    ((randn(6, 4), randn(6, 5), 3), ["saved", "(6, 4)", "(6, 5)"]),
    ((randn(6, 4), randn(6, 4).float(), 3), ["saved", "float64", "float32"]),
    ((randn(6, 4).int(), randn(6, 4).int(), 3), ["grad", "int32"]),
    ((randn(6, 4), randn(6, 4), 99), ["kind", "99"]),
])  # fmt: skip
def test_gate_refuses(arguments, words):
    with pytest.raises(REFUSED) as error:
        fastdfa.ops.gate(*arguments)
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("x, bias, kind, words", [
    (randn(4, 6).T, None, 3, ["x", "contiguous"]),
    (randn(6, 4), randn(5), 3, ["bias", "4", "5"]),
    (randn(6, 4), randn(1, 4), 3, ["bias", "4", "(1, 4)"]),
    (randn(6, 4), randn(4).float(), 3, ["bias", "float64", "float32"]),
    (randn(6, 4), None, 7, ["kind", "7"]),
    (randn(6, 4).long(), None, 1, ["x", "int64"]),
    (randn(6, 4), randn(4).to("meta"), 1, ["bias", "meta"]),
])  # fmt: skip
def test_activate_refuses_before_it_writes(x, bias, kind, words):
    before = x.clone()
    with pytest.raises(REFUSED) as error:
        fastdfa.ops.activate_(x, bias, kind)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert torch.equal(x, before)


@pytest.mark.parametrize("out, distribution, words", [
    (torch.zeros(5), "normal", ["out", "(5,)"]),
    (torch.zeros(5, 4, dtype=torch.int64), "normal", ["out", "int64"]),
    (torch.zeros(5, 4).T, "normal", ["out", "contiguous"]),
    (torch.zeros(5, 8)[:, ::2], "normal", ["out", "contiguous"]),
    (torch.zeros(5, 4), "laplace", ["distribution", "laplace"]),
])  # fmt: skip
def test_fill_feedback_refuses_before_it_writes(out, distribution, words):
    with pytest.raises(REFUSED) as error:
        fastdfa.ops.fill_feedback_(out, 1, 0, distribution)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not out.any()


@needs_extension
@pytest.mark.parametrize("index", range(7))
def test_the_library_itself_checks(index):
    """Whoever calls torch.ops.fastdfa gets an error too, not a wrong read."""
    ops = torch.ops.fastdfa
    x = torch.zeros(6, 4)
    calls = [
        lambda: ops.gate(randn(6, 4), randn(5, 4), 3, 0.0),
        lambda: ops.activate_(x, torch.zeros(3), 3, 0.0),
        lambda: ops.activate_(x, None, 7, 0.0),
        lambda: ops.fill_feedback_(torch.zeros(5, 8)[:, ::2], 1, 0, 0),
        lambda: ops.project_gate(
            randn(6, 3), [randn(2, 8)], 0, [0], 0, [randn(6, 8)], [3], [0.0], [1.0], False, False
        ),
        lambda: ops.project_gate(
            randn(6, 3), [randn(3, 8), randn(3, 8).float()], 0, [0], 0,
            [randn(6, 8).float()] * 2, [3, 3], [0.0] * 2, [1.0] * 2, False, False,
        ),
        lambda: ops.project_gate(
            randn(6, 3), [randn(3, 8).bfloat16()], 0, [0], 0, [randn(6, 8).half()], [3], [0.0],
            [1.0], False, False,
        ),
    ]  # fmt: skip
    with pytest.raises(REFUSED):
        calls[index]()
    assert not x.any()
