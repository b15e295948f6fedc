"""Boundaries that are not cut: `ops.backpropagate` equals the formula, by either library."""

import itertools

import pytest
import torch
from helpers.kernels import (
    DTYPES,
    KINDS,
    REFUSED,
    needs_bfloat16,
    needs_extension,
    saved_and_derivative,
)
from helpers.networks import assert_close, randn
from torch.utils.flop_counter import FlopCounterMode

from fastdfa import ops
from fastdfa.ops import products, reference


@pytest.fixture(params=["torch", pytest.param("fastdfa", marks=needs_extension)])
def library(request, monkeypatch):
    monkeypatch.setattr(products, "library", lambda: request.param)
    return request.param


class Case:
    """Arguments of `backpropagate`, from the top boundary down, and what must come."""

    def __init__(self, rows, widths, names, dtype=torch.float64, wide=False):
        self.dtype = dtype
        self.weight_dtype = reference.accumulation_dtype(dtype) if wide else dtype
        self.delta = randn(rows, widths[0], seed=1, dtype=dtype)
        self.weights = [
            (randn(n, k, seed=9 + i) / n**0.5).to(self.weight_dtype)
            for i, (n, k) in enumerate(itertools.pairwise(widths))
        ]
        pairs = [
            saved_and_derivative(name, randn(rows, n, seed=70 + i, dtype=dtype))
            for i, (n, name) in enumerate(zip(widths[1:], names, strict=True))
        ]
        self.saved = [saved for saved, _ in pairs]
        self.derivatives = [derivative for _, derivative in pairs]
        self.kinds = [KINDS[name][0] for name in names]
        self.params = [KINDS[name][1] for name in names]

    def arguments(self):
        return self.delta, self.weights, self.saved, self.kinds, self.params

    def check(self, deltas, sums, tolerance=None):
        """Each delta from the one above as it was rounded: then only its own rounding is left."""
        tolerance = tolerance or DTYPES[self.dtype]
        assert len(deltas) == len(sums) == len(self.weights)
        above = self.delta
        for delta, total, weight, derivative in zip(
            deltas, sums, self.weights, self.derivatives, strict=True
        ):
            rounded = weight.to(self.dtype)
            expected = (above.double() @ rounded.double()) * derivative
            assert delta.dtype == self.dtype and delta.shape == expected.shape
            assert delta.is_contiguous()
            assert_close(delta, expected, tolerance)
            assert total.dtype == reference.accumulation_dtype(self.dtype)
            assert_close(total, expected.sum(0), tolerance)
            above = delta


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_and_dtype(library, name, dtype, wide):
    case = Case(50, [6, 40, 11], [name, name], dtype, wide)
    case.check(*ops.backpropagate(*case.arguments()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows, widths", [
    (1, [1, 1]), (1, [5, 300]), (7, [33, 17, 5]), (130, [257, 129, 300, 64]),
    (65, [10, 65, 65, 65, 784]), (97, [5, 1, 700]), (200, [1030, 520]), (49, [9] * 30),
])  # fmt: skip
def test_odd_sizes(library, rows, widths, dtype):
    names = [list(KINDS)[i % len(KINDS)] for i in range(len(widths) - 1)]
    case = Case(rows, widths, names, dtype, wide=dtype == torch.bfloat16)
    case.check(*ops.backpropagate(*case.arguments()))


@pytest.mark.parametrize("rows, above, below", [(0, 5, 4), (5, 0, 4), (5, 4, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing(library, rows, above, below, dtype):
    case = Case(rows, [3, above, below], ["tanh", "silu"], dtype, wide=True)
    deltas, sums = ops.backpropagate(*case.arguments())
    assert [d.shape for d in deltas] == [(rows, above), (rows, below)]
    assert [s.shape for s in sums] == [(above,), (below,)]
    assert not any(s.any() for s in sums) or rows > 0
    assert above > 0 or not deltas[1].any()


def test_no_boundary(library):
    assert ops.backpropagate(randn(3, 2), [], [], [], []) == ([], [])


def views(plain):
    """The same matrix, as it may lie in memory."""
    rows, columns = plain.shape
    yield plain.T.contiguous().T
    wide = plain.new_zeros(2 * rows, 2 * columns + 3)
    wide[::2, 3::2] = plain
    yield wide[::2, 3::2]
    apart = plain.new_zeros(rows, columns + 5)
    apart[:, 5:] = plain
    yield apart[:, 5:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides(library, dtype):
    case = Case(50, [21, 20, 9], ["tanh", "gelu"], dtype, wide=True)
    for delta in views(case.delta):
        for weights in zip(*map(views, case.weights), strict=True):
            for saved in zip(*map(views, case.saved), strict=True):
                arguments = delta, list(weights), list(saved), case.kinds, case.params
                case.check(*ops.backpropagate(*arguments))
    case.delta = case.delta[:1].expand(50, 21)
    case.check(*ops.backpropagate(*case.arguments()))


def test_what_the_identity_saved_is_not_read(library):
    case = Case(7, [3, 5], ["none"])
    case.saved = [torch.full((7, 5), torch.nan, dtype=torch.float64)]
    case.check(*ops.backpropagate(*case.arguments()))


def test_the_arguments_stay_as_they_are(library):
    case = Case(7, [3, 5, 4], ["tanh", "relu"])
    before = [t.clone() for t in (case.delta, *case.weights, *case.saved)]
    for parameter in case.weights:
        parameter.requires_grad_()
    with torch.no_grad():
        ops.backpropagate(*case.arguments())
    after = (case.delta, *case.weights, *case.saved)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", [
    torch.float32, torch.float64, pytest.param(torch.bfloat16, marks=needs_bfloat16),
])  # fmt: skip
def test_the_numbers_do_not_depend_on_the_threads(monkeypatch, dtype):
    monkeypatch.setattr(products, "library", lambda: "fastdfa")
    case = Case(333, [70, 200, 90, 1100, 64], ["tanh", "relu", "silu", "none"], dtype, wide=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5, 16):
            torch.set_num_threads(count)
            deltas, sums = ops.backpropagate(*case.arguments())
            results.append(deltas + sums)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@needs_bfloat16
def test_sums_of_bfloat16_are_made_before_the_deltas_are_rounded(monkeypatch):
    monkeypatch.setattr(products, "library", lambda: "fastdfa")
    case = Case(130, [40, 30], ["tanh"], torch.bfloat16, wide=True)
    case.check(*ops.backpropagate(*case.arguments()))
    _, (total,) = ops.backpropagate(*case.arguments())
    product = case.delta.double() @ case.weights[0].bfloat16().double()
    assert_close(total, (product * case.derivatives[0]).sum(0), 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_the_twin(name, dtype):
    case = Case(9, [6, 40, 11], [name, name], dtype)
    results = reference.backpropagate(*case.arguments())
    case.check(results[:2], results[2:])


@pytest.mark.parametrize("instructions", [True, False])
def test_float16(library, monkeypatch, instructions):
    """In float32, where the processor has no products of it; deltas are rounded from stage to
    stage either way."""
    monkeypatch.setattr(products, "_has_float16_products", lambda: instructions)
    for wide in (True, False):
        case = Case(9, [20, 30, 10], ["tanh", "gelu"], torch.float16, wide)
        case.check(*ops.backpropagate(*case.arguments()))


def test_a_traced_call_is_of_torch_alone(library):
    case = Case(7, [3, 5, 4], ["tanh", "gelu"])
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(ops.backpropagate, backend=backend, fullgraph=True)
    case.check(*compiled(*case.arguments()))
    assert targets and not any("fastdfa" in str(target) for target in targets)


def test_flops(library):
    case = Case(8, [20, 30, 5], ["tanh", "relu"])
    with FlopCounterMode(display=False) as counter:
        ops.backpropagate(*case.arguments())
    assert counter.get_total_flops() == 2 * 8 * (20 * 30 + 30 * 5)


@needs_extension
@pytest.mark.parametrize("dtype", [
    torch.float32, torch.float64, pytest.param(torch.bfloat16, marks=needs_bfloat16),
])  # fmt: skip
def test_opcheck(dtype):
    case = Case(7, [3, 5, 4], ["tanh", "gelu"], dtype, wide=True)
    torch.library.opcheck(torch.ops.fastdfa.backpropagate.default, case.arguments())


CHANGES = [
    (dict(delta=randn(6)), ["delta", "[6]"]),
    (dict(delta=randn(6, 5).long()), ["delta", "float64", "int64"]),
    (dict(delta=randn(6, 4)), ["weights[0]", "4 rows", "[5, 8]"]),
    (dict(delta=randn(7, 5)), ["saved[0]", "7, 8", "6, 8"]),
    (dict(weights=[randn(5, 8), randn(7, 3)]), ["weights[1]", "8 rows", "[7, 3]"]),
    (dict(weights=[randn(5, 8), randn(8)]), ["weights[1]", "two dimensions", "[8]"]),
    (dict(weights=[randn(5, 8), randn(8, 3).float()]), ["weights[1]", "float64", "float32"]),
    (dict(weights=[randn(5, 8), randn(8, 3).to("meta")]), ["weights[1]", "cpu", "meta"]),
    (dict(weights=[randn(5, 8)]), ["saved", "1", "2"]),
    (dict(saved=[randn(6, 8), randn(6, 4)]), ["saved[1]", "6, 3", "6, 4"]),
    (dict(saved=[randn(6, 8), randn(6, 3).float()]), ["saved[1]", "float64", "float32"]),
    (dict(saved=[randn(6, 8), randn(6, 3).to("meta")]), ["saved[1]", "cpu", "meta"]),
    (dict(kinds=[3, 10]), ["kind", "9", "10"]),
    (dict(kinds=[3, -1]), ["kind", "9", "-1"]),
    (dict(kinds=[3]), ["kinds", "2", "1"]),
    (dict(params=[0.0, -1.0]), ["param", "negative", "-1"]),
    (dict(params=[0.0]), ["params", "2", "1"]),
]


def changed(changes):
    arguments = dict(
        delta=randn(6, 5), weights=[randn(5, 8), randn(8, 3)], saved=[randn(6, 8), randn(6, 3)],
        kinds=[3, 3], params=[0.0, 0.0],
    )  # fmt: skip
    return (arguments | changes).values()


@pytest.mark.parametrize("changes, words", CHANGES)
def test_refused(library, changes, words):
    with pytest.raises((TypeError, ValueError)) as error:
        ops.backpropagate(*changed(changes))
    for word in words:
        word = word.replace("[", "(") if word[1:2].isdigit() else word
        assert word.rstrip("]") in str(error.value), str(error.value)


def test_a_list_for_the_delta_is_refused(library):
    with pytest.raises(TypeError, match="delta must be a tensor, got list"):
        ops.backpropagate([[1.0]], [], [], [], [])


@needs_extension
@pytest.mark.parametrize("changes, words", CHANGES)
def test_the_library_itself_checks(changes, words):
    with pytest.raises(REFUSED) as error:
        torch.ops.fastdfa.backpropagate(*changed(changes))
    assert words[0] in str(error.value), str(error.value)
