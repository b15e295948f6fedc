"""Tells passes that torch traces or transforms from those that run as they are written."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .typed import constant

_innermost = torch._C._functorch.peek_interpreter_stack
_stack = torch._C._functorch.get_interpreter_stack
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped = torch._C._functorch.get_unwrapped


@constant
def transformed() -> bool:
    """Returns whether a transform of `torch.func` runs: grad, vjp, vmap, jacrev, ..."""
    return _innermost() is not None


def traced() -> bool:
    """Returns whether `torch.compile` traces what runs, or a transform of `torch.func` runs it.

    There layers are torch's own functions, which both know.
    """
    return torch.compiler.is_compiling() or transformed()


def check_or_untrace() -> None:
    """Raises a RuntimeError where the transforms of `torch.func` that run ask for other than first
    derivatives by one backward pass; and breaks the graph of those that Dynamo cannot trace."""
    kinds = _kinds()
    if torch.compiler.is_compiling():
        if kinds != ("Grad",):  # PyTorch 2.13 traces no function of ours inside vmap
            _untraced()
        return
    if "Jvp" in kinds or kinds.count("Grad") > 1:
        raise RuntimeError(
            "a DFA has first derivatives alone, made by a backward pass: expected one of grad, vjp "
            f"and jacrev of torch.func, in or around any vmap, got {', '.join(kinds)} (jvp, jacfwd "
            "and hessian are Jvp). fastdfa.backprop(model) gives true ones"
        )


@constant
def _kinds() -> tuple[str, ...]:
    """Returns the names of the transforms that run, the outermost first."""
    return tuple(transform.key().name for transform in _stack() or ())


@partial(torch.compiler.disable, reason="a DFA inside these transforms of torch.func runs eagerly")
def _untraced() -> None:
    return None


def wants_gradient(x: Tensor) -> bool:
    """Returns whether x requires grad: inside `torch.vmap`, whether what it is a part of does."""
    if x.requires_grad or torch.compiler.is_compiling():
        return x.requires_grad
    while not x.requires_grad and _is_wrapped(x):
        x = _unwrapped(x)
    return x.requires_grad
