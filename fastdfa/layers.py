"""Layers that cut the network at their input: `Linear`, and `FeedbackPoint` for whole blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import activations, ops
from .activations import Gate
from .gemm import product, transposed_product
from .tape import Affine, Fed, LayerRecord, cut, note_reader, state


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
            output = activated(behind, self.weight, self.bias, gate, _LINEAR)
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

    There are three ways to feed an error e to a point of n_l features, B_l being [C, n_l]:

    - by rows: a point [*R, n] under an error [*R, C] (tokens, nodes) receives e B_l, n_l = n;
    - flattened: any other point takes its first dimension as rows, or `rows` of them, under an
      error [N, C]; n_l is the product of the rest, in logical order. With the default scale a
      sample's feedback is as long (|e| / sqrt(C), on average) however many features it has;
    - by `features`: at a point with positions, such as an image [N, n, H, W] or a sequence
      [N, T, n], under an error [N, C], every position receives e B_l / sqrt(positions), n_l = n.
      A sample's feedback is as long as before (arXiv 2006.12878, TinyDFA), and the number of
      positions may change between passes.

    Args:
        rows: how many leading dimensions of the input are rows of the error.
        features: the dimension of the input that holds the features, 1 for images, -1 for
            sequences; those that are neither this nor rows (one, unless `rows` says otherwise)
            are positions.

    Raises:
        TypeError, ValueError: for what is not such a number, or, in the forward pass, not a
            dimension of the input behind its rows.
    """

    def __init__(self, rows: int | None = None, features: int | None = None) -> None:
        super().__init__()
        _check_dimension("rows", rows)
        _check_dimension("features", features)
        if rows is not None and rows < 0:
            raise ValueError(f"rows must not be negative, got {rows}")
        self.rows = rows
        self.features = features

    def forward(self, input: Tensor) -> Tensor:
        return self.cut(self, input)

    def cut(self, layer: nn.Module, input: Tensor) -> Tensor:
        """Cuts the network at `input`; the point is named by `layer`."""
        if self.features is None:
            return cut(layer, input, self.rows)
        rows = 1 if self.rows is None else self.rows
        features = self.features + input.dim() * (self.features < 0)
        if not rows <= features < input.dim():
            raise ValueError(
                f"features={self.features} must be a dimension of the input behind the {rows} that "
                f"are rows, got shape {tuple(input.shape)}"
            )
        return cut(layer, input, rows, features)

    def extra_repr(self) -> str:
        given = {"rows": self.rows, "features": self.features}
        return ", ".join(f"{name}={k}" for name, k in given.items() if k is not None)


def _check_dimension(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")


class LinearMap:
    """x W^T + b; see `tape.Affine`. An output [*rows, n] is a matrix [M, n] to the kernels."""

    def activated(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate
    ) -> tuple[Tensor, Tensor | None]:
        if gate.from_output:
            h = product(x, weight)
            ops.activate_(h, bias, *gate)
            return h, None
        a = F.linear(x, weight, None if bias is None else bias.to(weight.dtype))
        return activations.apply(a, *gate), a

    def attached(
        self,
        h: Tensor,
        a: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Gate,
        fed: Fed | None,
    ) -> Tensor:
        return _ActivatedLinear.apply(h, a, x, weight, bias, gate, fed)

    def matrix(self, x: Tensor, saved: Tensor) -> Tensor:
        return as_matrix(x)

    def fed_by_rows(self, saved: Tensor, rows: torch.Size) -> bool:
        return saved.shape[:-1] == rows

    def weight_gradient(self, delta: Tensor, saved: Tensor, x: Tensor) -> Tensor:
        return weight_gradient(delta, x)

    def bias_gradient(self, sums: Tensor, saved: Tensor) -> Tensor:
        return sums


_LINEAR = LinearMap()


class _ActivatedLinear(torch.autograd.Function):
    """h = f(x W^T + b) as one node; h comes in computed, and a where the gate needs that.

    The output is a view, so that autograd refuses a modification in place: the fused path reads
    h, and would gate wrongly.
    """

    @staticmethod
    def forward(ctx, h, a, x, weight, bias, gate, fed):
        ctx.save_for_backward(h if a is None else a, x, weight)
        ctx.gate, ctx.fed = gate, fed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, x, weight = ctx.saved_tensors
        _, _, needs_x, needs_weight, needs_bias, _, _ = ctx.needs_input_grad
        delta, bias_grad = gated(grad, saved, ctx.gate, ctx.fed, _LINEAR)
        x_grad = (delta @ weight).view(x.shape) if needs_x else None
        weight_grad = weight_gradient(delta, x) if needs_weight else None
        bias_grad = bias_grad.to(ctx.bias_dtype) if needs_bias else None
        return None, None, x_grad, weight_grad, bias_grad, None, None


def gated(
    grad: Tensor, saved: Tensor, gate: Gate, fed: Fed | None, affine: Affine
) -> tuple[Tensor, Tensor]:
    """The matrix delta and its sums over rows, from a gradient or from feedback that is due."""
    h = affine.matrix(saved, saved)
    if fed:  # the gradient only announces it
        return fed.pop()(h)
    return ops.gate(affine.matrix(grad, saved), h, *gate)


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
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _CheckpointedLinear.apply(x, weight, bias)


def as_matrix(x: Tensor) -> Tensor:
    """[*rows, n] as [M, n]."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def weight_gradient(delta: Tensor, x: Tensor) -> Tensor:
    """dW = delta^T x, [n, k], of delta [M, n] and x [*rows, k]."""
    return transposed_product(delta, as_matrix(x))


def activated(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate, affine: Affine) -> Tensor:
    """f(x W + b) for an activation that the kernels know, on the tape where its input is cut."""
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.no_grad():
        h, a = affine.activated(x, weight, bias, gate)
    if not torch.is_grad_enabled():
        return h
    if not (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return h
    fed = None if torch.compiler.is_compiling() else []
    output = affine.attached(h, a, x, weight, bias, gate, fed)
    saved = h if a is None else a
    _record(LayerRecord(output, saved, x, weight, bias, gate, affine, fed, None, None))
    return output


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


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts the arguments of `F.linear`, where it does."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
