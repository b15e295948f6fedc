"""Holds `Linear`, a fully connected layer that cuts the network at its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import activations, arguments
from ..engine.layers import CutLayer
from ..engine.segment import activated, ahead, check_input, gate_of, linear, with_input_gradient
from ..engine.tape import LayerRule, cut, note_reader, state


class Linear(CutLayer, nn.Linear):
    """Applies `nn.Linear` and an activation, and is trained by feedback inside a `DFA`.

    Same arguments, initialisation, `state_dict` keys and forward numbers as `nn.Linear`. In a
    `DFA` its input is a feedback point, so that no input gradient is computed; in a `LayerFeedback`
    its input gradient reads another matrix; outside both it trains by backprop like any layer.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        activation: a name such as "tanh" (see `fastdfa.activations.MODULES`), a module such as
            `nn.LeakyReLU(0.1)`, or None. Where the kernels know it, bias, activation and its
            derivative are fused, and the output is a view that refuses modification in place;
            any other module is called as it is.

    Shapes: [*, in_features] -> [*, out_features].

    Raises:
        ValueError, TypeError: for an argument that is not so. In the forward pass, for an input
            that is no tensor; and RuntimeError, as `nn.Linear`, for one of another width, dtype or
            device, which names the layer.
    """

    in_segments = True

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
        arguments.flag("bias", bias)
        arguments.memory(device, dtype)
        super().__init__(
            arguments.integer("in_features", in_features, 0),
            arguments.integer("out_features", out_features, 0),
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.activation = module

    def forward(self, input: Tensor) -> Tensor:
        rule = state.layer_rule
        try:
            if rule is not None:
                return self._by_rule(input, rule)
            output = ahead(self, input)
            if output is not None:
                return output
            # A traced step has its products, and what stands behind them, from inductor.
            gate = None if torch.compiler.is_compiling() else gate_of(self)
            x = cut(self, input)
            output = linear(self, x) if gate is None else activated(self, x, gate)
        except Exception:
            check_input(self, input, self.weight)
            raise
        if x is not input:
            note_reader(input, output)
        if gate is None and self.activation is not None:
            output = self.activation(output)
        return output

    def _by_rule(self, x: Tensor, rule: LayerRule) -> Tensor:
        """Returns the same, where the input gradient reads another matrix than the weight."""
        y = linear(self, x.detach())
        y = with_input_gradient(self, y, x, rule, _input_gradient)
        return y if self.activation is None else self.activation(y)


def _input_gradient(delta: Tensor, x_shape: torch.Size, weight: Tensor) -> Tensor:
    return (delta @ weight).view(x_shape)
