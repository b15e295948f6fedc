"""The matrix products of the fused layers: right by either library, and counted as FLOPs."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from helpers.formulas import ACTIVATIONS
from helpers.kernels import FROM_OUTPUT, KINDS, REFUSED, needs_bfloat16, needs_extension
from helpers.networks import (
    assert_close,
    blockwise_gradients,
    expected_gradients,
    gradients,
    mlp,
    randn,
    step,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastdfa
from fastdfa import ops
from fastdfa.engine import stages
from fastdfa.ops import products as gemm
from fastdfa.ops import reference

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture(params=["torch", pytest.param("fastdfa", marks=needs_extension)])
def library(request, monkeypatch):
    monkeypatch.setattr(gemm, "library", lambda: request.param)
    return request.param


def layers(widths, names, bias=True, dtype=torch.float64):
    """Weights, biases, kinds and params of a chain."""
    pairs = list(itertools.pairwise(widths))
    weights = [randn(n, k, seed=5 + i, dtype=dtype) / k**0.5 for i, (k, n) in enumerate(pairs)]
    biases = [randn(n, seed=50 + n, dtype=dtype) if bias else None for _, n in pairs]
    kinds, params, _ = zip(*[KINDS[name] for name in names], strict=True)
    return weights, biases, kinds, params


def by_hand(x, weights, biases, names):
    outputs, h = [], x.double()
    for weight, bias, name in zip(weights, biases, names, strict=True):
        a = h @ weight.double().T
        h = ACTIVATIONS[name].f(a if bias is None else a + bias.double())
        outputs.append(h)
    return outputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows, widths", [
    (1, [1, 1]), (7, [33, 17, 5]), (130, [257, 129, 300, 64]), (65, [784, 65, 65, 65, 65]),
    (3, [5, 1, 700]), (200, [600, 520]),
])  # fmt: skip
def test_chain(library, rows, widths, dtype, bias):
    names = [FROM_OUTPUT[i % len(FROM_OUTPUT)] for i in range(len(widths) - 1)]
    x = randn(rows, widths[0], dtype=dtype)
    weights, biases, kinds, params = layers(widths, names, bias, dtype)
    got = ops.linear_chain(x, weights, biases, kinds, params)
    for h, expected in zip(got, by_hand(x, weights, biases, names), strict=True):
        assert h.dtype == dtype and h.is_contiguous()
        assert_close(h, expected, 10 * TOLERANCES[dtype])


@pytest.mark.parametrize("name", FROM_OUTPUT)
def test_chain_of_every_kind(library, name):
    x, chain = randn(9, 6), layers([6, 40, 11], [name, name])
    expected = by_hand(x, *chain[:2], [name, name])
    for got in (ops.linear_chain(x, *chain), reference.linear_chain(x, *chain)):
        assert_close(dict(enumerate(got)), dict(enumerate(expected)), 1e-12)


def odd_views(rows, columns, dtype, seed=0):
    """The same matrix, as it may lie in memory."""
    plain = randn(rows, columns, seed=seed, dtype=dtype)
    wide = plain.new_zeros(2 * rows, 2 * columns + 3)
    wide[::2, 3::2] = plain
    rows_apart = plain.new_zeros(rows, columns + 5)
    rows_apart[:, 5:] = plain
    yield from (plain, plain.T.contiguous().T, rows_apart[:, 5:], wide[::2, 3::2])
    yield plain[:1].expand(rows, columns)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chain_of_any_strides(library, dtype):
    weights, biases, kinds, params = layers([20, 30], ["tanh"], dtype=dtype)
    for x in odd_views(50, 20, dtype):
        for weight in odd_views(30, 20, dtype, seed=3):
            (got,) = ops.linear_chain(x, [weight], biases, kinds, params)
            expected = by_hand(x, [weight], biases, ["tanh"])
            assert_close(got, expected[0], 10 * TOLERANCES[dtype])
    gap = randn(60, dtype=dtype)[::2]  # a bias that is not contiguous
    (got,) = ops.linear_chain(x, weights, [gap], kinds, params)
    assert_close(got, by_hand(x, weights, [gap], ["tanh"])[0], 10 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_weight_gradients(library, dtype):
    """Of several layers at once, of any sizes and strides."""
    sizes = [(1, 1, 1), (65, 17, 33), (130, 300, 70), (33, 40, 600), (513, 20, 9)]
    deltas = [randn(m, n, seed=n, dtype=dtype) for m, n, _ in sizes]
    inputs = [randn(m, k, seed=k, dtype=dtype) for m, _, k in sizes]
    deltas += list(odd_views(50, 20, dtype))
    inputs += list(odd_views(50, 31, dtype, seed=1))
    got = ops.weight_gradients(deltas, inputs)
    assert len(got) == len(deltas)
    for grad, d, x in zip(got, deltas, inputs, strict=True):
        assert grad.dtype == dtype and grad.is_contiguous()
        assert_close(grad, d.double().T @ x.double(), 10 * TOLERANCES[dtype])


class Products(TorchDispatchMode):
    """Counts torch's matrix products, of one pair of matrices, and batches by their sizes; and our
    forward products."""

    def __init__(self):
        super().__init__()
        self.single, self.batches, self.ours = 0, [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        packet = op.overloadpacket
        self.single += packet is torch.ops.aten.mm
        self.ours += op.name() == "fastdfa::linear_chain"
        if packet is torch.ops.aten.bmm:
            self.batches.append(len(args[0]))
        return op(*args, **(kwargs or {}))


def in_a_row(count, rows, columns, dtype, seed):
    return list(randn(count, rows, columns, seed=seed, dtype=dtype).unbind())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_that_lie_in_a_row_are_one_product(monkeypatch, dtype):
    """Both their deltas and their inputs; as long as a product is small."""
    monkeypatch.setattr(gemm, "library", lambda: "torch")
    d, x = (in_a_row(9, 7, n, dtype, n) for n in (6, 5))
    wide_d, wide_x = (in_a_row(2, 7, n, dtype, n) for n in (300, 301))
    odd = [t.T.contiguous().T for t in d[:3]]
    expected = [  # deltas, inputs, batches, single products
        (d, x, [9], 0),
        (d[:4] + wide_d + d[4:], x[:4] + wide_x + x[4:], [4, 5], 2),
        (d[::-1], x[::-1], [], 9),
        (d[:2] + d[3:5], x[:2] + x[3:5], [2, 2], 0),
        (d[:4], x[1:3] + x[1:3], [2, 2], 0),
        (d[:3], [t.clone() for t in x[:3]], [], 3),
        (odd, x[:3], [], 3),
        ([t[:, :3] for t in d[:3]], x[:3], [], 3),
        ([t[:4] for t in d[:3]], [t[:4] for t in x[:3]], [], 3),
        (d[:1], x[:1], [], 1),
    ]
    for deltas, inputs, batches, single in expected:
        with Products() as products:
            grads = ops.weight_gradients(deltas, inputs)
        assert (products.batches, products.single) == (batches, single)
        assert len(grads) == len(deltas)
        for grad, delta, h in zip(grads, deltas, inputs, strict=True):
            assert grad.dtype == dtype and grad.is_contiguous()
            tolerance = TOLERANCES.get(dtype, 4e-3)
            assert_close(grad, delta.double().T @ h.double(), 10 * tolerance)


@needs_extension
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("rows", [(6,), (2, 3), (1,)])
def test_the_layers_of_a_chain_lie_in_a_row(monkeypatch, rows, autocast):
    """A step makes the weight gradients of neighbours of one width by one product; and .grad takes
    them over without a copy."""
    monkeypatch.setattr(gemm, "library", lambda: "torch")
    model = mlp([5, 8, 8, 8, 9, 9, 9, 9, 3], "tanh", dtype=torch.float32)
    x, g = randn(*rows, 5).float(), randn(*rows, 3).float()
    made, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *pair: made.append(bmm(*pair)) or made[-1])
    for _ in range(2):  # the plan is kept
        model.zero_grad(set_to_none=False)  # goes through what .grad holds
        model.zero_grad()
        made.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Products() as products:
            y = model(x)
        with products:
            (y * g).sum().backward()
        assert products.batches == [2, 3]
        e = g.reshape(-1, 3)
        expected = expected_gradients(model, x.reshape(-1, 5), e)
        assert_close(gradients(model), expected, 3e-2 if autocast else 1e-5)
        held = [layer.weight.grad.data_ptr() for layer in model.module[1:7]]
        taken = [part.data_ptr() for grads in made for part in grads]
        if not autocast:  # else they are cast
            assert [*held[:2], *held[3:]] == taken


def test_outputs_that_share_a_buffer_are_bounded(monkeypatch):
    """Those of one buffer are freed together: as many as a step may hold at a time."""
    monkeypatch.setattr(gemm, "library", lambda: "torch")
    monkeypatch.setitem(gemm._BUFFER_BYTES, "cpu", 2 * 6 * 8 * 8)
    outputs = ops.linear_chain(randn(6, 8), *layers([8] * 6, ["tanh"] * 5))
    storages = [h.untyped_storage().data_ptr() for h in outputs]
    assert [storages.count(each) for each in storages] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("rows, k, n", [(0, 5, 4), (5, 0, 4), (5, 4, 0)])
def test_empty(library, rows, k, n):
    x, weight, bias = torch.randn(rows, k), torch.randn(n, k), torch.randn(n)
    (h,) = ops.linear_chain(x, [weight], [bias], [3], [0.0])
    assert_close(h, torch.tanh(x @ weight.T + bias), 1e-6)
    (grad,) = ops.weight_gradients([torch.randn(rows, n)], [x])
    assert grad.shape == (n, k) and (rows > 0 or not grad.any())
    pair = torch.randn(2, rows, n).unbind(), torch.randn(2, rows, k).unbind()
    assert [g.shape for g in ops.weight_gradients(*pair)] == [(n, k)] * 2
    assert list(ops.weight_gradients([], [])) == []
    assert list(ops.linear_chain(x, [], [], [], [])) == []


@needs_extension
def test_the_numbers_do_not_depend_on_the_threads(monkeypatch):
    monkeypatch.setattr(gemm, "library", lambda: "fastdfa")
    x, chain = (
        randn(130, 70).float(),
        layers([70, 200, 90, 1100], ["tanh"] * 3, dtype=torch.float32),
    )
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            hidden = ops.linear_chain(x, *chain)
            results.append(hidden + ops.weight_gradients(hidden, [x, *hidden[:-1]]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("dtype, instructions, products", [
    (torch.bfloat16, False, 3), (torch.float16, True, 3), (torch.float16, False, 0),
])  # fmt: skip
def test_half_precision(library, monkeypatch, dtype, instructions, products):
    """Multiplied by torch, but float16 in float32 where the processor has no products of it."""
    monkeypatch.setattr(gemm, "_has_float16_products", lambda: instructions)
    names, tolerance = ["tanh", "relu"], 2 * torch.finfo(dtype).eps
    weights, biases, kinds, params = layers([20, 30, 10], names)
    x, narrow = randn(9, 20).to(dtype), [w.to(dtype) for w in weights]
    for wide in (True, False):  # the dtype of the biases
        some = [b.float() if wide else b.to(dtype) for b in biases]
        with HalfProducts() as made:
            got = ops.linear_chain(x, narrow, some, kinds, params)
            (grad,) = ops.weight_gradients([got[0]], [x])
        assert made.count == products
        assert all(h.dtype == dtype and h.is_contiguous() for h in (*got, grad))
        assert_close(
            dict(enumerate(got)), dict(enumerate(by_hand(x, narrow, some, names))), tolerance
        )
        assert_close(grad, got[0].double().T @ x.double(), tolerance)


class HalfProducts(TorchDispatchMode):
    """Counts torch's matrix products of 16 bits."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket is torch.ops.aten.mm and args[0].itemsize == 2
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("instructions, products", [(True, 3), (False, 1)])
def test_a_step_under_float16_autocast(library, monkeypatch, path, instructions, products):
    """The head alone is left to torch."""
    monkeypatch.setattr(gemm, "_has_float16_products", lambda: instructions)
    model = mlp([16, 33, 24, 3], "tanh", dtype=torch.float32)
    x, g = randn(20, 16).float(), randn(20, 3).float()
    with torch.autocast("cpu", torch.float16):
        y = model(x)
    assert y.dtype == torch.float16
    assert (y.grad_fn.name() == "SegmentNodeBackward") == (path == "network")
    with HalfProducts() as made:
        (y.float() * g).sum().backward()
    assert made.count == products
    assert_close(gradients(model), expected_gradients(model, x, g), 3e-3)


def test_float16_beside_another_dtype_is_refused(monkeypatch):
    monkeypatch.setattr(gemm, "_has_float16_products", lambda: False)
    x, weight = torch.randn(7, 5).half(), torch.randn(3, 5).double()
    with pytest.raises(TypeError, match=r"weights\[0\] .*float16, got torch.float64"):
        ops.linear_chain(x, [weight], [None], [0], [0.0])
    with pytest.raises(TypeError, match=r"inputs\[0\] .*float16, got torch.float32"):
        ops.weight_gradients([x], [torch.randn(7, 3)])


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, widths", [
    (1, [1, 1]), (7, [33, 17, 5]), (130, [257, 129, 300, 64]), (65, [784, 65, 65, 65, 65]),
    (3, [5, 1, 700]), (200, [2100, 520]),
])  # fmt: skip
def test_chain_of_bfloat16(monkeypatch, rows, widths, bias):
    """Each layer from what the one before has rounded: then only its own rounding is left."""
    monkeypatch.setattr(gemm, "library", lambda: "fastdfa")
    names = [FROM_OUTPUT[i % len(FROM_OUTPUT)] for i in range(len(widths) - 1)]
    x = randn(rows, widths[0], dtype=torch.bfloat16)
    weights, biases, kinds, params = layers(widths, names, bias, torch.float32)
    rounded = [weight.bfloat16() for weight in weights]
    got = ops.linear_chain(x, weights, biases, kinds, params)
    for i, h in enumerate(got):
        (expected,) = by_hand(x, rounded[i : i + 1], biases[i : i + 1], names[i : i + 1])
        assert h.dtype == torch.bfloat16 and h.is_contiguous()
        assert_close(h, expected, torch.finfo(torch.bfloat16).eps / 2)
        x = h


@needs_bfloat16
def test_products_of_bfloat16_of_any_strides(monkeypatch):
    """Gradients are sums in float32, exact to its rounding, and never rounded to bfloat16."""
    monkeypatch.setattr(gemm, "library", lambda: "fastdfa")
    _, biases, kinds, params = layers([21, 30], ["tanh"], dtype=torch.float32)
    for x in odd_views(50, 21, torch.bfloat16):
        for weight in odd_views(30, 21, torch.float32, seed=3):
            (got,) = ops.linear_chain(x, [weight], biases, kinds, params)
            (expected,) = by_hand(x, [weight.bfloat16()], biases, ["tanh"])
            assert_close(got, expected, torch.finfo(torch.bfloat16).eps / 2)
    sizes = [(1, 1, 1), (65, 17, 33), (130, 300, 70), (33, 40, 600), (1025, 20, 9)]
    deltas = [randn(m, n, seed=n, dtype=torch.bfloat16) for m, n, _ in sizes]
    inputs = [randn(m, k, seed=k, dtype=torch.bfloat16) for m, _, k in sizes]
    deltas += list(odd_views(50, 20, torch.bfloat16))
    inputs += list(odd_views(50, 31, torch.bfloat16, seed=1))
    got = ops.weight_gradients(deltas, inputs, wide=True)
    assert len(got) == len(deltas)
    for grad, d, x in zip(got, deltas, inputs, strict=True):
        assert grad.dtype == torch.float32 and grad.is_contiguous()
        assert_close(grad, d.double().T @ x.double(), 2e-6)


def test_half_precision_by_torch(monkeypatch):
    """bfloat16 and float16 are multiplied by torch, and biased and activated by the kernels."""
    monkeypatch.setattr(gemm, "library", lambda: "torch")
    weights, biases, kinds, params = layers([20, 30, 10], ["tanh", "relu"])
    for dtype in (torch.bfloat16, torch.float16):
        x, narrow = randn(9, 20).to(dtype), [w.to(dtype) for w in weights]
        floats = [b.float() for b in biases]
        got = ops.linear_chain(x, narrow, floats, kinds, params)
        expected = by_hand(x, narrow, biases, ["tanh", "relu"])
        assert_close(dict(enumerate(got)), dict(enumerate(expected)), 2e-2)
        wide = ops.linear_chain(x, [w.float() for w in narrow], floats, kinds, params)
        for got_h, wide_h in zip(got, wide, strict=True):
            assert torch.equal(got_h, wide_h)
        (grad,) = ops.weight_gradients([got[0]], [x])
        assert_close(grad, got[0].double().T @ x.double(), 2e-2)
        (wide_grad,) = ops.weight_gradients([got[0]], [x], wide=True)
        assert grad.dtype == dtype and wide_grad.dtype == torch.float32
        assert_close(wide_grad, grad.double(), torch.finfo(dtype).eps)


def test_flops_of_a_step_are_the_same(library):
    model = mlp([20, 30, 30, 3], "tanh", bias=False).float()
    x = torch.randn(8, 20)
    model(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    forward = 2 * 8 * (20 * 30 + 30 * 30 + 30 * 3)
    assert counter.get_total_flops() >= 2 * forward
    assert counter.get_total_flops() <= 2 * forward + 2 * 8 * 3 * (30 + 30)


def samples():
    """(op, arguments) as the dispatcher takes them."""
    chain = torch.ops.fastdfa.linear_chain
    x = randn(7, 5).float()
    for bias in (True, False):
        yield chain, (x, *layers([5, 9, 4], ["tanh", "elu"], bias, torch.float32))
    deltas = [randn(7, 5), randn(3, 2)]
    yield torch.ops.fastdfa.weight_gradients, (deltas, [randn(7, 4), randn(3, 8)])


def normalised(fastdfa_or_torch, bias=True):
    """Layers without an activation of their own: behind one a norm, behind another what modifies
    its output in place. Returns blocks, between which a DFA cuts."""
    torch.manual_seed(0)
    Linear = fastdfa_or_torch.Linear
    blocks = [
        nn.Sequential(Linear(20, 33, bias), nn.LayerNorm(33), nn.Tanh()),
        nn.Sequential(Linear(33, 10, bias), nn.ReLU(inplace=True)),
        Linear(10, 3),
    ]
    return [block.double() for block in blocks]


@needs_extension
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("paying", [1, 2**40])
def test_layers_without_an_activation(monkeypatch, paying, bias):
    """By our products from some size on; DFA by definition either way."""
    monkeypatch.setattr(gemm, "library", lambda: "fastdfa")
    monkeypatch.setattr(stages, "_PAYING", paying)
    x, g = randn(9, 20), randn(9, 3, seed=1)
    model = fastdfa.DFA(nn.Sequential(*normalised(fastdfa, bias)))
    model.looks_ahead = False  # a network of them multiplies by our products, however small
    with Products() as products:
        step(model, x, g)
    assert products.ours == (3 if paying == 1 else 0)
    feedback = [model.feedback_matrix(name) for name in model.feedback_points]
    expected, _ = blockwise_gradients(normalised(nn, bias), x, g, feedback)
    found = gradients(model)
    for i, block in enumerate(expected):
        assert_close({name: found[f"{i}.{name}"] for name in block}, block, 1e-12)


@needs_bfloat16
def test_layers_without_an_activation_under_autocast(monkeypatch):
    """bfloat16 as torch casts it, but weights are not cast and gradients are not rounded."""
    x, g, seen = randn(9, 20).float(), randn(9, 3, seed=1).float(), []

    def trained(paying):
        monkeypatch.setattr(stages, "_PAYING", paying)
        model = fastdfa.DFA(nn.Sequential(*normalised(fastdfa))).float()
        hook = model.module[0][0].register_forward_hook(lambda m, args, y: seen.append(y.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        (y.float() * g).sum().backward()
        hook.remove()
        return gradients(model)

    monkeypatch.setattr(gemm, "library", lambda: "fastdfa")
    ours, casts = trained(1), trained(2**40)
    assert seen == [torch.bfloat16] * 2
    assert all(grad.dtype == torch.float32 for grad in ours.values())
    assert_close(ours, casts, 0.05)
    assert not torch.equal(ours["0.0.weight"], ours["0.0.weight"].bfloat16().float())


@needs_extension
@pytest.mark.parametrize("index", range(3))
def test_opcheck(index):
    op, arguments = list(samples())[index]
    torch.library.opcheck(op.default, arguments)


@needs_bfloat16
def test_opcheck_of_bfloat16():
    x, chain = randn(7, 5).bfloat16(), layers([5, 9, 4], ["tanh", "elu"], dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastdfa.linear_chain.default, (x, *chain))
    torch.library.opcheck(torch.ops.fastdfa.weight_gradients.default, ([x], [x]))


@needs_extension
@pytest.mark.parametrize("changes, words", [
    (dict(x=randn(6)), ["x", "[6]"]),
    (dict(x=randn(6, 5).half()), ["x", "float64", "Half"]),
    (dict(x=randn(6, 5).bfloat16()), ["weights[0]", "Float", "Double"]),
    (dict(x=randn(6, 4)), ["weights[0]", "4 columns", "[8, 5]"]),
    (dict(weights=[randn(8, 5), randn(3, 7)]), ["weights[1]", "8 columns", "[3, 7]"]),
    (dict(weights=[randn(8, 5), randn(3, 8).float()]), ["weights[1]", "Double", "Float"]),
    (dict(weights=[randn(8, 5), randn(3, 8).to("meta")]), ["weights[1]", "cpu", "meta"]),
    (dict(weights=[randn(8, 5)]), ["biases", "1", "2"]),
    (dict(biases=[None, randn(4)]), ["biases[1]", "3", "[4]"]),
    (dict(biases=[None, randn(3).float()]), ["biases[1]", "Double", "Float"]),
    (dict(kinds=[3, 7]), ["kind", "7"]),
    (dict(params=[0.0]), ["params", "2", "1"]),
])  # fmt: skip
def test_chain_refuses(changes, words):
    arguments = dict(
        x=randn(6, 5), weights=[randn(8, 5), randn(3, 8)], biases=[None, None],
        kinds=[3, 3], params=[0.0, 0.0],
    )  # fmt: skip
    with pytest.raises(REFUSED) as error:
        torch.ops.fastdfa.linear_chain(*(arguments | changes).values())
    for word in words:
        assert word in str(error.value), str(error.value)


@needs_extension
@pytest.mark.parametrize("deltas, inputs, words", [
    ([randn(6, 5)], [randn(7, 5)], ["inputs[0]", "6 rows", "[7, 5]"]),
    ([randn(6, 5)], [], ["inputs", "1", "0"]),
    ([randn(6, 5)], [randn(6)], ["inputs[0]", "[6]"]),
    ([randn(6, 5), randn(6, 5).float()], [randn(6, 5)] * 2, ["deltas[1]", "Double", "Float"]),
    ([randn(6, 5).half()], [randn(6, 5).half()], ["deltas[0]", "Half"]),
])  # fmt: skip
def test_weight_gradients_refuse(deltas, inputs, words):
    with pytest.raises(REFUSED) as error:
        torch.ops.fastdfa.weight_gradients(deltas, inputs)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_shapes_that_do_not_fit_are_named(library):
    with pytest.raises(ValueError, match=r"weights\[0\] must have 5 columns.*\(3, 6\)"):
        ops.linear_chain(torch.randn(7, 5), [torch.randn(3, 6)], [None], [0], [0.0])
    with pytest.raises(ValueError, match=r"inputs\[0\] must have 7 rows.*\(8, 6\)"):
        ops.weight_gradients([torch.randn(7, 5)], [torch.randn(8, 6)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lists_of_other_lengths_are_refused(library, dtype):
    x = torch.randn(7, 5, dtype=dtype)
    with pytest.raises(ValueError, match="inputs must have one entry for each of 2 deltas, got 1"):
        ops.weight_gradients([x, x], [x])


def test_the_library_in_use_is_named():
    assert fastdfa.build_info()["matrix_products"] in gemm.LIBRARIES


def test_an_unknown_library_is_refused():
    code = "import fastdfa; fastdfa.build_info()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTDFA_GEMM": "mkl"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FASTDFA_GEMM must be one of torch, fastdfa, got 'mkl'" in run.stderr
