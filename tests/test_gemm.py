"""The matrix products of the fused layers: right by either library, and counted as FLOPs."""

import os
import subprocess
import sys

import pytest
import torch
from networks import assert_close, mlp, randn
from torch.utils.flop_counter import FlopCounterMode

from fastdfa import gemm

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


@pytest.fixture(params=["torch", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch):
    monkeypatch.setattr(gemm, "library", lambda: request.param)
    monkeypatch.setattr(gemm, "_FEWEST_MULTIPLICATIONS", 1)
    return request.param


@pytest.mark.parametrize("rows", [(1,), (7,), (130,), (3, 5)])
@pytest.mark.parametrize("k, n", [(1, 1), (33, 17), (257, 129)])
def test_product(library, rows, k, n):
    a, b = randn(*rows, k), randn(n, k)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        got = gemm.product(a.to(dtype), b.to(dtype))
        assert got.dtype == dtype and got.is_contiguous()
        assert_close(got, a @ b.T, tolerance)


def test_transposed_product(library, monkeypatch):
    """As the weight gradient has them, of rows that do not follow each other too."""
    delta, x = randn(65, 40)[::2].float(), randn(33, 70)[:, 3:60].float()
    expected = delta.double().T @ x.double()
    assert_close(gemm.transposed_product(delta, x), expected, 1e-5)
    monkeypatch.setattr(gemm, "_MOST_COPIED_BYTES", 1000)
    assert_close(gemm.transposed_product(delta, x), expected, 1e-5)


@pytest.mark.parametrize("rows, k, n", [(0, 5, 4), (5, 0, 4), (5, 4, 0)])
def test_empty_product(library, rows, k, n):
    got = gemm.product(torch.randn(rows, k), torch.randn(n, k))
    assert torch.equal(got, torch.zeros(rows, n))


def test_flops_of_a_step_are_the_same(library):
    model = mlp([20, 30, 30, 3], "tanh", bias=False).float()
    x = torch.randn(8, 20)
    model(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    forward = 2 * 8 * (20 * 30 + 30 * 30 + 30 * 3)
    assert counter.get_total_flops() >= 2 * forward
    assert counter.get_total_flops() <= 2 * forward + 2 * 8 * 3 * (30 + 30)


def test_shapes_that_do_not_fit_are_named(library):
    with pytest.raises(RuntimeError, match="7x5 and 6x3"):
        gemm.product(torch.randn(7, 5), torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="5x7 and 8x6"):
        gemm.transposed_product(torch.randn(7, 5), torch.randn(8, 6))


def test_an_unknown_library_is_refused():
    code = "import fastdfa; fastdfa.build_info()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTDFA_GEMM": "mkl"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "FASTDFA_GEMM must be one of torch, onednn, got 'mkl'" in run.stderr
