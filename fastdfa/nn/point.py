"""Cuts the network anywhere: `FeedbackPoint`, and hooks that put one behind or before modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import arguments
from ..engine.layers import CutLayer, NoScript
from ..engine.tape import cut, note_outside, note_reader, state


class FeedbackPoint(NoScript):
    """Cuts the network where it stands, in a `DFA`; an identity otherwise.

    For a block whose inside is trained by local backprop: what follows, up to the next point or
    the output, learns from the feedback there, or from the true gradient after the last point.

    An error e comes to a point of n_l features in one of three ways, B_l being [C, n_l]:

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
        self.rows: int | None = arguments.integer("rows", rows, 0, optional=True)
        self.features: int | None = arguments.integer("features", features, None, optional=True)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            raise arguments.wrong_type("the input of a FeedbackPoint", "a tensor", input)
        return self.cut(self, input)

    def cut(self, layer: nn.Module, input: Tensor) -> Tensor:
        """Cuts the network at `input`; the point is named by `layer`."""
        rows, features = self.rows, self.features
        if features is not None:
            rows = 1 if rows is None else rows
            features += input.dim() * (features < 0)
            if not rows <= features < input.dim():
                raise ValueError(
                    f"features={self.features} must be a dimension of the input behind the {rows} "
                    f"that are rows, got shape {tuple(input.shape)}"
                )
        behind = cut(layer, input, rows, features)
        if behind is not input:
            note_reader(input, behind)
        return behind

    def extra_repr(self) -> str:
        given = {"rows": self.rows, "features": self.features}
        return ", ".join(f"{name}={k}" for name, k in given.items() if k is not None)


class CutBehind:
    """Makes the output of a block a feedback point, of the block's name; a forward hook."""

    def __init__(self, point: FeedbackPoint) -> None:
        self.point = point

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        if state.tape is None:
            note_outside(block)
            return None
        check_no_backward_hooks(type(block).__name__, block)
        if isinstance(output, Tensor):
            return self.point.cut(block, output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            items = [self.point.cut(block, output[0]), *output[1:]]
            return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        raise TypeError(
            f"blocks: a {type(block).__name__} must return a tensor, or a tuple or list that "
            f"begins with one, got {type(output).__name__}; name a module inside it instead"
        )


class CutBefore:
    """Makes the first tensor that a module reads a feedback point, of the module's name; a forward
    pre-hook with keyword arguments.

    For layers with a forward of their own, or whose weight is made anew in each call: parametrized,
    quantized, adapters.
    """

    def __init__(self) -> None:
        self.point = FeedbackPoint()
        self.cuts = False  # whether the latest pass cut here, for checkpoints that run it again

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], Tensor):
            return (self._cut(module, args[0]), *args[1:]), kwargs
        name = next((name for name, x in kwargs.items() if isinstance(x, Tensor)), None)
        return None if name is None else (args, {**kwargs, name: self._cut(module, kwargs[name])})

    def _cut(self, module: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.point.cut(module, x)
        if state.tape is None and torch._C._current_graph_task_id() != -1:  # run again in backward
            # As a module saves other tensors where its input requires no grad.
            return x.detach() if self.cuts else x
        y = self.point.cut(module, x)
        self.cuts = x.requires_grad and not y.requires_grad
        return y


def cuts_before(module: nn.Module) -> bool:
    """Tells whether the network is cut at what a module reads."""
    return isinstance(module, (CutLayer, FeedbackPoint)) or any(
        isinstance(hook, CutBefore) for hook in module._forward_pre_hooks.values()
    )


def check_no_backward_hooks(name: str, block: nn.Module) -> None:
    """Raises where they wait for a gradient of what the block returns, as that has none."""
    if block._backward_hooks or block._backward_pre_hooks:
        raise ValueError(
            f"blocks: {name!r} has backward hooks, which would never fire, as its output is cut. "
            "Register them on a module inside it"
        )


def cut_modules(module: nn.Module) -> list[nn.Module]:
    """Returns the layers, points and blocks at which a network can be cut, in the order in which
    the module holds them; but not a first layer that reads the network's input, as nothing with
    parameters is before it."""
    found = [
        inner
        for inner in module.modules()
        if cuts_before(inner)
        or any(isinstance(hook, CutBehind) for hook in inner._forward_hooks.values())
    ]
    first = next((inner for inner in module.modules() if inner._parameters), None)
    if found and cuts_before(found[0]) and any(first is inner for inner in found[0].modules()):
        return found[1:]
    return found
