"""Gradients written into `.grad` round autograd's accumulation: `DFA(direct_gradients=True)`.

Autograd's takes 3 us a parameter. What it offers is lost: hooks of parameters, `autograd.grad`
with respect to them, and gradients that DistributedDataParallel and FSDP wait for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .fused import in_dtype

# The one input that requires grad of a node whose parameters are none: its gradient is never made.
ANCHOR = torch.zeros((), requires_grad=True)


def accumulate(parameters: Iterable[Tensor | None], grads: Iterable[Tensor | None]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = in_dtype(grad, parameter.dtype)
        else:
            parameter.grad.add_(grad)


def unwatched(layers: Iterable[nn.Module]) -> bool:
    """Whether no hook waits for the gradient of a parameter of these layers."""
    parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
    return not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def check_alone() -> None:
    """Raises where other processes wait for gradients of autograd."""
    distributed = torch.distributed
    running = distributed.is_available() and distributed.is_initialized()
    processes = distributed.get_world_size() if running else 1
    if processes > 1:
        raise RuntimeError(
            "direct_gradients=True goes round autograd's accumulation, for which "
            "DistributedDataParallel and FSDP wait, but torch.distributed runs "
            f"{processes} processes: leave it False"
        )
