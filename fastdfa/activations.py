"""Finds activations by name or module, and says how the kernels find their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import arguments

# By torch's own functions, of (a, param). The position of a name is its code in csrc/activation.h.
_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda a, _: a,
    "relu": lambda a, _: F.relu(a),
    "leaky_relu": F.leaky_relu,
    "tanh": lambda a, _: torch.tanh(a),
    "sigmoid": lambda a, _: torch.sigmoid(a),
    "elu": F.elu,
    "softplus": F.softplus,
    "gelu": lambda a, _: F.gelu(a),
    "gelu_tanh": lambda a, _: F.gelu(a, approximate="tanh"),
    "silu": lambda a, _: F.silu(a),
}
KINDS = tuple(_FUNCTIONS)
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
    arguments.instance("activation", activation, str, "a name, an nn.Module or None")
    arguments.choice("activation", activation, MODULES)
    return MODULES[activation]()


_RELU, _TANH, _SIGMOID = Gate(1), Gate(3), Gate(4)
_GATES: dict[type[nn.Module], Callable[[Any], Gate | None]] = {
    nn.ReLU: lambda m: _RELU,
    # With a negative slope the output's sign no longer tells the input's.
    nn.LeakyReLU: lambda m: Gate(2, m.negative_slope) if m.negative_slope >= 0 else None,
    nn.Tanh: lambda m: _TANH,
    nn.Sigmoid: lambda m: _SIGMOID,
    nn.ELU: lambda m: Gate(5, m.alpha) if m.alpha >= 0 else None,
    # Another threshold than torch's default would change the forward numbers.
    nn.Softplus: lambda m: Gate(6, m.beta) if m.beta > 0 and m.threshold == 20 else None,
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
    """Returns f(a), out of place."""
    return _FUNCTIONS[KINDS[kind]](a, param)
