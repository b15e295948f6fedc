"""Gives types to what torch leaves without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def constant(function: _F) -> _F:
    """Marks a function whose result is a constant of a compiled step, guarded by its arguments."""
    marked: _F = torch.compiler.assume_constant_result(function)
    return marked


def uncompiled(function: _F) -> _F:
    """Marks a function that is never compiled: it breaks the graph where it is called."""
    marked: _F = torch.compiler.disable(function)
    return marked


class Function(torch.autograd.Function):
    """Serves as the base of our nodes: torch's own, whose `apply` has no types."""

    apply: ClassVar[Callable[..., Any]]
