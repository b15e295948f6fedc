"""Computes runs of layers by one op, behind one node: segments.

On a tape the first layer of a run computes all of it; each of the others finds its output ready, if
it is called with the output of the layer before, as it was. If not, it computes on its own: what
was computed ahead is at worst wasted, never wrong. Which layers follow each other is known from the
`nn.Sequential` that holds them, and from the pass before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import activations, arguments, ops
from ..activations import IDENTITY, Gate
from ..ops.tracing import traced, transformed
from .broadcast import Receiver
from .layers import CutLayer
from .nodes import GateNode, InputGradient, SegmentNode, samples_as_rows
from .root import exporting, names_in
from .stages import (
    Segment,
    Stage,
    autocast_dtype,
    compute,
    in_dtype_of_autocast,
    pays,
    saved_tensor_hooks_active,
)
from .tape import LayerRule, Run, Tape, refuse_in_function, state

_NO_GATE = Gate(IDENTITY)


def ahead(layer: CutLayer, x: Tensor) -> Tensor | None:
    """Returns the output of a layer that was computed ahead from x; else None."""
    tape = state.tape
    if tape is None or not tape.made or tape.tapped is not None:
        return None
    return tape.take(layer, x) if torch.is_grad_enabled() else None


def gate_of(layer: CutLayer) -> Gate | None:
    """Returns the gate of a layer's activation, where the kernels run it: not on a tape of torch's
    own functions, nor where these are transformed, nor in an exported program, which is to run
    where there is no fastdfa."""
    if transformed() or (state.tape is not None and not state.tape.gates):
        return None
    if torch.compiler.is_compiling() and exporting():
        return None
    return activations.gate_of(layer.activation)


def activated(layer: CutLayer, x: Tensor, gate: Gate) -> Tensor:
    """Returns f(x W^T + b) of a fully connected layer, and computes what follows it ahead."""
    lowered = autocast_dtype(x)
    if lowered is None and x.dtype != layer.weight.dtype:  # which torch refuses
        activation: Any = layer.activation
        refused: Tensor = activation(F.linear(x, layer.weight, layer.bias))
        return refused
    tape = _writable_tape()
    stages = [Stage(layer, None, gate)]
    if tape is not None and tape.looks_ahead and not x.requires_grad:
        stages += _following(layer, gate, x, tape)
    weights: list[Tensor] = [stage.layer.weight for stage in stages]
    biases = [stage.layer.bias for stage in stages]
    x, weights = in_dtype_of_autocast(x, weights)
    needs = x.requires_grad or any(p is not None and p.requires_grad for p in (*weights, *biases))
    if not (needs and torch.is_grad_enabled()) or (tape is not None and not tape.saves):
        return _without_graph(stages, x, weights, biases, tape if needs else None)
    segment = Segment(tuple(stages), False, (True,) * (len(stages) - 1))
    if tape is None:
        output: Tensor = SegmentNode.apply(segment, None, None, x, *weights, *biases)
        return output
    receiver = Receiver()
    outputs: list[Tensor]
    *outputs, token = SegmentNode.apply(segment, receiver, None, x, *weights, *biases)
    versions = [stage.layer.weight._version for stage in stages]
    layers, gates = [stage.layer for stage in stages], [stage.gate for stage in stages]
    tape.add(Run(layers, gates, outputs, token, receiver, True, lowered, versions))
    return outputs[0]


def _writable_tape() -> Tape | None:
    """Returns the tape, unless what it holds would escape saved-tensor hooks, as those of
    activation checkpointing and offloading."""
    tape = state.tape
    if traced() or not torch.is_grad_enabled():
        return None
    if tape is None or tape.tapped is not None:
        return None
    return None if saved_tensor_hooks_active() and tape.saves else tape


def _without_graph(
    stages: list[Stage],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    tape: Tape | None,
) -> Tensor:
    with torch.no_grad():
        (h,) = compute(stages, x, weights, biases).outputs
        h = h.view(*x.shape[:-1], h.shape[1])
    return h if tape is None or tape.saves else tape.unsaved(h)


def _following(first: CutLayer, gate: Gate, x: Tensor, tape: Tape) -> list[Stage]:
    """Returns the layers that most likely read the output of `first`, each that of the other."""
    stages: list[Stage] = []
    if ready(first) is None or not gate.from_output:
        return stages
    seen, width, memory = {first}, first.out_features, (x.dtype, x.device)
    layer = tape.root.after(first)
    while isinstance(layer, CutLayer) and layer not in seen and tape.chosen(layer):
        following = ready(layer)
        if following is None or not following.from_output:
            break
        weight = layer.weight
        if weight.shape[1] != width or (weight.dtype, weight.device) != memory:
            break
        stages.append(Stage(layer, None, following))
        seen.add(layer)
        width, layer = weight.shape[0], tape.root.after(layer)
    return stages


def ready(layer: nn.Module) -> Gate | None:
    """Returns the gate of a layer that may be computed without its call, else None.

    It may where nothing waits for its call or stands in its place, and its parameters are plain
    ones that learn; and without an activation only where another module is its activation.
    """
    if not isinstance(layer, CutLayer) or not layer.in_segments:
        return None
    if activations.hooked(layer) or not learns(layer):
        return None
    return activations.gate_of(layer.__dict__["_modules"].get("activation"))


def learns(layer: nn.Module) -> bool:
    """Returns whether weight and bias are plain parameters that require grad."""
    parameters = layer.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) is not nn.Parameter or not weight.requires_grad:
        return False
    return bias is None or (type(bias) is nn.Parameter and bias.requires_grad)


def linear(layer: CutLayer, x: Tensor) -> Tensor:
    """Returns x W^T + b, on a tape by our own product, where that pays.

    Under saved-tensor hooks by a node of ours in any case, as torch's saves other tensors where
    its input is cut.
    """
    weight, bias = layer.weight, layer.bias
    if traced():
        check_input(layer, x, weight)
        return F.linear(x, weight, bias)
    hooks = saved_tensor_hooks_active()
    on_tape = state.tape is not None and state.tape.gates
    if not (hooks or on_tape):
        return F.linear(x, weight, bias)
    low, cast = x, weight
    if autocast_dtype(x) is not None:
        low, (cast,) = in_dtype_of_autocast(x, [weight])
    elif x.dtype != weight.dtype:  # which torch refuses in its own words
        return F.linear(x, weight, bias)
    if hooks or low.dtype != cast.dtype or pays(low, cast):
        segment = Segment((Stage(layer, None, _NO_GATE),), False, ())
        output: Tensor = SegmentNode.apply(segment, None, None, low, cast, bias)
        return output
    return F.linear(x, weight, bias)


def check_input(layer: CutLayer, x: Any, weight: Tensor) -> None:
    """Raises where x is nothing that a layer of this weight can read.

    Called where torch or an op has refused it, so that what runs is never checked twice; and where
    a step is traced, as nothing can be caught there.

    Raises:
        TypeError: where it is no tensor.
        RuntimeError: where its shape, dtype or device does not fit, as torch's own layers raise.
    """
    if not isinstance(x, Tensor):
        raise arguments.wrong_type(f"the input of {_name(layer)}", "a tensor", x)
    if not layer.reads(x.shape, weight):
        raise RuntimeError(
            f"the input of {_name(layer)} must have shape {layer.input_shape(weight)}, got "
            f"{tuple(x.shape)}"
        )
    if x.device != weight.device or (x.dtype != weight.dtype and autocast_dtype(x) is None):
        raise RuntimeError(
            f"the input of {_name(layer)} must be {weight.dtype} on {weight.device} as its weight "
            f"is, got {x.dtype} on {x.device}"
        )


def _name(layer: CutLayer) -> str:
    """Returns the name of a layer in the root that runs, else what it is."""
    root: Any = state.layer_rule if state.tape is None else state.tape.root
    name = None if root is None else names_in(root.module).get(layer)
    return " ".join(repr(layer).split()) if name is None else f"layer {name!r}"


def gated(layer: CutLayer, a: Tensor, gate: Gate) -> Tensor:
    """Returns f(a) of samples [N, C, *S] that the layer has made by torch's own product.

    The activation works in the memory of a, which no torch function that makes it saves. In a
    traced step too: a CNN of two 5x5 convolutions gained 1.13x there, by inductor's own 0.95x.
    """
    tape = _writable_tape()
    with torch.no_grad():
        h, saved = a.detach(), None  # what the gate reads, where that is not h
        if gate.from_output:
            if not h.is_contiguous():
                lies = h.movedim(1, -1)
                h = (lies if lies.is_contiguous() else lies.contiguous()).movedim(-1, 1)
            ops.activate_(samples_as_rows(h, h), None, *gate)
        else:
            h, saved = activations.apply(h, *gate), h
    if not (a.requires_grad and torch.is_grad_enabled()):
        return h
    if tape is None:
        output: Tensor = GateNode.apply(a, h, saved, gate, None)
        return output
    if not tape.saves:
        return tape.unsaved(h)
    receiver = Receiver()
    output, token = GateNode.apply(a, h, saved, gate, receiver)
    tape.add(Run([layer], [gate], [output], token, receiver, False))
    return output


def with_input_gradient(
    layer: CutLayer,
    y: Tensor,
    x: Tensor,
    rule: LayerRule,
    input_gradient: Callable[[Tensor, torch.Size, Tensor], Tensor],
) -> Tensor:
    """Returns y, what a layer has made of its detached input x; the gradient of that, where it
    needs one, is made with the rule's matrix in the place of the weight."""
    if not torch.is_grad_enabled():
        if not torch.compiler.is_compiling():
            refuse_in_function(layer)
        return y
    if not x.requires_grad:
        return y
    backward_weight = rule.backward_weight(layer)
    output: Tensor = InputGradient.apply(y, x, layer.weight, backward_weight, input_gradient)
    return output
