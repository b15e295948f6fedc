"""The CUDA kernels and the engine on a GPU: numbers, streams, graphs, memory (contract 6 to 10).

Expected values are computed on the CPU in float64, or by the formulas of formulas.py.
"""

import contextlib
import itertools
import os
import sys
from functools import partial

import pytest
import torch
from helpers.formulas import ACTIVATIONS, DISTRIBUTIONS, philox4x32, unit_feedback
from helpers.kernels import FROM_OUTPUT, KINDS, REFUSED, Case, samples, saved_and_derivative, wide
from helpers.networks import (
    Apply,
    assert_close,
    expected_gradients,
    gradients,
    mlp,
    randn,
    step,
)
from helpers.norms import check_batch_norm, check_layer_norm
from helpers.pages import run as recipes
from torch import nn

import fastdfa

DEVICE = "cuda"
WHY_NOT = (
    "PyTorch finds no CUDA GPU"
    if not torch.cuda.is_available()
    else fastdfa.build_info()["fallback"].get("cuda")
)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

# Of the deltas, which are rounded to their dtype: e and B may be too (tensor cores).
TOLERANCE = {
    torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4
}  # fmt: skip
# Of a column sum relative to the sum of absolute values: it is not rounded, but what it adds up is
# made of e and B as the tensor cores read them.
SUM_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
TF32 = 2e-3  # 10 bits of each factor, cut off
FEWEST_TENSOR_CORE_CLASSES = 32

# The one place for shapes: rows M, classes C, widths n_l.
SHAPES = [
    (1, 1, [1]),
    (2, 3, [1, 15, 16, 67, 130]),
    (3, 2, [100_000]),
    (37, 10, [29, 70]),
    (100, 10, [256, 255, 257]),
    (5000, 10, [40, 8]),
    (257, 15, [64, 64, 64]),
    (129, 16, [129, 513]),
    (64, 17, [256, 33]),
    (255, 31, [1023, 8]),
    (256, 32, [128, 256]),
    (257, 33, [33, 129, 257]),
    (1, 63, [300]),
    (100, 64, [7, 64]),
    (513, 65, [257, 512]),
    (77, 100, [136]),
    (128, 127, [128, 128]),
    (130, 128, [120]),
    (64, 1000, [300, 72]),
    (33, 1023, [129]),
    (17, 5000, [200, 8]),
    (3, 20_000, [136]),
]
# How B comes: in the accumulation dtype, in the layers' own (rows padded for tensor cores, or not),
# or not at all.
WAYS = ["wide", "padded", "packed", "generated"]


def ways(dtype):
    narrow = dtype in (torch.bfloat16, torch.float16)
    return WAYS if narrow else ["wide", "padded", "generated"]


@pytest.fixture(autouse=True)
def _working_gpu(request):
    """A kernel that fails leaves nothing to be tested by this process: that test is the culprit."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"the GPU is unusable after {request.node.nodeid}: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(message, returncode=1)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(message, file=sys.stderr, flush=True)
        os._exit(1)  # xdist reports the test, and goes on with a new process


def poison():
    """Fills the free memory of the allocator with NaN, so that what is not written shows."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return  # there is none, and compute-sanitizer looks for it
    torch.cuda.empty_cache()
    # From large to small, so that gaps between live tensors are filled too. All bits set is NaN.
    counts = {24: 4, 23: 4, 22: 8, 21: 8, 20: 8, 16: 64, 12: 128, 9: 256}
    sizes = [2**power for power, count in counts.items() for _ in range(count)]
    blocks = [torch.full((n,), 255, dtype=torch.uint8, device=DEVICE) for n in sizes]
    del blocks


def padded(matrix):
    """The same columns of rows of a multiple of 16 elements, the rest of which is NaN."""
    rows, columns = matrix.shape
    whole = torch.full((rows, -(-columns // 16) * 16), float("nan")).to(matrix)
    whole[:, :columns] = matrix
    return whole[:, :columns]


class OnGpu(Case):
    """Inputs of project_gate on the GPU, and what must come, from the CPU."""

    def __init__(self, shape, dtype, way="wide", names=None, change=None, tf32=False, **options):
        rows, classes, widths = shape
        names = names or list(itertools.islice(itertools.cycle(KINDS), rows, rows + len(widths)))
        super().__init__(rows, classes, widths, names, dtype, dense=way != "generated", **options)
        self.way, self.change, self.tf32 = way, change or (lambda t: t), tf32
        if way in ("padded", "packed"):
            self.matrices = [B.to(dtype) for B in self.matrices]
        # Whether e and B may be rounded to fewer bits than the sums have.
        rounded = dtype in (torch.bfloat16, torch.float16) or tf32
        self.rounded = rounded and classes >= FEWEST_TENSOR_CORE_CLASSES

    def arguments(self):
        error, feedback, saved, *rest = super().arguments()
        place = (lambda B: padded(B.to(DEVICE))) if self.way == "padded" else self._place
        return (
            self._place(error),
            [place(B) for B in feedback],
            [self._place(h) for h in saved],
            *rest,
        )

    def _place(self, tensor):
        if 0 in tensor.stride() and tensor.numel() > 1:  # expanded: it stays so
            flat = tensor.as_strided((1,), (1,)) if not any(tensor.stride()) else tensor[:1]
            return flat.to(DEVICE).expand(tensor.shape)
        return self.change(tensor.to(DEVICE))

    def run(self):
        arguments = self.arguments()
        poison()
        return fastdfa.ops.project_gate(*arguments, **self.keywords(), allow_tf32=self.tf32)

    def check(self, tolerance=None):
        deltas, sums = self.run()
        expected, expected_sums = self.expected()
        tolerance = tolerance or max(TOLERANCE[self.dtype], TF32 if self.tf32 else 0)
        sum_tolerance = tolerance if self.rounded else SUM_TOLERANCE[wide(self.dtype)]
        if self.way == "generated" and self.options["distribution"] == "normal":
            # The logarithm of Box-Muller is taken in float32.
            tolerance, sum_tolerance = max(tolerance, 2e-6), max(sum_tolerance, 2e-6)
        assert len(deltas) == len(sums) == len(expected)
        for delta, total, right, right_sum in zip(
            deltas, sums, expected, expected_sums, strict=True
        ):
            assert delta.dtype == self.dtype and total.dtype == wide(self.dtype)
            assert delta.device.type == total.device.type == DEVICE and delta.is_contiguous()
            delta = delta.cpu().double()
            assert_close(delta, right, tolerance)
            if right.numel():  # nor is any element far off
                worst = (delta - right).abs().max() / right.abs().max().clamp(min=1e-30)
                assert worst <= 10 * tolerance, f"an element: {worst:.3g} of the largest"
            scale = right.abs().sum(0).norm().clamp(min=1e-30)
            distance = (total.cpu().double() - right_sum).norm() / scale
            assert distance <= sum_tolerance, f"sum: {distance:.3g}, allowed {sum_tolerance:.3g}"


def test_poison_reaches_what_is_allocated_next():
    keep = [torch.zeros(n, device=DEVICE) for n in (3, 100, 1000, 100_000)]
    poison()
    # All before any is looked at, as that allocates too.
    found = [torch.empty(s, device=DEVICE) for s in ((5,), (33, 7), (1000, 33), (2000, 1000))]
    assert all(x.isnan().all() for x in found)
    del keep


# project_gate --------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_gate(shape, dtype, shared):
    for way in ways(dtype):
        OnGpu(shape, dtype, way, shared=shared).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", KINDS)
def test_project_gate_of_every_kind(name, dtype):
    for shape in ((37, 10, [29, 70]), (130, 40, [136])):
        for way in ways(dtype):
            OnGpu(shape, dtype, way, [name] * len(shape[2])).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sum_error", [True, False])
def test_project_gate_of_every_rule(sum_error, shared, distribution, dtype):
    rule = dict(sum_error=sum_error, shared=shared, distribution=distribution)
    for classes, way in itertools.product((9, 100), ("wide", "generated")):
        OnGpu((21, classes, [18, 40, 7]), dtype, way, **rule).check()


@pytest.mark.parametrize("way", ["wide", "generated"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] >= 31], ids=str)
def test_project_gate_with_tf32(shape, way):
    OnGpu(shape, torch.float32, way, tf32=True).check()


def test_tf32_is_used_only_where_it_is_allowed():
    shape = (256, 1000, [512])
    exact, rounded = (OnGpu(shape, torch.float32, tf32=allowed).run() for allowed in (False, True))
    assert not torch.equal(exact[0][0], rounded[0][0])


@pytest.mark.parametrize("layers", [63, 64, 65, 130])
@pytest.mark.parametrize("way", ["wide", "generated"])
@pytest.mark.parametrize("shared", [True, False])
def test_project_gate_of_many_layers(shared, way, layers):
    """More than one launch takes."""
    widths = [1 + 7 * i % 130 for i in range(layers)]
    for dtype, classes in ((torch.float32, 10), (torch.bfloat16, 40)):
        OnGpu((33, classes, widths), dtype, way, shared=shared).check()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("way", ["wide", "generated"])
def test_project_gate_of_many_layers_of_one_width(way, shared):
    for dtype, classes in ((torch.float32, 10), (torch.bfloat16, 40)):
        OnGpu((65, classes, [64] * 40), dtype, way, shared=shared).check()


@pytest.mark.parametrize("rows, classes, width", list(itertools.product([0, 3], [0, 40], [0, 5])))
@pytest.mark.parametrize("way", ["wide", "generated"])
def test_project_gate_of_nothing(way, rows, classes, width):
    for dtype in (torch.float32, torch.bfloat16):
        case = OnGpu((rows, classes, [width, 6]), dtype, way, ["tanh", "relu"])
        deltas, sums = case.run()
        assert [d.shape for d in deltas] == [(rows, width), (rows, 6)]
        assert [s.shape for s in sums] == [(width,), (6,)]
        if rows == 0 or classes == 0:
            assert not any(t.any() for t in (*deltas, *sums))


def transposed(t):
    return t.T.contiguous().T


def sliced(t):
    big = torch.full((2 * t.shape[0] + 1, 3 * t.shape[1] + 2), float("nan")).to(t)
    return big[1::2, 2::3][: t.shape[0], : t.shape[1]].copy_(t)


def long_rows(t):
    big = torch.full((t.shape[0], t.shape[1] + 5), float("nan")).to(t)
    return big[:, : t.shape[1]].copy_(t)


def unaligned(t):
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view_as(t).copy_(t)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("change", [transposed, sliced, long_rows, unaligned])
def test_project_gate_of_any_layout(change, dtype):
    for shape in ((19, 10, [33, 21]), (130, 40, [136, 64])):
        for way in ways(dtype):
            if way in ("wide", "packed") and change in (transposed, sliced):
                continue  # B must have contiguous rows
            OnGpu(shape, dtype, way, ["tanh", "gelu"], change).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [10, 40])
def test_project_gate_of_broadcast_tensors(classes, dtype):
    """A broadcast error, and an identity whose saved tensor holds no memory."""
    case = OnGpu((19, classes, [33, 8]), dtype, names=["none", "tanh"])
    case.saved[0] = torch.full((), float("nan"), dtype=dtype).expand(19, 33)
    case.check()
    case.error = randn(1, classes, dtype=dtype).expand(19, classes)
    case.check()
    case.error = torch.full((), 0.25, dtype=dtype).expand(19, classes)
    case.check()


@pytest.mark.parametrize("error_dtype", TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_project_gate_of_an_error_of_another_dtype(dtype, error_dtype):
    for classes, way in itertools.product((10, 40), ("wide", "padded", "generated")):
        case = OnGpu((33, classes, [33, 8]), dtype, way, ["tanh", "relu"])
        case.error = case.error.to(error_dtype)
        case.check()


def test_project_gate_of_a_wider_matrix():
    for dtype, classes in ((torch.float32, 10), (torch.bfloat16, 40)):
        case = OnGpu((19, classes, [33, 8]), dtype, names=["tanh", "tanh"])
        case.matrices = [unit_feedback(case.seed, classes, 64, "normal").to(dtype)]
        case.check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("classes", [10, 31, 100, 1000])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_generated_matrix_equals_the_dense_one(distribution, classes, dtype):
    rule = dict(distribution=distribution, shared=False)
    shape, pair = (65, classes, [136, 33]), ("wide", "generated")
    found = [OnGpu(shape, dtype, way, **rule).run() for way in pair]
    dense, generated = ([*deltas, *sums] for deltas, sums in found)
    for a, b in zip(generated, dense, strict=True):
        assert_close(a, b.double(), max(TOLERANCE[dtype], 2e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("way", ["wide", "padded", "generated"])
def test_results_are_the_same_from_run_to_run(way, classes, dtype):
    """Bit by bit: also beside other work, and where torch demands it of all operations."""
    case = OnGpu((3001, classes, [520, 64]), dtype, way, ["tanh", "relu"])
    first, arguments = case.run(), case.arguments()
    noise, side = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for strict in (False, True):
        with torch.cuda.stream(side):
            for _ in range(10):
                noise = noise @ noise / 64
        torch.use_deterministic_algorithms(strict)
        try:
            again = fastdfa.ops.project_gate(*arguments, **case.keywords())
        finally:
            torch.use_deterministic_algorithms(False)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
            assert torch.equal(a, b)


def test_project_gate_scales_in_the_accumulator():
    """2^-14 e, 2^-14 scale, 2^12 rows: e B scale is flushed by fp16, their sum is not."""
    for classes in (1, 64):
        error = torch.full((4096, classes), 2.0**-14 / classes, device=DEVICE).half()
        saved = [torch.zeros(4096, 16, dtype=torch.float16, device=DEVICE)]
        B = torch.ones(classes, 16, device=DEVICE, dtype=torch.float16)
        (delta,), (total,) = fastdfa.ops.project_gate(
            error, [B], saved, [0], [0.0], [2.0**-14], sum_error=True
        )
        assert_close(delta, torch.full_like(delta, 2.0**-16), 2e-3)
        assert_close(total, torch.full_like(total, 2.0**-4), 2e-3)


def test_nan_and_inf_arrive_where_they_belong():
    cases = [(torch.float32, 10, "wide"), (torch.bfloat16, 40, "padded")]
    for bad, (dtype, classes, way) in itertools.product((float("nan"), float("inf")), cases):
        case = OnGpu((37, classes, [33]), dtype, way, names=["tanh"])
        case.error[4, 2] = bad
        (delta,), (total,) = case.run()
        assert not delta[4].isfinite().any() and not total.isfinite().any()
        assert delta[:4].isfinite().all() and delta[5:].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind, param, at_zero", [(1, 0.0, 0.0), (2, 0.3, 0.3), (5, 0.7, 0.7)])
def test_the_derivative_at_zero_is_that_of_torch(kind, param, at_zero, dtype):
    for zero in (0.0, -0.0):
        saved = torch.full((9, 20), zero, dtype=dtype, device=DEVICE)
        one = torch.ones_like(saved)
        delta, _ = fastdfa.ops.gate(one, saved, kind, param)
        assert_close(delta, torch.full_like(saved, at_zero), 1e-2)
        B = torch.ones(1, 20, dtype=wide(dtype), device=DEVICE)
        (delta,), _ = fastdfa.ops.project_gate(one[:, :1], [B], [saved], [kind], [param], [1.0])
        assert_close(delta, torch.full_like(saved, at_zero), 1e-2)


# gate, activate_, fill_feedback_ --------------------------------------------------------------

PASSES = [(1, 1), (1, 1000), (37, 29), (200, 65), (1000, 1), (300, 1024), (65, 4099), (5000, 8)]


def check_gate(name, dtype, rows, columns, change=lambda t: t):
    kind, param, _ = KINDS[name]
    grad = randn(rows, columns, dtype=dtype)
    saved, derivative = saved_and_derivative(name, randn(rows, columns, seed=1, dtype=dtype))
    arguments = [change(t.to(DEVICE)) for t in (grad, saved)]
    poison()
    delta, total = fastdfa.ops.gate(*arguments, kind, param)
    expected = grad.double() * derivative
    assert delta.dtype == dtype and total.dtype == wide(dtype)
    assert_close(delta.cpu(), expected, TOLERANCE[dtype])
    scale = expected.abs().sum(0).norm().clamp(min=1e-30)
    distance = (total.cpu().double() - expected.sum(0)).norm()
    assert distance <= SUM_TOLERANCE[wide(dtype)] * scale


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", KINDS)
def test_gate(name, dtype):
    check_gate(name, dtype, 37, 29)
    check_gate(name, dtype, 300, 136)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, columns", PASSES)
def test_gate_of_any_shape(rows, columns, dtype):
    check_gate("tanh", dtype, rows, columns)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("change", [transposed, sliced, long_rows, unaligned])
def test_gate_of_any_layout(change, dtype):
    check_gate("tanh", dtype, 100, 72, change)


def test_gate_of_nothing():
    for shape in ((0, 4), (3, 0), (0, 0)):
        empty = torch.empty(shape, device=DEVICE)
        delta, total = fastdfa.ops.gate(empty, empty, 3, 0.0)
        assert delta.shape == shape and total.shape == shape[1:] and not total.any()


def check_norms(a, dtype, **options):
    poison()
    check_layer_norm(fastdfa.ops, a, dtype, **options)
    for training in (True, False):
        poison()
        check_batch_norm(fastdfa.ops, a, dtype, training=training, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows, columns", [(3, 70), (37, 33), (256, 1024), (5000, 40), (9, 5000)])
def test_norms_of_any_shape(rows, columns, dtype):
    check_norms(randn(rows, columns, dtype=dtype).to(DEVICE) + 1, dtype)


@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_norms_of_every_activation(name):
    for dtype in (torch.float32, torch.float64):
        check_norms(randn(40, 37, dtype=dtype).to(DEVICE), dtype, name=name)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("change", [transposed, sliced, long_rows, unaligned])
def test_norms_of_any_layout(change, dtype):
    check_norms(change(randn(100, 72, dtype=dtype).to(DEVICE)), dtype)


def test_norms_of_parameters_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        check_norms(randn(40, 37, dtype=dtype).to(DEVICE), dtype, of_vectors=torch.float32)
    check_norms(randn(40, 37).to(DEVICE), torch.float64, affine=False)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_activate(name, dtype):
    kind, param, _ = KINDS[name]
    shapes = [(1,), (5, 1), (7, 33), (3, 4, 130), (300, 1024), (0, 4)]
    for shape, bias_dtype in itertools.product(shapes, [None, dtype, wide(dtype)]):
        x = 3 * randn(*shape, dtype=dtype)
        bias = None if bias_dtype is None else randn(shape[-1], seed=1, dtype=bias_dtype)
        a = x.double() + (0 if bias is None else bias.double())
        for place in (lambda t: t, unaligned):
            out = place(x.to(DEVICE, copy=True))
            fastdfa.ops.activate_(out, None if bias is None else bias.to(DEVICE), kind, param)
            assert_close(out.cpu(), ACTIVATIONS[name].f(a), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_activate_element_by_element(name, dtype):
    """Within a few units in the last place of each number, from 1e-30 to 1e4, as torch is."""
    kind, param, _ = KINDS[name]
    size = torch.logspace(-30, 4, 3001, dtype=torch.float64)
    a = torch.cat([-size.flip(0), torch.zeros(1, dtype=torch.float64), size]).to(dtype)
    x = a.to(DEVICE, copy=True)
    fastdfa.ops.activate_(x, None, kind, param)
    expected = fastdfa.activations.apply(a.double(), kind, param)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    distance = (x.cpu().double() - expected).abs()
    allowed = 8 * eps * expected.abs() + eps * eps + tiny
    worst = (distance / allowed).argmax()
    assert (distance <= allowed).all(), (a[worst], x[worst], expected[worst])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_activate_of_special_values(name, dtype):
    kind, param, _ = KINDS[name]
    a = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 1e4, -1e4] * 7, dtype=dtype)
    x = a.to(DEVICE, copy=True)
    fastdfa.ops.activate_(x, None, kind, param)
    expected = fastdfa.activations.apply(a, kind, param)
    torch.testing.assert_close(x.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_fill_feedback(distribution, dtype):
    for c, n in ((1, 1), (3, 2), (5, 67), (10, 128), (300, 1001)):
        expected = unit_feedback(2**40 + 7, c, n, distribution, 2**31 + 9)
        for place in (lambda t: t, long_rows, unaligned):
            out = place(torch.full((c, n), float("nan"), dtype=dtype, device=DEVICE))
            fastdfa.ops.fill_feedback_(out, 2**40 + 7, 2**31 + 9, distribution)
            assert_close(out.cpu(), expected, max(TOLERANCE[dtype], 2e-6))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_matrix_is_that_of_the_cpu(distribution):
    arguments = dict(seed=2**62 + 5, stream=77, distribution=distribution)
    for dtype in TOLERANCE:
        cpu, gpu = (
            fastdfa.ops.feedback(100, 333, dtype=dtype, device=d, **arguments)
            for d in ("cpu", DEVICE)
        )
        same = 0 if distribution == "rademacher" else max(TOLERANCE[dtype], 2e-6)
        assert_close(gpu.cpu(), cpu, same)


def test_fill_feedback_writes_nothing_else():
    big = torch.full((9, 40), float("nan"), device=DEVICE)
    fastdfa.ops.fill_feedback_(big[::2, 5:18], 3)
    assert_close(big[::2, 5:18].cpu(), fastdfa.ops.feedback(5, 13, seed=3), 2e-6)
    assert big[1::2].isnan().all() and big[:, :5].isnan().all() and big[:, 18:].isnan().all()


# More elements than 32 bits count --------------------------------------------------------------


@pytest.fixture
def _roomy():
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("less than 60 GB of GPU memory free")
    yield
    torch.cuda.empty_cache()


ROWS, COLUMNS = 2**15 + 3, 2**16 + 24  # 2**31 + 1.1 M elements
WATCHED = [0, 1, 2**15 - 12, 2**15 - 1, ROWS - 2, ROWS - 1]  # the rows that are compared


def large(dtype=torch.bfloat16):
    return torch.empty(ROWS, COLUMNS, dtype=dtype, device=DEVICE).uniform_(-1, 1)


@pytest.mark.usefixtures("_roomy")
@pytest.mark.parametrize("classes", [3, 64])
def test_project_gate_past_2_31_elements(classes):
    saved, error = large(), randn(ROWS, classes, dtype=torch.bfloat16).to(DEVICE)
    B = fastdfa.ops.feedback(classes, COLUMNS, seed=1, device=DEVICE, dtype=torch.bfloat16)
    for feedback in ([B], []):
        (delta,), (total,) = fastdfa.ops.project_gate(
            error, feedback, [saved], [3], [0.0], [1.0], seed=1
        )
        expected = (error[WATCHED].double() @ B.double()) * (1 - saved[WATCHED].double() ** 2)
        for row, right in zip(WATCHED, expected, strict=True):
            assert_close(delta[row], right, 6e-3)
        parts = delta.split(2**12)
        right = sum(part.double().sum(0) for part in parts)
        scale = sum(part.double().abs().sum(0) for part in parts).norm()
        assert (total.double() - right).norm() <= 1e-4 * scale
        del delta, total, parts


@pytest.mark.usefixtures("_roomy")
def test_gate_past_2_31_elements():
    grad, saved = large(), large()
    delta, total = fastdfa.ops.gate(grad, saved, 3)
    expected = grad[WATCHED].double() * (1 - saved[WATCHED].double() ** 2)
    for row, right in zip(WATCHED, expected, strict=True):
        assert_close(delta[row], right, TOLERANCE[torch.bfloat16])
    assert total.isfinite().all()


@pytest.mark.usefixtures("_roomy")
def test_activate_past_2_31_elements():
    x, bias = large(), torch.randn(COLUMNS, device=DEVICE)
    expected = torch.tanh(x[WATCHED].double() + bias.double())
    fastdfa.ops.activate_(x, bias, 3)
    for row, right in zip(WATCHED, expected, strict=True):
        assert_close(x[row], right, TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("_roomy")
def test_fill_feedback_past_2_31_elements():
    out = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
    fastdfa.ops.fill_feedback_(out, 5, 0, "rademacher")
    column = torch.arange(-(-COLUMNS // 4)).numpy()
    for row in WATCHED:
        counter = (column, column * 0 + row, column * 0, column * 0)
        words = torch.stack([torch.from_numpy(w >> 31).long() for w in philox4x32(counter, (5, 0))])
        expected = (1 - 2 * words.T.flatten())[:COLUMNS]
        assert torch.equal(out[row].cpu().long(), expected), row


# Errors ---------------------------------------------------------------------------------------


def mixed_devices():
    """Calls in which one tensor is on the other device, and the name that the error must say."""
    e, B, h = randn(6, 3), randn(3, 8), randn(6, 8)
    x, bias = torch.zeros(6, 8), torch.randn(8).double()
    gpu = [t.to(DEVICE) for t in (e, B, h, x.double(), bias)]
    rest = ([3], [0.0], [1.0])
    raw, tail = torch.ops.fastdfa, (*rest, False, False)
    return gpu[3], {
        "saved[0]": [
            lambda: fastdfa.ops.project_gate(gpu[0], [gpu[1]], [h], *rest),
            lambda: raw.project_gate(gpu[0], [gpu[1]], 0, [0], 0, [h], *tail),
        ],
        "feedback[0]": [
            lambda: fastdfa.ops.project_gate(gpu[0], [B], [gpu[2]], *rest),
            lambda: raw.project_gate(gpu[0], [B], 0, [0], 0, [gpu[2]], *tail),
        ],
        "saved": [
            lambda: fastdfa.ops.gate(gpu[2], h, 3),
            lambda: raw.gate(gpu[2], h, 3, 0.0),
        ],
        "bias": [
            lambda: fastdfa.ops.activate_(gpu[3], bias, 3),
            lambda: raw.activate_(gpu[3], bias, 3, 0.0),
            lambda: raw.activate_(gpu[3], torch.randn(7).to(DEVICE), 3, 0.0),
        ],
    }


@pytest.mark.parametrize("name", ["saved[0]", "feedback[0]", "saved", "bias"])
def test_wrong_arguments_raise_before_anything_is_launched(name):
    x, calls = mixed_devices()
    for call in calls[name]:
        with pytest.raises(REFUSED) as error:
            call()
        assert name in str(error.value), str(error.value)
    torch.cuda.synchronize()
    assert not x.any()


@pytest.mark.parametrize("index", range(21))
def test_opcheck(index):
    op, arguments = list(samples())[index]
    move = torch.utils._pytree.tree_map_only
    arguments = move(torch.Tensor, lambda t: t.to(DEVICE), arguments)
    torch.library.opcheck(op.default, arguments)


# Streams, synchronisation, devices ---------------------------------------------------------------

WAIT = 600_000_000  # cycles: 0.3 s


def network(names="tanh", dtype=torch.float32, widths=(5, 40, 33, 48, 3), device=DEVICE, **options):
    return mlp(list(widths), names, dtype=dtype, **options).to(device)


def data(model, rows=37, seed=1, device=DEVICE):
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    shapes = ((rows, linears[0].in_features), (rows, linears[-1].out_features))
    return (randn(*s, seed=seed, dtype=linears[0].weight.dtype).to(device) for s in shapes)


def check(model, x, g, tolerance=1e-5, reduction="mean"):
    """One step from zero has the gradients of the formulas."""
    model.zero_grad()
    step(model, x, g)
    assert_close(gradients(model), expected_gradients(model, x, g, reduction=reduction), tolerance)


def test_ops_and_steps_run_on_the_current_stream():
    """What they read is only written there, after a long wait."""
    model = network()
    x, g = data(model)
    check(model, x, g)
    case = OnGpu((37, 10, [29, 70]), torch.float32)
    right = case.run()
    error, feedback, saved, *rest = case.arguments()
    late = [torch.full_like(t, float("nan")) for t in (x, error, *saved)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(WAIT // 3)
        for target, source in zip(late, (x, error, *saved), strict=True):
            target.copy_(source)
        found = fastdfa.ops.project_gate(late[1], feedback, late[2:], *rest, **case.keywords())
        gated = fastdfa.ops.gate(late[2], late[2], 3)
        fastdfa.ops.activate_(late[2], None, 3)
        model.zero_grad()
        step(model, late[0], g)
    stream.synchronize()
    for a, b in zip((*found[0], *found[1]), (*right[0], *right[1]), strict=True):
        assert torch.equal(a, b)
    h = saved[0].double()
    assert_close(gated[0], h * (1 - h * h), 1e-5)
    assert_close(late[2], torch.tanh(h), 1e-5)
    assert_close(gradients(model), expected_gradients(model, x, g), 1e-5)


@pytest.mark.parametrize("rule", [
    dict(), dict(dense=False), dict(shared=False), dict(error="sum", shared=False, dense=False)
], ids=str)  # fmt: skip
@pytest.mark.parametrize("names", ["tanh", "gelu", "Softsign"])
def test_a_step_does_not_wait_for_the_gpu(names, rule):
    model = network(names, feedback=fastdfa.Feedback(seed=1, **rule))
    x, g = data(model)
    for _ in range(2):
        check(model, x, g, reduction=model.feedback.error)
    model.zero_grad()
    busy = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(WAIT)
        busy.record()
        step(model, x, g)
        assert not busy.query(), "the step took as long as what was queued before it"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_while_the_first_is_current():
    second = torch.device("cuda", 1)
    model = network(device=second)
    x, g = data(model, device=second)
    check(model, x, g)
    case = OnGpu((37, 100, [29, 70]), torch.bfloat16)
    error, feedback, saved, *rest = case.arguments()
    there = [t.to(second) for t in (error, *feedback, *saved)]
    found = fastdfa.ops.project_gate(there[0], there[1:2], there[2:], *rest, **case.keywords())
    for a, b in zip(found[0], case.run()[0], strict=True):
        assert a.device == second and torch.equal(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


def test_a_model_on_two_devices():
    """Points of a CPU and of a GPU, under one error."""

    def blocks():
        torch.manual_seed(0)
        sizes, layers = [(5, 8), (8, 7), (7, 6), (6, 3)], []
        for n, m in sizes:
            activation = "tanh" if m > 3 else None
            layers.append(fastdfa.Linear(n, m, activation=activation, dtype=torch.float64))
        return layers

    def move(device):
        return Apply(lambda h: h.to(device))

    a, b = blocks(), blocks()
    rule = fastdfa.Feedback(seed=1)
    here = fastdfa.DFA(nn.Sequential(*a[:2], move("cpu"), *a[2:]), feedback=rule)
    there = [layer.to(DEVICE) for layer in b[2:]]
    both = fastdfa.DFA(nn.Sequential(*b[:2], move(DEVICE), *there), feedback=rule)
    x, g = randn(9, 5), randn(9, 3)
    step(here, x, g)
    step(both, x, g.to(DEVICE))
    expected = gradients(here)
    assert_close({n: t.cpu() for n, t in gradients(both).items()}, expected, 1e-10)


def test_a_model_may_move_to_the_gpu_and_back():
    model = network(dtype=torch.float64, device="cpu")
    for device in ("cpu", DEVICE, "cpu", DEVICE):
        model.to(device)
        x, g = data(model, device=device)
        check(model, x, g, 1e-10)


# Graphs and compilation -----------------------------------------------------------------------


def captured(function):
    """What replays all that `function` does on the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("names", ["tanh", "gelu", "Softsign"])
@pytest.mark.parametrize("rule", [dict(), dict(dense=False, error="sum"), dict(shared=False)],
                         ids=str)  # fmt: skip
def test_a_whole_step_in_a_cuda_graph(rule, names, dtype, tolerance):
    model = network(names, dtype, (5, 40, 33, 48, 40), feedback=fastdfa.Feedback(seed=1, **rule))
    x, g = data(model)

    def fresh_step():
        model.zero_grad()
        step(model, x, g)

    replay = captured(fresh_step)
    for seed in (2, 3):
        for static, new in zip((x, g), data(model, seed=seed), strict=True):
            static.copy_(new)
        replay()
        expected = expected_gradients(model, x, g, reduction=model.feedback.error)
        assert_close(gradients(model), expected, tolerance)


def train(model, optimizer, x, g):
    optimizer.zero_grad()
    step(model, x, g)
    optimizer.step()


def test_graphs_of_a_chain_with_its_optimizer():
    """Two graphs, of two batch sizes, and ordinary steps of a third in turn train as ordinary
    steps do. In such a chain weight gradients are batched."""
    rule = dict(widths=(16, 24, 24, 24, 24, 3))
    model, other = network(**rule), network(**rule)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    static = [tuple(data(model, rows)) for rows in (37, 8)]
    steps = [partial(train, model, optimizers[0], *pair) for pair in static]
    with counted_batches() as batches:
        replays = list(map(captured, steps))
    assert set(batches) == {3}
    other.load_state_dict(model.state_dict())
    for seed in range(4):
        for pair, replay in zip(static, replays, strict=True):
            for target, source in zip(pair, data(model, len(pair[0]), seed), strict=True):
                target.copy_(source)
            replay()
            train(other, optimizers[1], *pair)
        for m, optimizer in zip((model, other), optimizers, strict=True):
            train(m, optimizer, *data(model, 5, seed))
    expected = dict(other.module.named_parameters())
    assert_close(dict(model.module.named_parameters()), expected, 1e-5)


def test_graphed_callables():
    """Forward and backward as two graphs, behind an autograd node of torch's own."""
    model = network(widths=(16, 24, 24, 24, 3))
    forward = torch.cuda.make_graphed_callables(model, tuple(data(model))[:1])
    for seed in (2, 3):
        x, g = data(model, seed=seed)
        model.zero_grad()
        (forward(x) * g).sum().backward()
        assert_close(gradients(model), expected_gradients(model, x, g), 1e-5)


def test_what_cannot_be_captured_is_refused():
    """And the model trains as before, once the capture has ended."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x, g = data(model)
    streaming = fastdfa.StreamingStep(model, optimizer)
    torch.cuda.synchronize()
    refused = [
        (lambda: step(model, x, g), "read its seed"),
        (lambda: streaming(lambda: (model(x) * g).sum()), "StreamingStep"),
    ]
    for function, words in refused:
        with pytest.raises(RuntimeError, match=words), torch.cuda.graph(torch.cuda.CUDAGraph()):
            function()
    check(model, x, g)
    model.load_state_dict(model.state_dict() | {"seed": torch.tensor(77)})
    check(model, x, g)


def test_the_recipes_run_as_documented():
    names = recipes("docs/performance.md")
    step, loss, batches = names["step"], names["loss"], names["batches"]
    assert isinstance(names["graph"], torch.cuda.CUDAGraph) and loss.isfinite()
    for parameter in names["model"].parameters():
        assert parameter.grad.abs().sum() > 0
    before = loss.item()
    for _ in range(50):
        names["graph"].replay()
    assert loss.item() < before  # of the last batch, learnt by heart
    assert step().isfinite() and len(batches) == 4


@pytest.fixture
def _no_compiled_code_left():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_compiled_code_left")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("names", ["tanh", ["tanh", "gelu", "Softsign"]], ids=str)
def test_compiled(names, mode):
    model = network(names)
    run = torch.compile(model, mode=mode, fullgraph=True)
    for seed in range(5):
        x, g = data(model, seed=seed)
        model.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        (run(x) * g).sum().backward()
        assert_close(gradients(model), expected_gradients(model, x, g), 1e-5)
    if mode == "reduce-overhead":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


# Batched weight gradients -----------------------------------------------------------------------


@contextlib.contextmanager
def counted_batches():
    """The sizes of the batches that torch.bmm multiplies."""
    sizes, bmm = [], torch.bmm

    def counted(a, b):
        sizes.append(len(a))
        return bmm(a, b)

    torch.bmm = counted
    try:
        yield sizes
    finally:
        torch.bmm = bmm


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weight_gradients_are_batched_where_a_product_is_small(dtype):
    for width, expected in ((24, [5]), (1000, [5]), (2048, [])):
        d, x = (randn(5, 33, width, seed=s, dtype=dtype).to(DEVICE).unbind() for s in (1, 2))
        with counted_batches() as sizes:
            grads = fastdfa.ops.weight_gradients(d, x)
        assert sizes == expected
        for grad, delta, h in zip(grads, d, x, strict=True):
            assert grad.is_contiguous() and grad.dtype == dtype
            assert_close(grad, delta.double().T @ h.double(), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_is_batched(dtype):
    """First with a tape, then without; and under autocast."""
    model = network(dtype=dtype, widths=(16, 24, 24, 24, 24, 3))
    x, g = data(model)
    for _ in range(2):
        with counted_batches() as sizes:
            check(model, x, g, PRECISION[dtype])
        assert sizes == [3]
    if dtype == torch.float32:
        model.zero_grad()
        with counted_batches() as sizes:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                y = model(x)
            (y.float() * g).sum().backward()
        assert sizes == [3]
        assert_close(gradients(model), expected_gradients(model, x, g), PRECISION[torch.bfloat16])


# The engine -----------------------------------------------------------------------------------

PRECISION = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("names", ["tanh", "gelu", "Softsign", ["relu", "Softsign", "silu"]],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("classes", [3, 100])
def test_gradients_are_those_of_the_formulas(classes, names, dtype):
    for rule in (dict(), dict(shared=False, dense=False)):
        widths = (16, 40, 33, 48, classes)
        model = network(names, dtype, widths, feedback=fastdfa.Feedback(seed=1, **rule))
        check(model, *data(model, 60), PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", ["tanh", "gelu", "Softsign"])
def test_autocast(names, dtype):
    model = network(names, widths=(16, 40, 33, 48, 40))
    x, g = data(model)
    with torch.autocast(DEVICE, dtype=dtype):
        y = model(x)
        loss = (y.float() * g).sum()
    loss.backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert_close(gradients(model), expected_gradients(model, x, g), PRECISION[dtype])


def test_grad_scaler():
    """Scales back, and skips a step whose gradients overflow."""
    model = network(widths=(16, 33, 24, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8)
    x, g = data(model)
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss = (model(x).float() * g).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_close(gradients(model), expected_gradients(model, x, g), PRECISION[torch.float16])
    scaler.step(optimizer)
    scaler.update()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    with torch.autocast(DEVICE, dtype=torch.float16):
        loss = (model(x).float() * g).sum() * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


@contextlib.contextmanager
def tf32_allowed():
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_step_uses_tf32_where_torch_allows_it():
    model = network(widths=(64, 256, 256, 256, 100))
    x, g = data(model, 256)
    model(x)
    expected = expected_gradients(model, x, g)
    check(model, x, g, 1e-5)
    with tf32_allowed():
        model.zero_grad()
        step(model, x, g)
    assert_close(gradients(model), expected, 3e-3)
    with pytest.raises(AssertionError):
        assert_close(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_one_seed_is_one_matrix_on_every_device(shared, distribution):
    rule = fastdfa.Feedback(distribution, seed=5, shared=shared)
    models = [network(device=device, feedback=rule) for device in ("cpu", DEVICE)]
    for model, device in zip(models, ("cpu", DEVICE), strict=True):
        step(model, *data(model, device=device))
    for name in models[0].feedback_points:
        cpu, gpu = (model.feedback_matrix(name) for model in models)
        assert gpu.device.type == DEVICE
        assert_close(gpu.cpu(), cpu, 2e-6)


def peak_of_a_step(model, x, y):
    def once():
        for p in model.parameters():
            p.grad = None
        nn.functional.cross_entropy(model(x), y).backward()

    once()
    for p in model.parameters():
        p.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_not_above_that_of_backprop(dtype):
    """Deep and with many rows: the deltas of all layers at once would nearly double it."""
    depth, width, rows = 16, 1024, 16384
    hidden = [(width, width)] * depth
    plain = nn.Sequential(
        *[m for n, k in hidden for m in (nn.Linear(n, k), nn.Tanh())], nn.Linear(width, 10)
    ).to(DEVICE, dtype)
    layers = [fastdfa.Linear(n, k, activation="tanh") for n, k in hidden]
    dfa = fastdfa.DFA(nn.Sequential(*layers, fastdfa.Linear(width, 10))).to(DEVICE, dtype)
    x = torch.randn(rows, width, device=DEVICE, dtype=dtype)
    y = torch.randint(10, (rows,), device=DEVICE)
    peaks = [peak_of_a_step(model, x, y) for model in (plain, dfa)]
    assert peaks[1] <= 1.03 * peaks[0], [f"{p / 2**20:.0f} MiB" for p in peaks]


def test_a_matrix_too_large_for_memory_is_never_made():
    """1000 classes on a feature map of 64 x 112 x 112: B would take 3.2 GB."""
    n = 64 * 112 * 112
    error, saved = randn(8, 1000, dtype=torch.float32).to(DEVICE), torch.rand(8, n, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (delta,), _ = fastdfa.ops.project_gate(error, [], [saved], [3], [0.0], [1.0], seed=7)
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20
    B = fastdfa.ops.feedback(1000, 4096, seed=7, device=DEVICE).double()
    expected = (error.double() @ B) * (1 - saved[:, :4096].double() ** 2)
    assert_close(delta[:, :4096], expected, 1e-5)


# A short selection for compute-sanitizer, which is 10 to 100 times slower -----------------------


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("classes", [10, 40])
def test_every_kernel_once(classes, dtype):
    for way in ways(dtype):
        OnGpu((70, classes, [136, 33, 136]), dtype, way).check()
    OnGpu((33, classes, [136, 33]), dtype, "generated", shared=False, tf32=True).check()
    check_gate("tanh", dtype, 70, 33)
    x, bias = randn(70, 33, dtype=dtype), randn(33, dtype=dtype)
    out = x.to(DEVICE, copy=True)
    fastdfa.ops.activate_(out, bias.to(DEVICE), 3)
    assert_close(out.cpu(), torch.tanh(x.double() + bias.double()), TOLERANCE[dtype])


@pytest.mark.sanitize
def test_one_step():
    model = network(["tanh", "Softsign", "gelu"])
    check(model, *data(model))
