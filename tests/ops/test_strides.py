"""The ops equal their formulas in float64 wherever their operands lie: hypothesis draws strides,
offsets, zero rows and columns, and dtypes. Around every operand in memory lies NaN, which an op
that reads or writes elsewhere would take or change."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from helpers.formulas import ACTIVATIONS, DISTRIBUTIONS, unit_feedback
from helpers.kernels import DTYPES, FROM_OUTPUT, KINDS, saved_and_derivative, wide
from helpers.networks import randn
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdfa

sizes = st.sampled_from([3, 1, 0, 2, 4, 5, 7, 8, 9, 16, 17, 33])
dtypes = st.sampled_from(list(DTYPES))
fuzzed = settings(max_examples=150)


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in memory."""

    steps: tuple = (1, 1)  # between its rows and columns
    offset: tuple = (0, 0)  # of the first, and as much behind the last
    transposed: bool = False
    repeated: str = ""  # "rows" or "columns" of stride 0

    def lay(self, x):
        """A tensor of these values that lies so, and the memory around it. Where rows or columns
        are repeated they are the first one."""
        if self.repeated == "rows":
            return Layout(self.steps, self.offset).lay(x[:1])[0].expand(x.shape), None
        if self.repeated == "columns":
            return Layout(self.steps, self.offset).lay(x[:, :1])[0].expand(x.shape), None
        order = (1, 0) if self.transposed else (0, 1)
        lengths = [
            2 * self.offset[d] + max(x.shape[d] * self.steps[d] - self.steps[d] + 1, 0)
            for d in (0, 1)
        ]
        memory = torch.full([lengths[d] for d in order], torch.nan, dtype=x.dtype)
        view = memory.T if self.transposed else memory
        for d in (0, 1):
            if x.shape[d]:
                start, step = self.offset[d], self.steps[d]
                stop = start + (x.shape[d] - 1) * step + 1
                view = view[start:stop:step] if d == 0 else view[:, start:stop:step]
            else:
                view = view[:0] if d == 0 else view[:, :0]
        view.copy_(x)
        return view, memory


steps = st.sampled_from([1, 1, 2, 3])
offsets = st.sampled_from([0, 0, 1, 2, 5])
layouts = st.builds(
    Layout, st.tuples(steps, steps), st.tuples(offsets, offsets), st.booleans(),
    st.sampled_from(["", "", "", "rows", "columns"]),
)  # fmt: skip


def matrix(rows, columns, seed, dtype, layout):
    """Numbers at random that lie so."""
    return layout.lay(randn(rows, columns, seed=seed, dtype=dtype))[0]


def same(actual, expected, size, tolerance):
    """`size` is that of the numbers that were added."""
    assert actual.shape == expected.shape
    distance = (actual.double() - expected).norm().item()
    assert distance <= tolerance * size.norm().item() + 1e-300, f"off by {distance:.3g}"


@fuzzed
@given(st.data())
def test_project_gate(data):
    draw = data.draw
    rows, classes, dtype = draw(sizes), draw(sizes), draw(dtypes)
    widths = draw(st.lists(sizes, min_size=1, max_size=3))
    names = [draw(st.sampled_from(list(KINDS))) for _ in widths]
    dense, shared, total = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    error = matrix(rows, classes, 1, dtype, draw(layouts))
    saved, derivatives = [], []
    for i, (n, name) in enumerate(zip(widths, names, strict=True)):
        layout = draw(layouts)
        a = matrix(rows, n, 2 + i, dtype, Layout(repeated=layout.repeated))
        h, derivative = saved_and_derivative(name, a)
        saved.append(layout.lay(h)[0])
        derivatives.append(derivative)
    streams = [0] if shared else [5 + i for i in range(len(widths))]
    columns = [max(widths)] if shared else widths
    feedback = [
        unit_feedback(7, classes, n, "uniform", s) for n, s in zip(columns, streams, strict=True)
    ]
    given_B = []
    if dense:
        more = draw(st.sampled_from([0, 3]))
        feedback = [torch.nn.functional.pad(B, (0, more)).to(wide(dtype)) for B in feedback]
        plain = [draw(layouts) for _ in feedback]
        plain = [Layout(p.steps, p.offset, p.transposed) for p in plain]
        given_B = [p.lay(B)[0] for p, B in zip(plain, feedback, strict=True)]
    scales = [0.5 + i for i in range(len(widths))]
    kinds, params = [KINDS[n][0] for n in names], [KINDS[n][1] for n in names]
    deltas, sums = fastdfa.ops.project_gate(
        error, given_B, saved, kinds, params, scales, sum_error=total, seed=7, streams=streams,
        distribution="uniform",
    )  # fmt: skip
    for i, (delta, s, f) in enumerate(zip(deltas, sums, derivatives, strict=True)):
        B = feedback[0 if shared else i].double()[:, : widths[i]]
        factor = scales[i] * (rows if total else 1)
        right = factor * (error.double() @ B) * f
        size = factor * (error.double().abs() @ B.abs()) * f.abs()
        tolerance = DTYPES[dtype] if dense else max(DTYPES[dtype], 1e-6)
        same(delta, right, size, tolerance)
        exact = 1e-12 if dtype == torch.float64 else 3e-6
        same(s, right.sum(0), size.sum(0), exact if dense else max(exact, 1e-6))


@fuzzed
@given(sizes, sizes, dtypes, st.sampled_from(list(KINDS)), layouts, layouts)
def test_gate(rows, n, dtype, name, lies, saved_lies):
    grad = matrix(rows, n, 1, dtype, lies)
    a = matrix(rows, n, 2, dtype, Layout(repeated=saved_lies.repeated))
    saved, derivative = saved_and_derivative(name, a)
    delta, total = fastdfa.ops.gate(grad, saved_lies.lay(saved)[0], *KINDS[name][:2])
    right = grad.double() * derivative
    same(delta, right, right, DTYPES[dtype])
    same(total, right.sum(0), right.abs().sum(0), 1e-12 if dtype == torch.float64 else 3e-6)


@fuzzed
@given(st.data())
def test_linear_chain(data):
    draw = data.draw
    rows, dtype = draw(sizes), draw(dtypes)
    widths = draw(st.lists(sizes, min_size=2, max_size=4))
    names = [draw(st.sampled_from(FROM_OUTPUT)) for _ in widths[1:]]
    of_weights = draw(st.sampled_from(list(dict.fromkeys([dtype, wide(dtype)]))))
    x, weights, biases = matrix(rows, widths[0], 1, dtype, draw(layouts)), [], []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        weights.append(matrix(m, n, 2 + i, of_weights, draw(layouts)))
        bias = matrix(m, 1, 9 + i, draw(st.sampled_from([dtype, wide(dtype)])), draw(layouts))[:, 0]
        biases.append(draw(st.sampled_from([bias, None])))
    kinds, params = [KINDS[n][0] for n in names], [KINDS[n][1] for n in names]
    outputs = fastdfa.ops.linear_chain(x, weights, biases, kinds, params)
    h = x
    for out, W, b, name in zip(outputs, weights, biases, names, strict=True):
        rounded = W.to(dtype).double()
        a, size = h.double() @ rounded.T, h.double().abs() @ rounded.abs().T
        if b is not None:
            a, size = a + b.double(), size + b.double().abs()
        assert out.dtype == dtype and out.is_contiguous()
        same(out, ACTIVATIONS[name].f(a), size + 1, DTYPES[dtype])  # no f is steeper than 1
        h = out


@fuzzed
@given(st.data())
def test_weight_gradients(data):
    draw = data.draw
    dtype, deltas, inputs = draw(dtypes), [], []
    for i in range(draw(st.integers(1, 3))):
        rows = draw(sizes)
        deltas.append(matrix(rows, draw(sizes), 1 + i, dtype, draw(layouts)))
        inputs.append(matrix(rows, draw(sizes), 7 + i, dtype, draw(layouts)))
    found = fastdfa.ops.weight_gradients(deltas, inputs)
    for actual, d, x in zip(found, deltas, inputs, strict=True):
        size = d.double().abs().T @ x.double().abs()
        same(actual, d.double().T @ x.double(), size, DTYPES[dtype])


@fuzzed
@given(sizes, sizes, dtypes, st.sampled_from(DISTRIBUTIONS), layouts)
def test_fill_feedback(rows, n, dtype, distribution, layout):
    """Rows are contiguous, what lies between them is left alone."""
    layout = Layout((layout.steps[0], 1), layout.offset)
    out, memory = layout.lay(torch.zeros(rows, n, dtype=dtype))
    before = memory.isnan()
    fastdfa.ops.fill_feedback_(out, 2**40 + 7, 3, distribution)
    right = unit_feedback(2**40 + 7, rows, n, distribution, 3)
    same(out, right, right, max(DTYPES[dtype], 1e-6))
    assert torch.equal(memory.isnan(), before)


@fuzzed
@given(st.data())
def test_activate(data):
    draw = data.draw
    rows, n, dtype, name = (
        draw(sizes),
        draw(sizes),
        draw(dtypes),
        draw(st.sampled_from(FROM_OUTPUT)),
    )
    start = draw(offsets)
    memory = torch.full((rows * n + 2 * start,), torch.nan, dtype=dtype)
    x = memory[start : start + rows * n].view(rows, n).copy_(randn(rows, n, dtype=dtype))
    bias = matrix(n, 1, 1, draw(st.sampled_from([dtype, wide(dtype)])), draw(layouts))[:, 0]
    bias = draw(st.sampled_from([bias, None]))
    a = x.double() + (0 if bias is None else bias.double())
    fastdfa.ops.activate_(x, bias, *KINDS[name][:2])
    right = ACTIVATIONS[name].f(a)
    same(x, right, a.abs() + 1, DTYPES[dtype])
    assert memory[:start].isnan().all() and memory[start + rows * n :].isnan().all()


@pytest.mark.parametrize("layout", [
    Layout((2, 3), (1, 2)), Layout(transposed=True, offset=(5, 1)), Layout((3, 1), (0, 1), True),
])  # fmt: skip
def test_a_layout_holds_its_values_amid_nan(layout):
    x = randn(4, 5)
    view, memory = layout.lay(x)
    assert torch.equal(view, x) and memory.isnan().sum() == memory.numel() - 20 > 0
