"""Finds activations by name or module, and says how the kernels find their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The position of a name is its code in csrc/activation.h.
KINDS = (
    "identity",
    "relu",
    "leaky_relu",
    "tanh",
    "sigmoid",
    "elu",
    "softplus",
    "gelu",
    "gelu_tanh",
    "silu",
)
IDENTITY = 0
# From here on f' needs the input a; before it the output f(a) is enough, so nothing extra is kept.
FIRST_KIND_FROM_INPUT = KINDS.index("gelu")


class Gate(NamedTuple):
    """Names an activation that the kernels can differentiate: its code and its parameter."""

    kind: int
    param: float = 0.0

    @property
    def from_output(self) -> bool:
        """Tells whether f' is a function of the output f(a) rather than of the input a."""
        return self.kind < FIRST_KIND_FROM_INPUT


MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "softsign": nn.Softsign,
}


def make(activation: str | nn.Module | None) -> nn.Module | None:
    """Returns the module for a name; a module or None is returned as it is.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything that is neither a name, a module nor None.
    """
    if activation is None or isinstance(activation, nn.Module):
        return activation
    if not isinstance(activation, str):
        raise TypeError(
            f"activation must be a name, an nn.Module or None, got {type(activation).__name__}"
        )
    if activation not in MODULES:
        raise ValueError(f"activation must be one of {', '.join(MODULES)}, got {activation!r}")
    return MODULES[activation]()


def _leaky_relu(module: nn.LeakyReLU) -> Gate | None:
    # With a negative slope the output's sign no longer tells the input's.
    return Gate(2, module.negative_slope) if module.negative_slope >= 0 else None


def _elu(module: nn.ELU) -> Gate | None:
    return Gate(5, module.alpha) if module.alpha >= 0 else None


def _softplus(module: nn.Softplus) -> Gate | None:
    # Another threshold than torch's default would change the forward numbers.
    return Gate(6, module.beta) if module.beta > 0 and module.threshold == 20 else None


_RELU, _TANH, _SIGMOID = Gate(1), Gate(3), Gate(4)
_GATES: dict[type[nn.Module], Callable[[Any], Gate | None]] = {
    nn.ReLU: lambda m: _RELU,
    nn.LeakyReLU: _leaky_relu,
    nn.Tanh: lambda m: _TANH,
    nn.Sigmoid: lambda m: _SIGMOID,
    nn.ELU: _elu,
    nn.Softplus: _softplus,
    nn.GELU: lambda m: Gate(8 if m.approximate == "tanh" else 7),
    nn.SiLU: lambda m: Gate(9),
}


def gate_of(activation: nn.Module | None) -> Gate | None:
    """Returns the gate of a module that the kernels know, else None: it is then called as it is.

    A module with hooks or a forward of its own is called too, since only a call reaches them.
    """
    if activation is None:
        return None
    find = _GATES.get(type(activation))
    return None if find is None or hooked(activation) else find(activation)


def has_options(module: nn.Module) -> bool:
    """Returns whether a module that the kernels know has options, which may change."""
    return type(module) in (nn.LeakyReLU, nn.ELU, nn.Softplus, nn.GELU)


def hooked(module: nn.Module) -> bool:
    """Tells whether something waits for a call of this module, or stands in its place."""
    of = module.__dict__  # by far quicker than the attributes
    if of["_forward_hooks"] or of["_forward_pre_hooks"]:
        return True
    if of["_backward_hooks"] or of["_backward_pre_hooks"]:
        return True
    return "forward" in of or of.get("_compiled_call_impl") is not None


def apply(a: Tensor, kind: int, param: float) -> Tensor:
    """Returns f(a), out of place, by torch's own functions."""
    name = KINDS[kind]
    if name == "identity":
        return a
    if name == "leaky_relu":
        return F.leaky_relu(a, param)
    if name == "elu":
        return F.elu(a, param)
    if name == "softplus":
        return F.softplus(a, param)
    if name == "gelu_tanh":
        return F.gelu(a, approximate="tanh")
    result: Tensor = getattr(torch if name in ("tanh", "sigmoid") else F, name)(a)
    return result
