"""Cases of the kernels, and what must come."""

import itertools

import pytest
import torch

import fastdfa
from fastdfa.ops import loading as build

from .formulas import ACTIVATIONS, DISTRIBUTIONS, unit_feedback
from .networks import assert_close, randn

EXTENSION = "cpu" in fastdfa.build_info()["kernels"]


needs_extension = pytest.mark.skipif(
    not EXTENSION, reason=f"no extension: {fastdfa.build_info()['fallback'].get('cpu')}"
)


# Only such a processor runs those products at all; on others torch multiplies, which is tested too.
needs_bfloat16 = pytest.mark.skipif(
    not build.multiplies_bfloat16(), reason="needs a processor with AVX-512 BF16"
)


# Code, parameter, the formulas, and whether f' comes from the input.
KINDS = {
    "none": (0, 0.0, False),
    "relu": (1, 0.0, False),
    "leaky_relu": (2, 0.01, False),
    "LeakyReLU(0.2)": (2, 0.2, False),
    "tanh": (3, 0.0, False),
    "sigmoid": (4, 0.0, False),
    "elu": (5, 1.0, False),
    "ELU(0.7)": (5, 0.7, False),
    "softplus": (6, 1.0, False),
    "Softplus(2)": (6, 2.0, False),
    "gelu": (7, 0.0, True),
    "GELU(tanh)": (8, 0.0, True),
    "silu": (9, 0.0, True),
}


FROM_OUTPUT = [name for name, (*_, from_input) in KINDS.items() if not from_input]


DTYPES = {
    torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3
}  # fmt: skip


REFUSED = (RuntimeError, TypeError, ValueError)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_and_derivative(name, a):
    """What a layer keeps of its pre-activation a, and f' in float64 of just that (so that rounding
    to a narrow dtype is no error of the op)."""
    _, _, from_input = KINDS[name]
    f = ACTIVATIONS[name]
    if from_input or name == "none":
        return a, f.derivative(a.double())
    saved = f.f(a.double()).to(a.dtype)
    h = saved.double()
    param = KINDS[name][1]
    derivative = {
        1: lambda: (h > 0).double(),
        2: lambda: torch.where(h > 0, torch.ones_like(h), param),
        3: lambda: 1 - h * h,
        4: lambda: h * (1 - h),
        5: lambda: torch.where(h > 0, torch.ones_like(h), h + param),
        6: lambda: 1 - torch.exp(-param * h),
    }[KINDS[name][0]]()
    return saved, derivative


class Case:
    """Inputs of project_gate and what must come."""

    def __init__(self, rows, classes, widths, names, dtype=torch.float64, **options):
        self.options = dict(sum_error=False, shared=True, dense=True, distribution="normal")
        self.options |= options
        self.dtype = dtype
        self.error = randn(rows, classes, seed=1, dtype=dtype)
        pairs = [
            saved_and_derivative(name, randn(rows, n, seed=2 + i, dtype=dtype))
            for i, (n, name) in enumerate(zip(widths, names, strict=True))
        ]
        self.saved = [saved for saved, _ in pairs]
        self.derivatives = [d for _, d in pairs]
        self.kinds = [KINDS[name][0] for name in names]
        self.params = [KINDS[name][1] for name in names]
        self.scales = [0.5 + 0.25 * i for i in range(len(widths))]
        self.seed = 2**40 + 7
        layers = len(widths)
        self.streams = [0] if self.options["shared"] else [5 + 3 * i for i in range(layers)]
        sizes = [max(widths, default=0)] if self.options["shared"] else widths
        distribution = self.options["distribution"]
        self.matrices = [
            unit_feedback(self.seed, classes, n, distribution, s).to(wide(dtype))
            for n, s in zip(sizes, self.streams, strict=True)
        ]

    def arguments(self):
        feedback = self.matrices if self.options["dense"] else []
        return self.error, feedback, self.saved, self.kinds, self.params, self.scales

    def schema_arguments(self):
        """As the op takes them, and its twin."""
        error, feedback, *others = self.arguments()
        code = DISTRIBUTIONS.index(self.options["distribution"])
        generated = (self.seed, self.streams, code)
        return error, feedback, *generated, *others, self.options["sum_error"], False

    def keywords(self):
        return dict(
            sum_error=self.options["sum_error"],
            seed=self.seed,
            streams=self.streams,
            distribution=self.options["distribution"],
        )

    def expected(self):
        factor = self.error.shape[0] if self.options["sum_error"] else 1
        deltas = []
        for i, (h, derivative) in enumerate(zip(self.saved, self.derivatives, strict=True)):
            B = self.matrices[i if len(self.matrices) > 1 else 0].double()[:, : h.shape[1]]
            deltas.append(self.scales[i] * factor * (self.error.double() @ B) * derivative)
        return deltas, [d.sum(0) for d in deltas]

    def check(self, tolerance=None):
        tolerance = DTYPES[self.dtype] if tolerance is None else tolerance
        if not self.options["dense"] and self.options["distribution"] == "normal":
            tolerance = max(tolerance, 1e-6)  # the logarithm of Box-Muller is taken in float32
        deltas, sums = fastdfa.ops.project_gate(*self.arguments(), **self.keywords())
        expected, expected_sums = self.expected()
        assert len(deltas) == len(sums) == len(expected)
        for delta, s, right, right_sum in zip(deltas, sums, expected, expected_sums, strict=True):
            assert delta.dtype == self.dtype and s.dtype == wide(self.dtype)
            assert delta.is_contiguous()
            assert_close(delta, right, tolerance)
            # The sum is of numbers that are not rounded to the narrow dtype yet; many cancel.
            scale = right.abs().sum(0).norm().clamp(min=1e-30)
            sum_tolerance = max(tolerance, 1e-12) if self.dtype == torch.float64 else 3e-6
            assert (s.double() - right_sum).norm() <= sum_tolerance * scale


def samples():
    """(op, arguments) as the dispatcher takes them, for float32."""
    ops = torch.ops.fastdfa
    for dense, shared in itertools.product([True, False], [True, False]):
        case = Case(7, 3, [5, 9], ["tanh", "gelu"], torch.float32, dense=dense, shared=shared)
        yield ops.project_gate, case.schema_arguments()
    in_a_row = randn(3, 7, 5).float().unbind()  # so are the deltas
    yield ops.project_gate, (
        randn(7, 3).float(), [randn(3, 5).float()], 0, [0], 0, list(in_a_row), [3] * 3, [0.0] * 3,
        [1.0] * 3, False, False,
    )  # fmt: skip
    yield ops.gate, (randn(7, 5).float(), randn(7, 5).float(), 3, 0.0)
    yield ops.gate, (randn(7, 5).bfloat16(), randn(7, 5).bfloat16(), 7, 0.0)
    for bias in (None, randn(5).float()):
        yield ops.activate_, (randn(7, 5).float(), bias, 1, 0.0)
    yield ops.fill_feedback_, (torch.empty(4, 9), 5, 0, 0)
    a, delta = randn(7, 5).float(), randn(7, 5, seed=1).float()
    vectors = [randn(5, seed=i).float().abs() for i in range(4)]
    for training, affine in itertools.product([True, False], [vectors[:2], [None, None]]):
        yield ops.batch_norm, (a, *affine, *vectors[2:], training, 0.1, 1e-5, 1, 0.0)
        yield ops.batch_norm_backward_, (delta, *vectors[:1], a, *vectors[1:3], affine[0], training)
    yield ops.batch_norm, (a.bfloat16(), *vectors, True, 0.1, 1e-5, 3, 0.0)
    yield ops.layer_norm, (a, *vectors[:2], 1e-5, 1, 0.0)
    rows = [randn(7, seed=i).float().abs() for i in range(2)]
    yield ops.layer_norm_backward_, (delta, a, *rows, vectors[0])
