"""Holds the kernels in plain PyTorch: the specification, the fallback and the tests' baseline.

The one of `weight_gradients`, plain products, is in `products`.
Shapes: M rows, C classes (features of the error), n_l features of layer l.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import activations

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float64 for float64, and float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the high and low 32 bits of a * b, where b holds 32-bit words in int64.

    The product itself overflows int64.
    """
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Computes Philox4x32-10 (Salmon et al., SC 2011) on 32-bit words held in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _MASK, (k1 + PHILOX_WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Makes a number in (0, 1) of the top 23 bits, exact in float32."""
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def _box_muller(words: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    numbers = []
    for even, odd in (words[:2], words[2:]):
        radius = torch.sqrt(-2 * torch.log(_unit(even, dtype)))
        angle = 2 * math.pi * _unit(odd, dtype)
        numbers += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return numbers


def fill_feedback_(out: Tensor, seed: int, stream: int, distribution: int) -> None:
    """Writes the unscaled B [C, n], of mean 0 and variance 1, a function of seed and position.

    Column j of row c takes word j mod 4 of philox(counter=(j div 4, c, stream, 0), key=seed).
    `distribution`: 0 normal (Box-Muller), 1 uniform, 2 Rademacher.
    """
    rows, columns = out.shape
    dtype = accumulation_dtype(out.dtype)
    block = torch.arange((columns + 3) // 4, device=out.device).expand(rows, -1)
    row = torch.arange(rows, device=out.device)[:, None].expand_as(block)
    counter = [block, row, torch.full_like(block, stream), torch.zeros_like(block)]
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    if distribution == 0:
        numbers = _box_muller(words, dtype)
    elif distribution == 1:
        numbers = [math.sqrt(3) * (2 * _unit(word, dtype) - 1) for word in words]
    else:
        numbers = [(1 - 2 * (word >> 31)).to(dtype) for word in words]
    out.copy_(torch.stack(numbers, dim=-1).flatten(1)[:, :columns])


def derivative(saved: Tensor, kind: int, param: float) -> Tensor:
    """Computes f' from the output f(a), or from the input a for gelu, gelu_tanh and silu."""
    name = activations.KINDS[kind]
    one = torch.ones_like(saved)
    if name == "identity":
        return one
    if name == "relu":
        return torch.where(saved <= 0, 0 * one, one)
    if name == "leaky_relu":
        return torch.where(saved <= 0, param * one, one)
    if name == "tanh":
        return 1 - saved * saved
    if name == "sigmoid":
        return saved * (1 - saved)
    if name == "elu":
        return torch.where(saved <= 0, saved + param, one)
    if name == "softplus":
        return -torch.expm1(-param * saved)
    of_input = torch.ops.aten
    if name == "silu":
        slope: Tensor = of_input.silu_backward(one, saved)
    else:
        approximate = "tanh" if name == "gelu_tanh" else "none"
        slope = of_input.gelu_backward(one, saved, approximate=approximate)
    return slope


def gate(grad: Tensor, saved: Tensor, kind: int, param: float) -> tuple[Tensor, Tensor]:
    """Computes delta = grad * f'(saved) [M, n] in grad's dtype, and the sum of its rows [n].

    The sum is made before the delta is rounded.
    """
    wide = accumulation_dtype(grad.dtype)
    delta = grad.to(wide)
    if kind != activations.IDENTITY:
        delta = delta * derivative(saved.to(wide), kind, param)
    return delta.to(grad.dtype), delta.sum(0)


def project_gate(
    error: Tensor,
    feedback: Sequence[Tensor],
    seed: int,
    streams: Sequence[int],
    distribution: int,
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
    scales: Sequence[float],
    sum_error: bool,
    allow_tf32: bool = False,
) -> list[Tensor]:
    """Computes every d_l = scale_l (M if sum_error) (e B_l) * f'(saved_l), then every db_l.

    error [M, C]; feedback: one matrix for all layers or one for each, [C, >= n_l], of which
    layer l takes the first n_l columns, or none: then it is generated; saved [M, n_l]. Where
    float32 may be tf32 is torch's own setting here.
    """
    if not feedback and saved:
        widths = [h.shape[1] for h in saved]
        widths = widths if len(streams) > 1 else [max(widths)]
        dtype = accumulation_dtype(saved[0].dtype)
        feedback = [error.new_empty(error.shape[1], n, dtype=dtype) for n in widths]
        for matrix, stream in zip(feedback, streams, strict=True):
            fill_feedback_(matrix, seed, stream, distribution)
    deltas, bias_grads = [], []
    for layer, h in enumerate(saved):
        wide = accumulation_dtype(h.dtype)
        matrix = feedback[layer if len(feedback) > 1 else 0][:, : h.shape[1]]
        factor = scales[layer] * (error.shape[0] if sum_error else 1)
        projection = (error.to(wide) @ matrix.to(wide)) * factor
        delta, total = gate(projection, h, kinds[layer], params[layer])
        deltas.append(delta.to(h.dtype))
        bias_grads.append(total)
    return deltas + bias_grads


def activate_(x: Tensor, bias: Tensor | None, kind: int, param: float) -> None:
    """Replaces x [..., n] by f(x + bias), bias [n]."""
    if bias is not None:
        x.add_(bias)
    if kind != activations.IDENTITY:
        x.copy_(activations.apply(x, kind, param))


def linear_chain(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Sequence[int],
    params: Sequence[float],
    activate_: Callable[..., None] = activate_,
    memory: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Computes every h_l = f_l(h_{l-1} W_l^T + b_l), h_0 = x [M, n_0], W_l [n_l, n_{l-1}].

    By a given way to activate, and into `memory` [M, n_l] where there is some.
    """
    outputs = []
    memory = [None] * len(weights) if memory is None else memory
    for out, weight, bias, kind, param in zip(memory, weights, biases, kinds, params, strict=True):
        x = torch.mm(x, weight.t(), out=out)
        activate_(x, bias, kind, param)
        outputs.append(x)
    return outputs


def backpropagate(
    delta: Tensor,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor],
    kinds: Sequence[int],
    params: Sequence[float],
    gate: Callable[..., tuple[Tensor, Tensor]] = gate,
) -> list[Tensor]:
    """Computes every delta_i = (delta_{i-1} W_i) * f'_i(saved_i), then the sums of their rows.

    delta_0 = delta [M, n_0], W_i [n_{i-1}, n_i], saved_i [M, n_i]; by a given way to gate.
    """
    deltas, sums = [], []
    for weight, h, kind, param in zip(weights, saved, kinds, params, strict=True):
        delta, total = gate(torch.mm(delta, weight.to(delta.dtype)), h, kind, param)
        deltas.append(delta)
        sums.append(total)
    return deltas + sums


def batch_norm(
    a: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    kind: int,
    param: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes h = f((a - mean) * rstd * weight + bias) of a [M, n], then mean and rstd [n].

    The statistics are those of the columns of a, which move the running ones; or are the running
    ones, where not `training`.
    """
    wide = accumulation_dtype(a.dtype)
    x = a.to(wide)
    if training:
        variance, mean = torch.var_mean(x, 0, correction=0)
        if running_mean is not None and running_var is not None:
            unbiased = variance * (len(a) / (len(a) - 1))
            running_mean.copy_((1 - momentum) * running_mean.to(wide) + momentum * mean)
            running_var.copy_((1 - momentum) * running_var.to(wide) + momentum * unbiased)
    else:
        assert running_mean is not None and running_var is not None
        mean, variance = running_mean.to(wide, copy=True), running_var.to(wide)
    rstd = torch.rsqrt(variance + eps)
    h = activations.apply(_affine((x - mean) * rstd, weight, bias), kind, param)
    return h.to(a.dtype), mean, rstd


def batch_norm_backward_(
    delta: Tensor,
    delta_sums: Tensor,
    a: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Replaces delta [M, n] by the gradient of a; returns that of the weight, and the rows' sum."""
    wide = accumulation_dtype(a.dtype)
    grad, normalised = delta.to(wide), (a.to(wide) - mean) * rstd
    weight_grad = (grad * normalised).sum(0)
    if training:
        grad = grad - (delta_sums + normalised * weight_grad) / len(a)
    grad = _affine(grad * rstd, weight, None)
    delta.copy_(grad)
    return weight_grad, grad.sum(0)


def layer_norm(
    a: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: int, param: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes h = f((a - mean) * rstd * weight + bias) of a [M, n], then mean and rstd [M]."""
    x = a.to(accumulation_dtype(a.dtype))
    variance, mean = torch.var_mean(x, 1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    normalised = (x - mean[:, None]) * rstd[:, None]
    h = activations.apply(_affine(normalised, weight, bias), kind, param)
    return h.to(a.dtype), mean, rstd


def layer_norm_backward_(
    delta: Tensor, a: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Replaces delta [M, n] by the gradient of a; returns that of the weight, and the rows' sum."""
    wide = accumulation_dtype(a.dtype)
    normalised = (a.to(wide) - mean[:, None]) * rstd[:, None]
    weight_grad = (delta.to(wide) * normalised).sum(0)
    grad = _affine(delta.to(wide), weight, None)
    slope = (grad * normalised).mean(1, keepdim=True)
    grad = (grad - grad.mean(1, keepdim=True) - normalised * slope) * rstd[:, None]
    delta.copy_(grad)
    return weight_grad, grad.sum(0)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns x * weight + bias, of which either may be None, in the dtype of x."""
    if weight is not None:
        x = x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)
