"""Layers that cut the network at their input: `Linear`, and `FeedbackPoint` for whole blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import activations, ops
from .activations import Gate
from .gemm import product, transposed_product
from .tape import LayerRecord, cut, note_reader, state


class Linear(nn.Linear):
    """`nn.Linear` followed by an activation, trained by feedback inside a `DFA`.

    Same arguments, initialisation, `state_dict` keys and forward numbers as `nn.Linear`. In a
    `DFA` its input is a feedback point, so that no input gradient is computed; outside one it
    trains by backprop like any layer.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        activation: a name such as "tanh" (see `fastdfa.activations.MODULES`), a module such as
            `nn.LeakyReLU(0.1)`, or None. Where the kernels know it, bias, activation and its
            derivative are fused, and the output is a view that refuses modification in place;
            any other module is called as it is.

    Shapes: [*, in_features] -> [*, out_features].

    Raises:
        ValueError, TypeError: for an activation that is not among these.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | nn.Module | None = None,
    ) -> None:
        module = activations.make(activation)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.activation = module

    def forward(self, input: Tensor) -> Tensor:
        behind = cut(self, input)
        gate = activations.gate_of(self.activation)
        if gate is not None:
            output = _activated_linear(behind, self.weight, self.bias, gate)
        else:
            output = _linear(behind, self.weight, self.bias)
            if self.activation is not None:
                output = self.activation(output)
        note_reader(input, output)
        return output


class FeedbackPoint(nn.Module):
    """An identity that cuts the network where it stands, in a `DFA`.

    For a block whose inside is trained by local backprop: what follows, up to the next point or
    the output, learns from the feedback there, or from the true gradient after the last point.

    Args:
        rows: how many leading dimensions of the input are rows of the error. By default a
            point [*R, n] is fed row by row an error [*R, C], and any other point takes the first
            dimension as rows and flattens the rest in logical order.
    """

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int)):
            raise TypeError(f"rows must be an int or None, got {type(rows).__name__}")
        if rows is not None and rows < 0:
            raise ValueError(f"rows must not be negative, got {rows}")
        self.rows = rows

    def forward(self, input: Tensor) -> Tensor:
        return cut(self, input, self.rows)

    def extra_repr(self) -> str:
        return "" if self.rows is None else f"rows={self.rows}"


class _ActivatedLinear(torch.autograd.Function):
    """h = f(x W^T + b) as one node; h comes in computed, and a where the gate needs that.

    The output is a view, so that autograd refuses a modification in place: the fused path reads
    h, and would gate wrongly.
    """

    @staticmethod
    def forward(ctx, output, a, x, weight, bias, kind, param):
        ctx.save_for_backward(output if a is None else a, x, weight)
        ctx.gate = (kind, param)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, x, weight = ctx.saved_tensors
        delta, bias_grad = ops.gate(as_matrix(grad), as_matrix(saved), *ctx.gate)
        _, _, needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        x_grad = (delta @ weight).view(x.shape) if needs_x else None
        weight_grad = weight_gradient(delta, x) if needs_weight else None
        bias_grad = bias_grad.to(ctx.bias_dtype) if needs_bias else None
        return None, None, x_grad, weight_grad, bias_grad, None, None


class _CheckpointedLinear(torch.autograd.Function):
    """F.linear that saves input and weight whether or not its input is cut.

    Activation checkpointing runs a layer again in backward, without a tape, so uncut, and demands
    that it saves the same tensors.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        delta = as_matrix(grad)
        x_grad = (delta @ weight).view(x.shape) if needs_x else None
        weight_grad = weight_gradient(delta, x) if needs_weight else None
        return x_grad, weight_grad, delta.sum(0) if needs_bias else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.compiler.is_compiling() or not _saved_tensor_hooks_active():
        return F.linear(x, weight, bias)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _CheckpointedLinear.apply(x, weight, bias)


def as_matrix(x: Tensor) -> Tensor:
    """[*rows, n] as [M, n]."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def weight_gradient(delta: Tensor, x: Tensor) -> Tensor:
    """dW = delta^T x, [n, k], of delta [M, n] and x [*rows, k]."""
    return transposed_product(delta, as_matrix(x))


def _activated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate) -> Tensor:
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.no_grad():
        h, a = _forward(x, weight, bias, gate)
    if not torch.is_grad_enabled():
        return h
    if not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return h
    output = _ActivatedLinear.apply(h, a, x, weight, bias, *gate)
    _record(LayerRecord(output, h if a is None else a, x, weight, bias, gate, None, None))
    return output


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate
) -> tuple[Tensor, Tensor | None]:
    """Returns h, and the input a of the activation where the gate cannot do with h."""
    if gate.from_output:
        h = product(x, weight)
        ops.activate_(h, bias, *gate)
        return h, None
    a = F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return activations.apply(a, *gate), a


def _record(record: LayerRecord) -> None:
    """Puts a layer on the tape, for the fused path, unless its gradient must go through autograd.

    It must where the input has a gradient of its own, and under saved-tensor hooks (activation
    checkpointing, offloading): what the tape keeps would escape them.
    """
    tape = state.tape
    if tape is None or tape.tapped is not None or record.input.requires_grad:
        return
    versions = None
    if not torch.compiler.is_compiling():
        if _saved_tensor_hooks_active():
            return
        versions = (record.saved._version, record.input._version)
    tape.layers = record._replace(versions=versions, previous=tape.layers)


def _saved_tensor_hooks_active() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts the arguments of `F.linear`, where it does."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
