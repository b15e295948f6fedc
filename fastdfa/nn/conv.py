"""Holds the convolutions that cut the network at their input: `Conv1d` and `Conv2d`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations
from ..engine.layers import CutLayer
from ..engine.segment import gate_of, gated, with_input_gradient
from ..engine.tape import LayerRule, cut, note_reader, state


class _Convolution(CutLayer):
    """Adds to torch's convolutions the cut and the activation."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any  # torch names the few that there are
    _reversed_padding_repeated_twice: list[int]
    _convolve: ClassVar[Callable[..., Tensor]]

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
        rule = state.layer_rule
        if rule is not None:
            return self._by_rule(input, rule)
        behind = cut(self, input)
        is_cut, padding = behind is not input, self.padding
        if self.padding_mode != "zeros":
            # Padded with its history, which is cut then: so the same tensors are saved as where an
            # activation checkpoint runs the layer again, uncut.
            uncut = behind.requires_grad
            x = self._padded(behind if uncut else input)
            behind, padding = (x if uncut else x.detach()), "valid"
        output = self._product(behind, padding)
        if is_cut:
            note_reader(input, output)
        gate = gate_of(self)
        if gate is not None and input.dim() == self.weight.dim():
            output = gated(self, output, gate)
        elif self.activation is not None:
            output = self.activation(output)
        return output

    def _by_rule(self, x: Tensor, rule: LayerRule) -> Tensor:
        """Returns the same, where the input gradient reads another matrix than the weight."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = self._padded(x), "valid"
        x, numbers = self._padded_by_numbers(x, padding)
        y = self._product(x.detach(), numbers)
        y = with_input_gradient(self, y, x, rule, partial(self._input_gradient, numbers))
        return y if self.activation is None else self.activation(y)

    def _padded_by_numbers(
        self, x: Tensor, padding: str | tuple[int, ...]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Returns x, padded where one number for a dimension cannot say it, and these numbers."""
        if padding == "valid":
            return x, (0,) * len(self.kernel_size)
        if not isinstance(padding, str):
            return x, padding
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(n % 2 for n in total):  # the larger part comes last
            x = F.pad(x, [k for n in reversed(total) for k in (0, n % 2)])
        return x, tuple(n // 2 for n in total)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)

    def _product(self, x: Tensor, padding: str | tuple[int, ...]) -> Tensor:
        return self._convolve(
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def _input_gradient(
        self, padding: tuple[int, ...], delta: Tensor, x_shape: torch.Size, weight: Tensor
    ) -> Tensor:
        """Returns the gradient of an input from that of an output, [N, C, *S] or without N."""
        batched = delta if len(x_shape) == weight.dim() else delta.unsqueeze(0)
        x = delta.new_empty(()).expand((len(batched), *x_shape[-weight.dim() + 1 :]))
        grad, _, _ = torch.ops.aten.convolution_backward(
            batched, x, weight, None, self.stride, padding, self.dilation, False,
            (0,) * len(padding), self.groups, (True, False, False),
        )  # fmt: skip
        x_grad: Tensor = grad.view(x_shape)
        return x_grad


class Conv1d(_Convolution, nn.Conv1d):
    """Applies `nn.Conv1d` and an activation, and is trained by feedback inside a `DFA`.

    As `Conv2d`. Shapes: [N, C_in, L_in] -> [N, C_out, L_out], or both without N.
    """

    _convolve = staticmethod(F.conv1d)


class Conv2d(_Convolution, nn.Conv2d):
    """Applies `nn.Conv2d` and an activation, and is trained by feedback inside a `DFA`.

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
