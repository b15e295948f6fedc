"""What a fused layer computes: its activated output, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import activations, ops
from ..activations import Gate
from ..ops import products
from .tape import Affine, Fed, LayerRecord, state

if TYPE_CHECKING:
    from ..layerwise import BackwardWeight


@dataclass(frozen=True)
class LinearMap:
    """x W^T + b; see `tape.Affine`. An output [*rows, n] is a matrix [M, n] to the kernels.

    `wide`: the weight and its gradient are in the accumulation dtype of x (`gemm.multiplies`).
    """

    wide: bool = False

    def activated(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate
    ) -> tuple[Tensor, Tensor | None]:
        kind, param = gate if gate.from_output else activations.Gate(activations.IDENTITY)
        (out,) = ops.linear_chain(as_matrix(x), [weight], [bias], [kind], [param])
        # No view to autograd, so that `_Linear` may return it as its own.
        out = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], len(weight)])
        return (out, None) if gate.from_output else (activations.apply(out, *gate), out)

    def attached(
        self,
        h: Tensor,
        a: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate,
        fed: Fed | None,
        backward: BackwardWeight | None,
    ) -> Tensor:
        return _ActivatedLinear.apply(h, a, x, weight, bias, gate, fed, backward)

    def matrix(self, x: Tensor, saved: Tensor) -> Tensor:
        return as_matrix(x)

    def fed_by_rows(self, saved: Tensor, rows: torch.Size) -> bool:
        return saved.shape[:-1] == rows

    def weight_gradients(
        self, deltas: list[Tensor], saved: list[Tensor], inputs: list[Tensor]
    ) -> list[Tensor]:
        return ops.weight_gradients(deltas, [as_matrix(x) for x in inputs], self.wide)

    def bias_gradient(self, sums: Tensor, saved: Tensor) -> Tensor:
        return sums


_IDENTITY = Gate(activations.IDENTITY)
LINEAR, WIDE_LINEAR = LinearMap(), LinearMap(wide=True)


def map_of(x: Tensor, weight: Tensor) -> LinearMap:
    return LINEAR if x.dtype == weight.dtype else WIDE_LINEAR


class _ActivatedLinear(torch.autograd.Function):
    """h = f(x W^T + b) as one node; h comes in computed, and a where the gate needs that.

    The output is a view, so that autograd refuses a modification in place: the fused path reads
    h, and would gate wrongly.
    """

    @staticmethod
    def forward(ctx, h, a, x, weight, bias, gate, fed, backward):
        ctx.save_for_backward(h if a is None else a, x, weight)
        ctx.gate, ctx.fed, ctx.backward_weight = gate, fed, backward
        ctx.bias_dtype = None if bias is None else bias.dtype
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, x, weight = ctx.saved_tensors
        _, _, needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        delta, bias_grad = gated(grad, saved, ctx.gate, ctx.fed, LINEAR)
        x_grad = input_gradient(delta, x, weight, ctx.backward_weight) if needs_x else None
        weight_grad = weight_gradient(delta, x, map_of(x, weight)) if needs_weight else None
        bias_grad = bias_grad.to(ctx.bias_dtype) if needs_bias else None
        return None, None, x_grad, weight_grad, bias_grad, None, None, None


def input_gradient(
    delta: Tensor, x: Tensor, weight: Tensor, backward: BackwardWeight | None
) -> Tensor:
    """delta W, of the shape of x, or delta B where a rule of feedback has put a B in its place."""
    weight = weight if backward is None else backward.of(weight)
    return (delta @ in_dtype(weight, delta.dtype)).view(x.shape)


def gated(
    grad: Tensor, saved: Tensor, gate: Gate, fed: Fed | None, affine: Affine
) -> tuple[Tensor, Tensor]:
    """The matrix delta and its sums over rows, from a gradient or from feedback that is due."""
    h = affine.matrix(saved, saved)
    if fed:  # the gradient only announces it
        return fed.pop()(h)
    return ops.gate(affine.matrix(grad, saved), h, *gate)


class _Linear(torch.autograd.Function):
    """x W^T + b with products of `ops`, where these pay; it saves input and weight whether or not
    its input is cut, or is sent a gradient by another matrix.

    Activation checkpointing runs a layer again in backward, outside of every root, and demands that
    it saves the same tensors. Unlike an activated layer's, the output may be modified in place.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, backward):
        ctx.save_for_backward(x, weight)
        ctx.backward_weight = backward
        ctx.bias_dtype = None if bias is None else bias.dtype
        y = plain_linear(x, weight, bias)
        # No view to autograd, which torch's own product makes of rows in several dimensions.
        return y if y.dim() == 2 else torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        delta = as_matrix(grad)
        x_grad = input_gradient(delta, x, weight, ctx.backward_weight) if needs_x else None
        weight_grad = weight_gradient(delta, x, map_of(x, weight)) if needs_weight else None
        bias_grad = delta.sum(0, dtype=ctx.bias_dtype) if needs_bias else None
        return x_grad, weight_grad, bias_grad, None


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b without a graph, by the product that takes less time."""
    if _pays(x, weight):
        return map_of(x, weight).activated(x, weight, bias, _IDENTITY)[0]
    bias = None if bias is None else in_dtype(bias, x.dtype)
    return F.linear(x, in_dtype(weight, x.dtype), bias)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, backward: BackwardWeight | None = None
) -> Tensor:
    """`F.linear`, on a tape with our own products."""
    compiling = torch.compiler.is_compiling()
    on_tape = not compiling and state.tape is not None and state.tape.gates
    needed = backward is not None or (not compiling and saved_tensor_hooks_active())
    if needed or on_tape:
        x, (weight,) = in_dtype_of_autocast(x, [weight])
    if needed or (on_tape and _pays(x, weight)):
        return _Linear.apply(x, weight, bias, backward)
    return F.linear(x, weight, bias)


# Multiplications of a product from which ours save more time than the node in Python takes: on one
# Zen 4 core 2^24, on two 2^24 to 2^25 (float32, four layers with batch norm between them).
_PAYING = 2**24


def _pays(x: Tensor, weight: Tensor) -> bool:
    large = x.numel() * len(weight) >= _PAYING
    return large and products.multiplies(x, wide=x.dtype != weight.dtype)


def as_matrix(x: Tensor) -> Tensor:
    """[*rows, n] as [M, n]."""
    if x.dim() == 2:  # flatten would take 2 us to return x itself
        return x
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # `to` would take 1 us to return x itself


def weight_gradient(delta: Tensor, x: Tensor, linear_map: LinearMap = LINEAR) -> Tensor:
    """dW = delta^T x, [n, k], of delta [M, n] and x [*rows, k]."""
    return linear_map.weight_gradients([delta], [], [x])[0]


def activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Gate,
    affine: Affine,
    backward: BackwardWeight | None,
) -> Tensor:
    """f(x W + b) for an activation that the kernels know, on the tape where its input is cut."""
    x, (weight,) = in_dtype_of_autocast(x, [weight], may_be_wide=affine is LINEAR)
    if affine is LINEAR:
        affine = map_of(x, weight)
    with torch.no_grad():
        h, a = affine.activated(x, weight, bias, gate)
    if not torch.is_grad_enabled():
        return h
    if not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return h
    tape = state.tape
    if tape is not None and tape.tapped is None and not tape.saves:
        return tape.unsaved(h)
    fed = None if torch.compiler.is_compiling() else []
    output = affine.attached(h, a, x, weight, bias, gate, fed, backward)
    saved = h if a is None else a
    _record(output, saved, x, weight, bias, gate, affine, fed)
    return output


def gate_of(activation: nn.Module | None) -> Gate | None:
    """As `activations.gate_of`; None on a tape where layers run as torch's own functions."""
    if state.tape is not None and not state.tape.gates:
        return None
    return activations.gate_of(activation)


def _record(output: Tensor, saved: Tensor, x: Tensor, *layer: Any) -> None:
    """Puts a layer on the tape, for the fused path, unless its gradient must go through autograd.

    It must where the input has a gradient of its own, and under saved-tensor hooks (activation
    checkpointing, offloading): what the tape keeps would escape them.
    """
    tape = state.tape
    if tape is None or tape.tapped is not None or (tape.cuts and x.requires_grad):
        return
    versions = None
    if not torch.compiler.is_compiling():
        if saved_tensor_hooks_active():
            return
        versions = (saved._version, x._version)
    tape.newest = LayerRecord(output, saved, x, *layer, versions)


def saved_tensor_hooks_active() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts the arguments of `F.linear`, where it does."""
    kind = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@torch.compiler.assume_constant_result  # the Dynamo of PyTorch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def in_dtype_of_autocast(
    x: Tensor, weights: list[Tensor], may_be_wide: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Input and weights as autocast would cast them for `F.linear`.

    But weights that the kernels round as they read them stay as they are.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, weights
    x = x.to(dtype)
    may_be_wide = may_be_wide and all(weight.dtype == torch.float32 for weight in weights)
    if may_be_wide and products.multiplies(x, wide=True):
        return x, weights
    return x, [weight.to(dtype) for weight in weights]
