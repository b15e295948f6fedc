"""Finds what is in a model, and leaves that model as it was: what every diagnostic needs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..dfa import DFA
from ..engine.inplace import NAME, InPlace
from ..engine.root import Root, roots_in


@contextmanager
def left_as_it_was(model: nn.Module, eagerly: bool = True) -> Iterator[None]:
    """Lets the model run forward and backward, inside, by itself and not compiled unless it may;
    then puts back its buffers and torch's random state."""
    tensors = [*model.parameters(), *model.buffers()]
    gpus = {x.device.index for x in tensors if x.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(gpus)))
        stack.enter_context(torch.inference_mode(False))  # enables gradients, too
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if (
            eagerly and "torch._dynamo" in sys.modules
        ):  # else nothing is compiled, and the import takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(on_copies_of_buffers(model))
        yield


@contextmanager
def on_copies_of_buffers(model: nn.Module) -> Iterator[None]:
    """Lets the model write to copies of its buffers, inside; but for the seed of a root, which
    would take it for a new one."""
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not isinstance(module, Root)
    ]
    copies = {id(buffer): buffer.detach().clone() for _, _, buffer in buffers}  # one, if shared
    for module, name, buffer in buffers:
        module._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


def called(model: Callable[..., Any], x: Any) -> Any:
    """Calls a model; a tuple x holds several arguments, a dict keyword arguments."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model itself, so that nothing is compiled, and no process waits for another."""
    wrapper = "module" if isinstance(model, nn.parallel.DistributedDataParallel) else "_orig_mod"
    inner: Any = getattr(model, wrapper, None)
    return model if inner is None else unwrapped(inner)


def undistributed(model: nn.Module) -> nn.Module:
    """Returns the model, compiled as it is, so that no process waits for another."""
    while isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters by the names that `inspect` gives them: those of points begin inside
    the wrapped module."""
    network = model.module if isinstance(model, Root) else model
    inside = [module.fastdfa for module in model.modules() if isinstance(module, InPlace)]
    of_roots = {id(parameter) for root in inside for parameter in root.parameters()}
    return {name: p for name, p in network.named_parameters() if id(p) not in of_roots}


def roots_of(model: nn.Module) -> dict[str, DFA]:
    """Returns the roots in a model by their names.

    Raises:
        TypeError, ValueError: for a model without one, or sharded by `fully_shard`.
    """
    found = roots_in(model, DFA)
    roots = {name.removesuffix(NAME).removesuffix("."): root for name, root in found.items()}
    sharded = [name for name, x in model.named_parameters() if type(x.data).__name__ == "DTensor"]
    if sharded:
        raise ValueError(f"model must not be sharded, got {sharded[0]!r}; do this before that")
    return roots
