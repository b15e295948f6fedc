"""Runs a network that is one segment, head included: one op forward, one node backward.

Such is an `nn.Sequential` of fully connected layers, norms and activations, from its input to its
head. It goes round tape, points and the calls of the layers; nothing is there that could lead round
a cut. What it was found from is compared in each pass, and only where it has changed is it found
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import activations
from ..activations import IDENTITY, Gate, hooked
from . import norms
from .broadcast import Receiver, Sender
from .inplace import own_modules
from .layers import CutLayer
from .nodes import SegmentNode
from .plan import Plan
from .segment import learns
from .stages import (
    Segment,
    Stage,
    autocast_dtype,
    in_dtype_of_autocast,
    saved_tensor_hooks_active,
)


class Whole(NamedTuple):
    """Holds a network that is one segment.

    Attributes:
        front: modules that are called on the input.
        segment: its stages and its head.
        weights, biases: of all layers.
        trained: the norms' parameters that require grad.
        modules, kinds: all modules that it follows from, and their classes.
        attributes: of these modules, live, for a look at their hooks.
        found_from: what those with parameters or options were.
        memory: dtype and device of the outputs.
        settings: of the input and of autocast, for which it holds.
    """

    front: list[nn.Module]
    segment: Segment
    layers: list[CutLayer]
    weights: list[Tensor]
    biases: list[Tensor | None]
    trained: list[nn.Parameter]
    modules: list[nn.Module]
    kinds: list[type]
    attributes: list[dict[str, Any]]
    found_from: list[Found]
    memory: tuple[torch.dtype, torch.device]
    settings: tuple[Any, ...]


def runs_alone(x: Any) -> bool:
    """Returns whether nothing outside the network asks for the calls of its layers."""
    if type(x) is not Tensor or x.dim() < 2 or x.requires_grad:
        return False
    return not (_has_any_global_hook() or saved_tensor_hooks_active())


def still_holds(whole: Whole, x: Tensor) -> bool:
    """Returns whether what `find` has found is what it would find again.

    Which modules there are is not looked at, but for activations of layers: a root finds everything
    again where one of its containers holds others.
    """
    if whole.settings != _settings(x) or not _large_enough(whole.segment.stages, x):
        return False
    # As `hooked`, whose calls would take twice as long.
    for of in whole.attributes:
        if of["_forward_hooks"] or of["_forward_pre_hooks"] or "forward" in of:
            return False
        if of["_backward_hooks"] or of["_backward_pre_hooks"] or "_compiled_call_impl" in of:
            return False
    if list(map(type, whole.modules)) != whole.kinds:
        return False
    return all(map(Found.stays, whole.found_from))


def _settings(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, x.dim() == 2, x.shape[1:], autocast_dtype(x)


class Found:
    """Holds what a layer, a norm or an activation was when a network was found in it."""

    __slots__ = ("activation", "attributes", "gate", "module", "parameters", "values")

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attributes = module.__dict__["_parameters"]
        self.activation = module.__dict__["_modules"].get("activation")
        self.parameters = list(self.attributes.values())
        self.values = [_how(p) for p in self.parameters if p is not None]
        # Of an activation with options, which may change.
        self.gate = activations.gate_of(module) if activations.has_options(module) else None

    def stays(self) -> bool:
        """Returns whether the module is what it was."""
        module = self.module
        if module.__dict__["_modules"].get("activation") is not self.activation:
            return False
        parameters = list(self.attributes.values())
        for now, before in zip(parameters, self.parameters, strict=False):
            if now is not before:
                return False
        if self.values != [_how(p) for p in parameters if p is not None]:
            return False
        return self.gate is None or self.gate == activations.gate_of(module)


def _may_change(module: nn.Module) -> bool:
    return bool(module._parameters) or activations.has_options(module) or bool(module._buffers)


def _how(parameter: nn.Parameter) -> tuple[bool, torch.dtype, torch.Size]:
    return parameter.requires_grad, parameter.dtype, parameter.shape


def modules_in(sequential: nn.Sequential) -> Iterator[nn.Module]:
    """Yields the modules in turn, those of an `nn.Sequential` inside in its place, unless that has
    hooks."""
    if hooked(sequential):
        yield sequential
        return
    for module in sequential._modules.values():
        if type(module) is nn.Sequential:
            yield from modules_in(module)
        elif type(module) is not nn.Identity or hooked(module):
            yield module


def find(root: nn.Sequential, x: Tensor, chosen: Any) -> Whole | None:
    """Returns the network that a module is, for inputs like x, if that is all there is.

    Args:
        chosen: the layers at whose inputs the network is cut; None for all.
    """
    parts, inside = _parts(list(modules_in(root))), [module for _, module in own_modules(root)]
    if parts is None:
        return None
    front, stages, head = parts
    layers = [*(stage.layer for stage in stages), head]
    memory = _memory(front, layers, x)
    if memory is None or not _norms_usable(stages, front, x):
        return None
    cuts = tuple(chosen is None or layer in chosen for layer in layers[1:])
    normed = [stage.norm for stage in stages if stage.norm is not None]
    return Whole(
        front,
        Segment(tuple(stages), True, cuts),
        layers,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
        [p for norm in normed for p in norms.trained(norm)],
        inside,
        list(map(type, inside)),
        [module.__dict__ for module in inside],
        [Found(module) for module in inside if _may_change(module)],
        memory,
        _settings(x),
    )


def forward(whole: Whole, plan: Plan, x: Tensor, sender: Sender | None) -> Tensor:
    """Returns the network's output; its backward is that of DFA, with what a sender makes of the
    error."""
    for module in whole.front:
        x = module(x)
    x, weights = in_dtype_of_autocast(x, whole.weights)
    receiver = None
    if plan.products:
        receiver, number = Receiver(), 0
        receiver.broadcast = plan.broadcast()
        for cut in whole.segment.cuts:
            receiver.numbers.append(number if cut else None)
            number += cut
    parameters = (*weights, *whole.biases, *whole.trained)
    y: Tensor = SegmentNode.apply(whole.segment, receiver, sender, x, *parameters)
    return y


def _parts(modules: Sequence[nn.Module]) -> tuple[list[nn.Module], list[Stage], CutLayer] | None:
    """Returns front, stages and head.

    What does not fit together otherwise (widths, dtypes, devices) the ops refuse.
    """
    front: list[nn.Module] = []
    layers: list[tuple[CutLayer, list[nn.Module]]] = []  # with what stands behind each
    for module in modules:
        if hooked(module):
            return None
        if isinstance(module, CutLayer) and module.in_segments:
            activation = module._modules.get("activation")
            layers.append((module, [] if activation is None else [activation]))
        else:
            (layers[-1][1] if layers else front).append(module)
    if any(type(module) is not nn.Dropout and not _makes_matrix(module) for module in front):
        return None
    if len(layers) < 2 or not all(learns(layer) for layer, _ in layers):
        return None
    head, behind = layers.pop()
    stages = [_stage(*layer) for layer in layers]
    found = [stage for stage in stages if stage is not None]
    return None if behind or len(found) < len(stages) else (front, found, head)


def _stage(layer: CutLayer, behind: list[nn.Module]) -> Stage | None:
    own = layer._modules.get("activation")
    norm: Any = None
    if behind and type(behind[0]) in norms.KINDS and behind[0] is not own:
        norm = behind[0]
    gates = [activations.gate_of(module) for module in behind[norm is not None :]]
    gate = gates[0] if gates else Gate(IDENTITY)
    return None if len(gates) > 1 or gate is None else Stage(layer, norm, gate)


def _norms_usable(stages: Sequence[Stage], front: Sequence[nn.Module], x: Tensor) -> bool:
    """Returns whether each norm is one that is made here, of the columns or rows of a matrix."""
    found = [stage.norm for stage in stages if stage.norm is not None]
    if len(found) > len(set(found)):  # one that is there twice
        return False
    if found and not (x.dim() == 2 or any(map(_makes_matrix, front))):
        return False
    low = autocast_dtype(x) is not None
    usable = [
        norms.usable(norm, len(layer.weight), low) for layer, norm, _ in stages if norm is not None
    ]
    return all(usable) and _large_enough(stages, x)


def _large_enough(stages: Sequence[Stage], x: Tensor) -> bool:
    """Returns whether a batch has as many rows as the norms here want."""
    return len(x) > 1 or all(
        len(x) >= norms.fewest_rows(stage.norm) for stage in stages if stage.norm is not None
    )


def _makes_matrix(module: nn.Module) -> bool:
    """Returns whether a module flattens samples, and keeps the rows that its input has."""
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def _memory(
    front: Sequence[nn.Module], layers: Sequence[CutLayer], x: Tensor
) -> tuple[torch.dtype, torch.device] | None:
    """Returns dtype and device of all outputs; None where an input and the layers do not fit."""
    lowered = autocast_dtype(x)
    features = x.shape[1:].numel() if any(map(_makes_matrix, front)) else x.shape[-1]
    for layer in layers:
        weight = layer.weight
        if weight.shape[1] != features or weight.device != x.device:
            return None
        if lowered is None and weight.dtype != x.dtype:
            return None
        features = len(weight)
    return lowered or x.dtype, x.device
