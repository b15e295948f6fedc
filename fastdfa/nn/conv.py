"""Convolutions that cut the network at their input: `Conv1d` and `Conv2d`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import activations, ops
from ..activations import Gate
from ..engine.fused import activated, autocast_dtype, gate_of, gated
from ..engine.tape import Fed, backward_weight, cut, note_reader

if TYPE_CHECKING:
    from ..layerwise import BackwardWeight


class _Convolution:
    """What `Conv1d` and `Conv2d` add to torch's: the cut and the activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | nn.Module | None = None,
    ) -> None:
        module = activations.make(activation)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self.activation = module

    def forward(self, input: Tensor) -> Tensor:
        behind, padding = cut(self, input), self.padding
        if self.padding_mode != "zeros":
            # Padded with its history, which is cut then: so the same tensors are saved as where an
            # activation checkpoint runs the layer again, uncut.
            uncut = behind.requires_grad
            source = behind if uncut else input
            x = F.pad(source, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            behind, padding = (x if uncut else x.detach()), "valid"
        gate, backward = gate_of(self.activation), backward_weight(self)
        if gate is not None and input.dim() == self.weight.dim():
            x, affine = self._map(behind, padding)
            output = activated(x, self.weight, self.bias, gate, affine, backward)
        else:
            if backward is not None:
                output = self._fed_back(behind, padding, backward)
            else:
                output = self._convolve(
                    behind, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
                )
            if self.activation is not None:
                output = self.activation(output)
        note_reader(input, output)
        return output

    def _fed_back(
        self, x: Tensor, padding: str | tuple[int, ...], backward: BackwardWeight
    ) -> Tensor:
        """The convolution, the input gradient of which reads another weight."""
        batched = x.dim() == self.weight.dim()
        x, affine = self._map(x if batched else x.unsqueeze(0), padding)
        weight, bias, dtype = self.weight, self.bias, autocast_dtype(x)
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        y = _Convolved.apply(None, x, weight, bias, affine, backward)
        return y if batched else y.squeeze(0)

    def _map(self, x: Tensor, padding: str | tuple[int, ...]) -> tuple[Tensor, ConvolutionMap]:
        """The convolution of x, padded where that cannot be said by one number for a dimension."""
        if padding == "valid":
            padding = (0,) * len(self.kernel_size)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            padding = tuple(n // 2 for n in total)
            if any(n % 2 for n in total):  # the larger part comes last
                x = F.pad(x, [k for n in reversed(total) for k in (0, n % 2)])
        return x, ConvolutionMap(
            tuple(self.weight.shape), self.stride, padding, self.dilation, self.groups
        )


class ConvolutionMap(NamedTuple):
    """x * W + b of x [N, C_in, *S_in], W [C, C_in / groups, *K]; see `tape.Affine`.

    An output [N, C, *S] is a matrix [N, C S] to the kernels, or [N, S C] where it lies like that in
    memory.
    """

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def activated(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Gate
    ) -> tuple[Tensor, Tensor | None]:
        a = self.convolved(x, weight, bias)
        if not gate.from_output:
            return activations.apply(a, *gate), a
        h = a if a.is_contiguous() else a.movedim(1, -1).contiguous().movedim(-1, 1)
        ops.activate_(self.matrix(h, h), None, *gate)
        return h, None

    def convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(weight.dtype)
        return torch.convolution(x, weight, bias, *self._options())

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
        place = _Convolved.apply(h, x, weight, bias, self, backward)
        return _Gated.apply(h, a, place, gate, fed, self)

    def matrix(self, x: Tensor, saved: Tensor) -> Tensor:
        return (x if saved.is_contiguous() else x.movedim(1, -1)).flatten(1)

    def tensor(self, delta: Tensor, saved: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if saved.is_contiguous():
            return delta.view(saved.shape)
        return delta.view(saved.movedim(1, -1).shape).movedim(-1, 1)

    def fed_by_rows(self, saved: Tensor, rows: torch.Size) -> bool:
        return saved.shape[:1] == rows

    def weight_gradients(
        self, deltas: list[Tensor], saved: list[Tensor], inputs: list[Tensor]
    ) -> list[Tensor]:
        return [self._weight_gradient(*each) for each in zip(deltas, saved, inputs, strict=True)]

    def _weight_gradient(self, delta: Tensor, saved: Tensor, x: Tensor) -> Tensor:
        weight = x.new_empty(self.weight_shape)  # its shape is all that is read
        return self.gradients(self.tensor(delta, saved), x, weight, (False, True, False))[1]

    def bias_gradient(self, sums: Tensor, saved: Tensor) -> Tensor:
        channels = self.weight_shape[0]
        if saved.is_contiguous():
            return sums.view(channels, -1).sum(1)
        return sums.view(-1, channels).sum(0)

    def gradients(
        self, delta: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and bias, those that are needed."""
        bias = [self.weight_shape[0]]
        return torch.ops.aten.convolution_backward(delta, x, weight, bias, *self._options(), needed)

    def _options(self) -> tuple[Any, ...]:
        """What `aten::convolution` takes behind its tensors."""
        no = (0,) * len(self.stride)
        return self.stride, self.padding, self.dilation, False, no, self.groups


class _Convolved(torch.autograd.Function):
    """A convolution; where it is computed already, of the shape of h, its place in the graph alone,
    which takes no memory.

    Not one node with the activation, so that the gradient of h is freed before these are made: one
    node holds both, and put the peak of a step above backprop's (49 against 44 MiB).
    """

    @staticmethod
    def forward(ctx, h, x, weight, bias, affine, backward):
        ctx.save_for_backward(x, weight)
        ctx.affine, ctx.backward_weight = affine, backward
        if h is None:
            return affine.convolved(x, weight, bias)
        return h.new_empty(()).expand(h.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, delta):
        x, weight = ctx.saved_tensors
        if ctx.backward_weight is not None and ctx.needs_input_grad[1]:
            weight = ctx.backward_weight.of(weight)  # read by the gradient of x alone
        needed = ctx.needs_input_grad[1:4]
        return None, *ctx.affine.gradients(delta, x, weight, needed), None, None


class _Gated(torch.autograd.Function):
    """h = f(a), computed already. A view, as of `Linear`, so that no modification in place fits."""

    @staticmethod
    def forward(ctx, h, a, place, gate, fed, affine):
        ctx.save_for_backward(h if a is None else a)
        ctx.gate, ctx.fed, ctx.affine = gate, fed, affine
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (saved,) = ctx.saved_tensors
        delta, _ = gated(grad, saved, ctx.gate, ctx.fed, ctx.affine)
        return None, None, ctx.affine.tensor(delta, saved), None, None, None


class Conv1d(_Convolution, nn.Conv1d):
    """`nn.Conv1d` followed by an activation, trained by feedback inside a `DFA`.

    As `Conv2d`. Shapes: [N, C_in, L_in] -> [N, C_out, L_out], or both without N.
    """

    _convolve = staticmethod(F.conv1d)


class Conv2d(_Convolution, nn.Conv2d):
    """`nn.Conv2d` followed by an activation, trained by feedback inside a `DFA`.

    Same arguments, initialisation, `state_dict` keys and forward numbers as `nn.Conv2d`. In a
    `DFA` its input is a feedback point, of C H W features in this order whatever the memory
    format, so that no input gradient is computed; outside one it trains by backprop like any layer.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
        padding_mode, device, dtype: as in `nn.Conv2d`.
        activation: as in `fastdfa.Linear`.

    Shapes: [N, C_in, H_in, W_in] -> [N, C_out, H_out, W_out], or both without N.

    Raises:
        ValueError, TypeError: for an activation that is not among these, and as `nn.Conv2d`.
    """

    _convolve = staticmethod(F.conv2d)
