"""Holds the base of all layers that cut the network at their input, and of all modules here."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn


class NoScript(nn.Module):
    """Refuses TorchScript, which would drop the backward pass or fail in a file of ours."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"TorchScript cannot hold a {type(self).__name__}: use torch.export.export(model, "
            "args), whose program needs no fastdfa, or torch.onnx.export(..., dynamo=True)"
        )

    # What torch calls in place of `forward` while it traces, and only then.
    def _slow_forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.__prepare_scriptable__()


class CutLayer(NoScript):
    """Serves as the base of all layers that cut the network at their input, in a `DFA`."""

    in_segments = False  # whether it is fully connected, and may be computed without its call

    weight: Tensor
    bias: Any  # a parameter or None, which torch declares in another way in each of its layers
    activation: nn.Module | None
    out_features: int  # of a fully connected layer alone

    def reads(self, shape: torch.Size, weight: Tensor) -> bool:
        """Returns whether the layer, of this weight, can read an input of this shape."""
        return len(shape) > 0 and shape[-1] == weight.shape[1]

    def input_shape(self, weight: Tensor) -> str:
        """Returns what shape its input must have, as an error says it."""
        return f"[*, {weight.shape[1]}]"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "forward" in cls.__dict__ and "in_segments" not in cls.__dict__:
            cls.in_segments = False  # what a class of a user does in its forward is not known
