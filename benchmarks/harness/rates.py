"""What a machine reaches without this library: rates of products and of a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.benchmark import Timer

from benchmarks.harness.timing import interleaved, spread


def gemm_rate(size: int = 2048) -> float:
    """Measures torch's own matrix product, in operations a second: the best of ten."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10))


def gpu_rates(rounds: int, size: int = 8192, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Measures what the GPU itself reaches: a device-to-device copy, and torch's square product.

    The copy counts bytes read and bytes written. Medians of cold calls.
    """
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = interleaved(steps, rounds, 0.02, "cuda", cold=True)
    moved = 2 * source.numel() * source.element_size()
    return {
        "copy_gb_per_s": moved / spread(times["copy"]).median / 1e9,
        "product_tflops": 2 * size**3 / spread(times["product"]).median / 1e12,
        "product_size": size,
        "product_dtype": str(dtype).removeprefix("torch."),
    }
