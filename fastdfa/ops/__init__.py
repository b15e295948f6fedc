"""Offers the kernels as functions: each checks its arguments and calls a compiled op or its twin.

The twins in plain PyTorch are in `reference`, the compiled ops in csrc/ops.cpp. `products` says who
multiplies matrices, `loading` which compiled ops there are.

Shapes: M rows, C classes (features of the error), n_l features of layer l. `kind` and `param` are
an activation, a code of `fastdfa.activations.KINDS` and its parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, fakes, loading, products, reference
from .checks import DISTRIBUTIONS
from .norms import batch_norm, batch_norm_backward_, layer_norm, layer_norm_backward_
from .reference import accumulation_dtype
from .typed import constant

__all__ = [
    "DISTRIBUTIONS",
    "activate_",
    "aligned_width",
    "allow_tf32",
    "backpropagate",
    "batch_norm",
    "batch_norm_backward_",
    "feedback",
    "feedback_dtype",
    "fill_feedback_",
    "gate",
    "layer_norm",
    "layer_norm_backward_",
    "linear_chain",
    "project_gate",
    "reference",
    "weight_gradients",
]

# From this many classes on the CUDA kernels use tensor cores (csrc/cuda/project_gate.h). These read
# B 16 bytes at a time: its rows are padded to a multiple of that, of 16 elements in any dtype.
_TENSOR_CORE_CLASSES = 32
_CUDA_ROW_ELEMENTS = 16


def fill_feedback_(out: Tensor, seed: int, stream: int = 0, distribution: str = "normal") -> None:
    """Fills `out` [C, n] in place with the unscaled B (mean 0, variance 1) of (seed, stream).

    Args:
        out: two-dimensional, of a floating dtype; its rows must be contiguous.
        seed: the 64-bit key of the generator.
        stream: 32 bits; 0 for a shared B, else a hash of the point's name.
        distribution: "normal", "uniform" or "rademacher".

    Raises:
        ValueError, TypeError: where `out` or the distribution is none of these.
    """
    code = checks.distribution_code(distribution)
    loading.call("fill_feedback_", (out, seed, stream, code), checks.check_fill_feedback)


def feedback(
    rows: int,
    columns: int,
    *,
    seed: int,
    stream: int = 0,
    distribution: str = "normal",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Makes the unscaled feedback matrix [rows, columns]; see `fill_feedback_`.

    On a CUDA device it is the first columns of a wider one, so that every row is aligned.
    """
    device = torch.device(device)
    out = torch.empty(rows, aligned_width(columns, device), dtype=dtype, device=device)
    fill_feedback_(out, seed, stream, distribution)
    return out[:, :columns]


def aligned_width(columns: int, device: torch.device) -> int:
    """Returns how many columns to allocate so that every row of a B is aligned on `device`."""
    return columns + -columns % _CUDA_ROW_ELEMENTS if device.type == "cuda" else columns


def feedback_dtype(device: torch.device, dtype: torch.dtype, classes: int) -> torch.dtype:
    """Returns the dtype in which a dense B [classes, n] serves `project_gate` best.

    For `saved` of `dtype` that is its accumulation dtype; but tensor cores read B in the layers'
    own 16 bits.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and narrow and classes >= _TENSOR_CORE_CLASSES:
        return dtype
    return accumulation_dtype(dtype)


@constant
def allow_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Tells whether torch allows tf32 in the matrix products of `dtype` on `device`.

    It is a constant of a compiled step: torch.compile guards all it compiles by that setting.
    """
    if device.type != "cuda" or dtype != torch.float32:
        return False
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def project_gate(
    error: Tensor,
    feedback: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
    scales: Sequence[float],
    *,
    sum_error: bool = False,
    seed: int = 0,
    streams: Sequence[int] = (0,),
    distribution: str = "normal",
    allow_tf32: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes the delta of every layer, d_l = scale_l (e B_l) * f'(saved_l), and db_l = sum_M d_l.

    Args:
        error: e [M, C].
        feedback: one B for all layers, or one for each: [C, >= n_l] in the accumulation dtype or
            in that of `saved`, of which layer l takes the first n_l columns. Empty: B is generated
            in the kernel from `seed`, `streams` (one, or one for each layer) and `distribution`.
        saved: [M, n_l] each, of one dtype: f(a), or a for gelu, gelu_tanh and silu. For the
            identity it only gives shape and dtype.
        scales: the factor of each B_l.
        sum_error: multiply by M as well (inside the accumulator, so that fp16 keeps it).
        allow_tf32: float32 on CUDA: tensor cores may round e and B to tf32. The CPU ignores it.

    Returns:
        The deltas [M, n_l] in the dtype of `saved`, and the bias gradients [n_l] in the
        accumulation dtype, reduced in a fixed order.

    Raises:
        ValueError, TypeError: where shapes, lengths, dtypes or devices do not fit.
    """
    code = checks.distribution_code(distribution)
    arguments = (
        error, feedback, seed, streams, code, saved, kinds, params, scales, sum_error, allow_tf32
    )  # fmt: skip
    results: list[Tensor] = loading.call("project_gate", arguments, checks.check_project_gate)
    return results[: len(saved)], results[len(saved) :]


def gate(grad: Tensor, saved: Tensor, kind: int, param: float = 0.0) -> tuple[Tensor, Tensor]:
    """Computes delta = grad * f'(saved) [M, n] and the sum of its rows [n], in one pass.

    Args:
        grad: [M, n], the gradient that arrived at the activation's output.
        saved: [M, n], as in `project_gate`; not read for the identity.

    Returns:
        The delta in the dtype of `grad`, and the sum in its accumulation dtype.

    Raises:
        ValueError, TypeError: where shapes, dtypes or devices do not fit.
    """
    result: tuple[Tensor, Tensor]
    result = loading.call("gate", (grad, saved, kind, param), checks.check_gate)
    return result


def activate_(x: Tensor, bias: Tensor | None, kind: int, param: float = 0.0) -> None:
    """Replaces x by f(x + bias) in one pass, for the activations whose f' comes from the output.

    Args:
        x: [..., n], contiguous.
        bias: [n] or None, in the dtype of x or in its accumulation dtype.

    Raises:
        ValueError, TypeError: where shapes, dtypes or devices do not fit.
    """
    loading.call("activate_", (x, bias, kind, param), checks.check_activate)


def linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Sequence[int],
    params: Sequence[float],
) -> list[Tensor]:
    """Computes h_l = f_l(h_{l-1} W_l^T + b_l) of every layer, where h_0 = x.

    Args:
        x: [M, n_0].
        weights: W_l [n_l, n_{l-1}] each, in the dtype of x, or all in its accumulation dtype; then
            they are rounded to the dtype of x, by the kernels as they read them.
        biases: b_l [n_l] or None each, in the dtype of x or in its accumulation dtype.
        kinds, params: of activations whose f' comes from the output.

    Returns:
        h_l [M, n_l] of every layer, contiguous.

    Raises:
        ValueError, TypeError, RuntimeError: where shapes, lengths, dtypes or devices do not fit.
    """
    arguments = (x, weights, biases, kinds, params)
    made: list[Tensor] = loading.checked(_linear_chain, arguments, checks.check_linear_chain)
    return made


def _linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Sequence[int],
    params: Sequence[float],
) -> list[Tensor]:
    wide = len(weights) > 0 and weights[0].dtype != x.dtype
    if products.multiplies(x, wide):
        if x.dtype == torch.bfloat16:
            biases = [bias if bias is None else bias.float() for bias in biases]
        made: list[Tensor] = torch.ops.fastdfa.linear_chain(x, weights, biases, kinds, params)
        return made
    with torch.no_grad():
        if wide and weights[0].dtype == accumulation_dtype(x.dtype):
            weights = [weight.to(x.dtype) for weight in weights]
        if not products.widens(x, *weights):
            memory = products.memory_of_outputs(x, weights)
            return reference.linear_chain(x, weights, biases, kinds, params, activate_, memory)
    outputs = []
    for weight, bias, kind, param in zip(weights, biases, kinds, params, strict=True):
        bias = bias.float() if bias is not None and bias.dtype == x.dtype else bias
        (h,) = _linear_chain(x.float(), [weight.float()], [bias], [kind], [param])
        x = h.to(x.dtype)
        outputs.append(x)
    return outputs


def weight_gradients(
    deltas: Sequence[Tensor], inputs: Sequence[Tensor], wide: bool = False
) -> list[Tensor]:
    """Computes dW_l = d_l^T x_l [n_l, k_l] of every layer, which do not depend on each other.

    Args:
        deltas: d_l [M, n_l] each.
        inputs: x_l [M, k_l] each, in the dtype of the deltas.
        wide: gradients in the accumulation dtype, as weights that are have theirs.

    Raises:
        ValueError, TypeError, RuntimeError: where shapes, lengths, dtypes or devices do not fit.
    """
    arguments = (deltas, inputs, wide)
    made: list[Tensor]
    made = loading.checked(_weight_gradients, arguments, checks.check_weight_gradients)
    return made


def _weight_gradients(
    deltas: Sequence[Tensor], inputs: Sequence[Tensor], wide: bool = False
) -> list[Tensor]:
    checks.check_lengths(len(deltas), "deltas", inputs=inputs)
    if deltas and products.multiplies(deltas[0], wide):
        made: list[Tensor] = torch.ops.fastdfa.weight_gradients(deltas, inputs)
        return made
    if deltas and products.widens(*deltas, *inputs):
        # One by one, as copies of a group would take half of a step's memory more.
        pairs = zip(deltas, inputs, strict=True)
        widened = (_weight_gradients([d.float()], [x.float()])[0] for d, x in pairs)
        return [grad if wide else grad.to(deltas[0].dtype) for grad in widened]
    grads = products.weight_gradients(deltas, inputs)
    return [grad.to(accumulation_dtype(grad.dtype)) for grad in grads] if wide else grads


def backpropagate(
    delta: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Carries a delta down through boundaries that are not cut, as backpropagation does.

    At boundary i, delta_i = (delta_{i-1} W_i) * f'_i(saved_i) and sums_i is the sum of its rows;
    delta_0 is the given one. The gate is applied as the product is written.

    Args:
        delta: [M, n_0], the delta of the stage above the first boundary.
        weights: W_i [n_{i-1}, n_i] each, of the stage above boundary i, from the top boundary down;
            in the dtype of `delta`, or all in its accumulation dtype; then they are rounded to the
            dtype of `delta`, by the kernels as they read them.
        saved: [M, n_i] each, in the dtype of `delta`: what the stage below boundary i has saved,
            f(a), or a for gelu, gelu_tanh and silu. For the identity it is not read.
        kinds, params: of the stages below.

    Returns:
        The deltas [M, n_i] in the dtype of `delta`, and the sums [n_i] in its accumulation dtype,
        which are the bias gradients. The kernels reduce them in a fixed order.

    Raises:
        ValueError, TypeError: where shapes, lengths, dtypes or devices do not fit.
    """
    count = len(weights)
    # A traced call is checked by nobody: Dynamo knows too little of the shapes here.
    if torch.compiler.is_compiling():
        results = reference.backpropagate(delta, weights, saved, kinds, params)
        return results[:count], results[count:]
    arguments = (delta, weights, saved, kinds, params)
    results = loading.checked(_backpropagate, arguments, checks.check_backpropagate)
    return results[:count], results[count:]


def _backpropagate(
    delta: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
) -> list[Tensor]:
    wide = len(weights) > 0 and weights[0].dtype != delta.dtype
    if products.multiplies(delta, wide):
        made: list[Tensor] = torch.ops.fastdfa.backpropagate(delta, weights, saved, kinds, params)
        return made
    checks.check_backpropagate(delta, weights, saved, kinds, params)
    with torch.no_grad():
        if not products.widens(delta):
            return reference.backpropagate(delta, weights, saved, kinds, params, gate)
    deltas, sums = [], []
    for weight, h, kind, param in zip(weights, saved, kinds, params, strict=True):
        rounded = weight.to(delta.dtype).float()
        one = (delta.float(), [rounded], [h.float()], [kind], [param])
        lower, total = _backpropagate(*one)
        delta = lower.to(delta.dtype)
        deltas.append(delta)
        sums.append(total)
    return deltas + sums


loading.load()
if loading.available("cpu"):
    fakes.register()
