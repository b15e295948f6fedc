"""Holds the convolutions that cut the network at their input: `Conv1d` and `Conv2d`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, arguments
from ..engine.layers import CutLayer
from ..engine.segment import check_input, gate_of, gated, with_input_gradient
from ..engine.tape import LayerRule, cut, note_reader, state
from ..ops.tracing import wants_gradient

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


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
    _positions: ClassVar[int]  # dimensions of an input behind its channels

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
        arguments.flag("bias", bias)
        arguments.choice("padding_mode", padding_mode, _PADDING_MODES)
        arguments.memory(device, dtype)
        count = self._positions
        if isinstance(padding, str):
            arguments.choice("padding", padding, ("valid", "same"))
        else:
            padding = _sizes("padding", padding, count, 0)
        super().__init__(
            arguments.integer("in_channels", in_channels, 0),
            arguments.integer("out_channels", out_channels, 0),
            _sizes("kernel_size", kernel_size, count),
            _sizes("stride", stride, count),
            padding,
            _sizes("dilation", dilation, count),
            arguments.integer("groups", groups),
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.activation = module

    def forward(self, input: Tensor) -> Tensor:
        rule = state.layer_rule
        try:
            output = self._by_rule(input, rule) if rule is not None else self._cut(input)
        except Exception:
            check_input(self, input, self.weight)
            raise
        if rule is not None:
            return output if self.activation is None else self.activation(output)
        gate = gate_of(self)
        if gate is not None and input.dim() == self.weight.dim():
            output = gated(self, output, gate)
        elif self.activation is not None:
            output = self.activation(output)
        return output

    def _cut(self, input: Tensor) -> Tensor:
        """Returns the product, of an input that is cut."""
        x = cut(self, input)
        is_cut, padding = x is not input, self.padding
        if self.padding_mode != "zeros":
            # Padded with its history, which is cut then: so the same tensors are saved as where an
            # activation checkpoint runs the layer again, uncut.
            uncut = wants_gradient(x)
            x = self._padded(x if uncut else input)
            x, padding = (x if uncut else x.detach()), "valid"
        output = self._product(x, padding)
        if is_cut:
            note_reader(input, output)
        return output

    def _by_rule(self, x: Tensor, rule: LayerRule) -> Tensor:
        """Returns the same, where the input gradient reads another matrix than the weight."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = self._padded(x), "valid"
        x, numbers = self._padded_by_numbers(x, padding)
        y = self._product(x.detach(), numbers)
        return with_input_gradient(self, y, x, rule, partial(self._input_gradient, numbers))

    def reads(self, shape: torch.Size, weight: Tensor) -> bool:
        least = self._least_sizes()
        if len(shape) not in (len(least) + 1, len(least) + 2):
            return False
        channels, *sizes = shape[-len(least) - 1 :]
        enough = all([size >= n for size, n in zip(sizes, least, strict=True)])
        return enough and channels == weight.shape[1] * self.groups

    def input_shape(self, weight: Tensor) -> str:
        sizes = [str(weight.shape[1] * self.groups), *(f">= {n}" for n in self._least_sizes())]
        shape = ", ".join(sizes)
        return f"[N, {shape}] or [{shape}]"

    def _least_sizes(self) -> list[int]:
        """Returns how large an input must be in each dimension, so that the kernel fits in."""
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if isinstance(self.padding, str):
            return [1 if self.padding == "same" else size for size in reach]
        return [max(n - 2 * p, 1) for n, p in zip(reach, self.padding, strict=True)]

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
        weight = self.weight
        if torch.compiler.is_compiling():
            check_input(self, x, weight)
        return self._convolve(
            x, weight, self.bias, self.stride, padding, self.dilation, self.groups
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
    _positions = 1


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
        ValueError, TypeError: for an argument that is not so, and as `nn.Conv2d`. In the forward
            pass as `fastdfa.Linear`.
    """

    _convolve = staticmethod(F.conv2d)
    _positions = 2


def _sizes(name: str, value: Any, count: int, low: int = 1) -> Any:
    """Returns an int, or as many as there are positions."""
    if not isinstance(value, (list, tuple)):
        return arguments.integer(name, value, low)
    if len(value) != count:
        raise arguments.wrong_value(name, f"an int or {count} of them", value)
    return tuple(arguments.integer(f"{name}[{i}]", size, low) for i, size in enumerate(value))
