"""Layers that cut the network at their input: `Linear`, and `FeedbackPoint` for whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import activations
from ..engine import chain
from ..engine.fused import LINEAR, activated, gate_of, linear
from ..engine.tape import backward_weight, cut, note_reader


class Linear(nn.Linear):
    """`nn.Linear` followed by an activation, trained by feedback inside a `DFA`.

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
        ready = chain.computed(self, input)
        if ready is not None:
            return ready
        behind, backward = cut(self, input), backward_weight(self)
        gate = gate_of(self.activation)
        if gate is not None:
            output = chain.begin(self, behind)
            if output is None:
                output = activated(behind, self.weight, self.bias, gate, LINEAR, backward)
        else:
            output = linear(behind, self.weight, self.bias, backward)
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
