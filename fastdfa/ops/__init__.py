"""The kernels as functions: checks, dispatch to the extension or to its twin in `reference`.

Shapes: M rows, C classes (features of the error), n_l features of layer l.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..activations import FIRST_KIND_FROM_INPUT, KINDS
from . import loading, products, reference
from .reference import accumulation_dtype

__all__ = [
    "activate_",
    "aligned_width",
    "allow_tf32",
    "feedback",
    "feedback_dtype",
    "fill_feedback_",
    "gate",
    "linear_chain",
    "project_gate",
    "reference",
    "weight_gradients",
]

DISTRIBUTIONS = ("normal", "uniform", "rademacher")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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
    """
    code = _distribution(distribution)
    _check_matrix("out", out)
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have contiguous rows, got strides {tuple(out.stride())}")
    if loading.available(out.device.type):
        torch.ops.fastdfa.fill_feedback_(out, seed, stream, code)
    else:
        reference.fill_feedback_(out, seed, stream, code)


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
    """The unscaled feedback matrix [rows, columns]; see `fill_feedback_`.

    On a CUDA device it is the first columns of a wider one, so that every row is aligned.
    """
    device = torch.device(device)
    out = torch.empty(rows, aligned_width(columns, device), dtype=dtype, device=device)
    fill_feedback_(out, seed, stream, distribution)
    return out[:, :columns]


def aligned_width(columns: int, device: torch.device) -> int:
    """The columns to allocate so that every row of a feedback matrix is aligned on `device`."""
    return columns + -columns % _CUDA_ROW_ELEMENTS if device.type == "cuda" else columns


def feedback_dtype(device: torch.device, dtype: torch.dtype, classes: int) -> torch.dtype:
    """In which dtype a dense B [classes, n] serves `project_gate` best, for `saved` of `dtype`.

    The accumulation dtype; but tensor cores read B in the layers' own 16 bits.
    """
    narrow = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cuda" and narrow and classes >= _TENSOR_CORE_CLASSES:
        return dtype
    return accumulation_dtype(dtype)


@torch.compiler.assume_constant_result
def allow_tf32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch allows tf32 in the matrix products of `dtype` on `device`.

    A constant of a compiled step: torch.compile guards all it compiles by that setting.
    """
    if device.type != "cuda" or dtype != torch.float32:
        return False
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


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
    """d_l = scale_l (e B_l) * f'(saved_l) and db_l = sum_M d_l for every layer l.

    Args:
        error: e [M, C].
        feedback: one B for all layers, or one for each: [C, >= n_l] in the accumulation dtype or
            in that of `saved`, of which layer l takes the first n_l columns. Empty: B is generated
            in the kernel from `seed`, `streams` (one, or one for each layer) and `distribution`.
        saved: [M, n_l] each, of one dtype: f(a), or a for gelu, gelu_tanh and silu. For the
            identity it only gives shape and dtype.
        kinds, params: the activations, codes of `fastdfa.activations.KINDS` and parameters.
        scales: the factor of each B_l.
        sum_error: multiply by M as well (inside the accumulator, so that fp16 keeps it).
        allow_tf32: float32 on CUDA: tensor cores may round e and B to tf32. The CPU ignores it.

    Returns:
        The deltas [M, n_l] in the dtype of `saved`, and the bias gradients [n_l] in the
        accumulation dtype, reduced in a fixed order.

    Raises:
        ValueError, TypeError: where shapes, lengths, dtypes or devices do not fit.
    """
    code = _distribution(distribution)
    if not isinstance(error, Tensor):
        raise TypeError(f"error must be a tensor, got {type(error).__name__}")
    if not loading.available(error.device.type):
        # A traced call is checked by nobody: Dynamo knows too little of the shapes here.
        if not torch.compiler.is_compiling():
            _check_project_gate(error, feedback, saved, kinds, params, scales, streams)
        if not feedback and saved:
            feedback = _generate(error, saved, seed, streams, code)
        results = reference.project_gate(error, feedback, saved, kinds, params, scales, sum_error)
    else:
        try:
            results = torch.ops.fastdfa.project_gate(
                error, feedback, seed, streams, code, saved, kinds, params, scales, sum_error,
                allow_tf32,
            )  # fmt: skip
        except RuntimeError:
            # It has checked its arguments, at a hundredth of the cost; here for the kind of error.
            _check_project_gate(error, feedback, saved, kinds, params, scales, streams)
            raise
    return list(results[: len(saved)]), list(results[len(saved) :])


def gate(grad: Tensor, saved: Tensor, kind: int, param: float = 0.0) -> tuple[Tensor, Tensor]:
    """delta = grad * f'(saved) [M, n] and its sum over rows [n], in one pass.

    Args:
        grad: [M, n], the gradient that arrived at the activation's output.
        saved: [M, n], as in `project_gate`; not read for the identity.
        kind, param: the activation, a code of `fastdfa.activations.KINDS` and its parameter.
    """
    _check_kinds([kind], [param], KINDS)
    _check_matrix("grad", grad)
    _check_like("saved", saved, grad, grad.shape)
    if loading.available(grad.device.type):
        return torch.ops.fastdfa.gate(grad, saved, kind, param)
    return reference.gate(grad, saved, kind, param)


def activate_(x: Tensor, bias: Tensor | None, kind: int, param: float = 0.0) -> None:
    """x = f(x + bias) in place, in one pass, for the activations whose f' comes from the output.

    Args:
        x: [..., n], contiguous.
        bias: [n] or None, in the dtype of x or in its accumulation dtype.
        kind, param: the activation, a code of `fastdfa.activations.KINDS` and its parameter.
    """
    _check_kinds([kind], [param], KINDS[:FIRST_KIND_FROM_INPUT])
    _check_dtype("x", x)
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got strides {tuple(x.stride())}")
    if bias is not None:
        _check_bias(x, bias)
    if loading.available(x.device.type):
        torch.ops.fastdfa.activate_(x, bias, kind, param)
    else:
        reference.activate_(x, bias, kind, param)


def linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Sequence[int],
    params: Sequence[float],
) -> list[Tensor]:
    """h_l = f_l(h_{l-1} W_l^T + b_l) of every layer, h_0 = x, for f' that come from the output.

    Args:
        x: [M, n_0].
        weights: W_l [n_l, n_{l-1}] each, in the dtype of x, or all in its accumulation dtype; then
            they are rounded to the dtype of x, by the kernels as they read them.
        biases: b_l [n_l] or None each, in the dtype of x or in its accumulation dtype.
        kinds, params: the activations, codes of `fastdfa.activations.KINDS` and parameters.

    Returns:
        h_l [M, n_l] of every layer, contiguous.

    Raises:
        ValueError, TypeError, RuntimeError: where shapes, lengths, dtypes or devices do not fit.
    """
    wide = len(weights) > 0 and weights[0].dtype != x.dtype
    if products.multiplies(x, wide):
        _check_kinds(kinds, params, KINDS[:FIRST_KIND_FROM_INPUT])
        if x.dtype == torch.bfloat16:
            biases = [bias if bias is None else bias.float() for bias in biases]
        return torch.ops.fastdfa.linear_chain(x, weights, biases, kinds, params)
    outputs = []
    if wide and weights[0].dtype == accumulation_dtype(x.dtype):
        with torch.no_grad():
            weights = [weight.to(x.dtype) for weight in weights]
    if products.widens(x, *weights):
        for weight, bias, kind, param in zip(weights, biases, kinds, params, strict=True):
            bias = bias.float() if bias is not None and bias.dtype == x.dtype else bias
            (h,) = linear_chain(x.float(), [weight.float()], [bias], [kind], [param])
            x = h.to(x.dtype)
            outputs.append(x)
        return outputs
    with torch.no_grad():
        memory = products.memory_of_outputs(x, weights)
        for out, *layer in zip(memory, weights, biases, kinds, params, strict=True):
            weight, bias, kind, param = layer
            x = torch.mm(x, weight.t(), out=out)
            activate_(x, bias, kind, param)
            outputs.append(x)
    return outputs


def weight_gradients(
    deltas: Sequence[Tensor], inputs: Sequence[Tensor], wide: bool = False
) -> list[Tensor]:
    """dW_l = d_l^T x_l [n_l, k_l] of every layer, which do not depend on each other.

    Args:
        deltas: d_l [M, n_l] each.
        inputs: x_l [M, k_l] each, in the dtype of the deltas.
        wide: gradients in the accumulation dtype, as weights that are have theirs.

    Raises:
        ValueError, TypeError, RuntimeError: where shapes, lengths, dtypes or devices do not fit.
    """
    if len(deltas) != len(inputs):
        raise ValueError(f"inputs must be as many as the {len(deltas)} deltas, got {len(inputs)}")
    if deltas and products.multiplies(deltas[0], wide):
        return torch.ops.fastdfa.weight_gradients(deltas, inputs)
    if deltas and products.widens(*deltas, *inputs):
        # One by one, as copies of a group would take half of a step's memory more.
        pairs = zip(deltas, inputs, strict=True)
        grads = (weight_gradients([d.float()], [x.float()])[0] for d, x in pairs)
        return [grad if wide else grad.to(deltas[0].dtype) for grad in grads]
    # A traced call knows no addresses.
    by_torch = reference if torch.compiler.is_compiling() else products
    grads = by_torch.weight_gradients(deltas, inputs)
    return [grad.to(accumulation_dtype(grad.dtype)) for grad in grads] if wide else grads


def _generate(
    error: Tensor, saved: Sequence[Tensor], seed: int, streams: Sequence[int], distribution: int
) -> list[Tensor]:
    """The matrices that the kernel would generate piece by piece."""
    widths = [h.shape[1] for h in saved]
    matrices = []
    for stream, width in zip(streams, widths if len(streams) > 1 else [max(widths)], strict=True):
        dtype = accumulation_dtype(saved[0].dtype)
        matrix = torch.empty(error.shape[1], width, dtype=dtype, device=error.device)
        reference.fill_feedback_(matrix, seed, stream, distribution)
        matrices.append(matrix)
    return matrices


def _distribution(name: str) -> int:
    if name not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {name!r}")
    return DISTRIBUTIONS.index(name)


def _check_dtype(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def _check_matrix(name: str, tensor: Tensor) -> None:
    _check_dtype(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two dimensions, got shape {tuple(tensor.shape)}")


def _check_like(name: str, tensor: Tensor, other: Tensor, shape: torch.Size) -> None:
    _check_matrix(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must be {other.dtype}, got {tensor.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, got {tensor.device}")


def _check_bias(x: Tensor, bias: Tensor) -> None:
    columns = x.shape[-1] if x.dim() else None
    if bias.dim() != 1 or bias.shape[0] != columns:
        raise ValueError(f"bias must have shape [{columns}], got {tuple(bias.shape)}")
    if bias.dtype not in (x.dtype, accumulation_dtype(x.dtype)):
        raise TypeError(
            f"bias must be {x.dtype} or {accumulation_dtype(x.dtype)}, got {bias.dtype}"
        )
    if bias.device != x.device:
        raise ValueError(f"bias must be on {x.device}, got {bias.device}")


def _check_kinds(kinds: Sequence[int], params: Sequence[float], allowed: Sequence[str]) -> None:
    for kind, param in zip(kinds, params, strict=True):
        if not 0 <= kind < len(allowed):
            names = ", ".join(allowed)
            raise ValueError(f"kind must be 0 to {len(allowed) - 1} ({names}), got {kind}")
        if kind and param < 0:
            raise ValueError(f"param of {KINDS[kind]} must not be negative, got {param}")


def _check_project_gate(
    error: Tensor,
    feedback: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
    scales: Sequence[float],
    streams: Sequence[int],
) -> None:
    _check_matrix("error", error)
    layers = len(saved)
    for name, values in (("kinds", kinds), ("params", params), ("scales", scales)):
        if len(values) != layers:
            raise ValueError(
                f"{name} must have one entry for each of {layers} saved, got {len(values)}"
            )
    _check_kinds(kinds, params, KINDS)
    for name, values in (("feedback", feedback), ("streams", streams)):
        if values and len(values) not in (1, layers):
            raise ValueError(f"{name} must have 1 or {layers} entries, got {len(values)}")
    if not feedback and not streams:
        raise ValueError("streams must not be empty where feedback is")
    for layer, h in enumerate(saved):
        _check_matrix(f"saved[{layer}]", h)
        _check_like(f"saved[{layer}]", h, saved[0], torch.Size((error.shape[0], h.shape[1])))
        if h.device != error.device:
            raise ValueError(f"saved[{layer}] must be on {error.device}, got {h.device}")
    for index, matrix in enumerate(feedback):
        readers = saved if len(feedback) == 1 else saved[index : index + 1]
        _check_feedback(index, matrix, error, readers)
        if matrix.dtype != feedback[0].dtype:
            raise TypeError(f"feedback[{index}] must be {feedback[0].dtype}, got {matrix.dtype}")


def _check_feedback(index: int, matrix: Tensor, error: Tensor, readers: Sequence[Tensor]) -> None:
    _check_matrix(f"feedback[{index}]", matrix)
    columns = max([0, *[h.shape[1] for h in readers]])
    if matrix.shape[0] != error.shape[1] or matrix.shape[1] < columns:
        raise ValueError(
            f"feedback[{index}] must have shape [{error.shape[1]}, >= {columns}], "
            f"got {tuple(matrix.shape)}"
        )
    for h in readers:
        allowed = dict.fromkeys((accumulation_dtype(h.dtype), h.dtype))
        if matrix.dtype not in allowed:
            names = " or ".join(map(str, allowed))
            raise TypeError(f"feedback[{index}] must be {names}, got {matrix.dtype}")
    if matrix.device != error.device:
        raise ValueError(f"feedback[{index}] must be on {error.device}, got {matrix.device}")


def _check_devices(first: Tensor, **lists: Sequence[Tensor]) -> None:
    """One tensor on the meta device takes a call there, whatever the others are on."""
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if x.device != first.device:
                raise ValueError(f"{name}[{i}] must be on {first.device}, got {x.device}")


def _register_fakes() -> None:
    """Shapes and dtypes of the ops' results, for torch.compile and opcheck."""

    @torch.library.register_fake("fastdfa::project_gate")
    def _(
        error, feedback, seed, streams, distribution, saved, kinds, params, scales, sum_error,
        allow_tf32,
    ):  # fmt: skip
        _check_devices(error, feedback=feedback, saved=saved)
        deltas = [h.new_empty(h.shape) for h in saved]
        wide = [accumulation_dtype(h.dtype) for h in saved]
        bias_grads = [h.new_empty(h.shape[1], dtype=d) for h, d in zip(saved, wide, strict=True)]
        return deltas + bias_grads

    @torch.library.register_fake("fastdfa::gate")
    def _(grad, saved, kind, param):
        bias_grad = grad.new_empty(grad.shape[1], dtype=accumulation_dtype(grad.dtype))
        return grad.new_empty(grad.shape), bias_grad

    @torch.library.register_fake("fastdfa::activate_")
    def _(x, bias, kind, param):
        return None

    @torch.library.register_fake("fastdfa::fill_feedback_")
    def _(out, seed, stream, distribution):
        return None

    @torch.library.register_fake("fastdfa::linear_chain")
    def _(x, weights, biases, kinds, params):
        _check_devices(x, weights=weights, biases=[b for b in biases if b is not None])
        return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]

    @torch.library.register_fake("fastdfa::weight_gradients")
    def _(deltas, inputs):
        _check_devices(deltas[0], deltas=deltas, inputs=inputs)
        pairs = zip(deltas, inputs, strict=True)
        return [
            delta.new_empty(delta.shape[1], x.shape[1], dtype=accumulation_dtype(delta.dtype))
            for delta, x in pairs
        ]


def _register_flop_formulas() -> None:
    """What the ops multiply, for torch.utils.flop_counter."""

    @register_flop_formula(torch.ops.fastdfa.linear_chain)
    def _(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
        return sum(2 * x_shape[0] * n * k for n, k in weight_shapes)

    @register_flop_formula(torch.ops.fastdfa.weight_gradients)
    def _(delta_shapes, input_shapes, *args, out_shape=None, **kwargs) -> int:
        pairs = zip(delta_shapes, input_shapes, strict=True)
        return sum(2 * rows * n * k for (rows, n), (_, k) in pairs)


loading.load()
if loading.available("cpu"):
    _register_fakes()
    _register_flop_formulas()
