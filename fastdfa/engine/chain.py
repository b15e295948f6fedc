"""Runs of fused layers in an `nn.Sequential`, computed at once ahead of their calls.

The first layer of a run computes all of them, by one op and behind one autograd node; each of the
others finds its output ready, if it is called with the output of the layer before, as it was. If
not, it computes on its own: what was computed ahead is at worst wasted, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from .. import ops
from ..activations import Gate, gate_of, hooked
from . import plan
from .broadcast import Group, products
from .fused import (
    LinearMap,
    as_matrix,
    in_dtype,
    in_dtype_of_autocast,
    map_of,
    saved_tensor_hooks_active,
)
from .tape import Chain, Edge, state


def computed(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output of a layer that was computed ahead, for the input x that it was computed from."""
    if torch.compiler.is_compiling():
        return None
    tape = state.tape
    if tape is None or tape.chain is None or tape.tapped is not None:
        return None
    return tape.chain.take(layer, x) if torch.is_grad_enabled() else None


def begin(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output of the first layer of a run, all of which is computed; else None."""
    if torch.compiler.is_compiling():
        return None
    tape = state.tape
    if tape is None or tape.tapped is not None or not torch.is_grad_enabled():
        return None
    if not tape.looks_ahead or x.requires_grad or saved_tensor_hooks_active():
        return None
    layers, gates = _run(layer, x, *tape.root.place(layer))
    if len(layers) < 2:
        return None
    chain = tape.chain = tape.newest = _compute(layers, gates, x)
    chain.previous, tape.points = tape.points, chain
    return chain.outputs[0]


def _run(
    first: nn.Module, x: Tensor, sequential: nn.Sequential | None, place: int
) -> tuple[list[nn.Module], list[Gate]]:
    """The layers from `first` on whose output goes straight into another, and their gates.

    An `nn.Identity` between them, as `convert` leaves for an activation, passes it on as it is.
    """
    modules = [] if sequential is None else list(sequential._modules.values())
    if place >= len(modules) or modules[place] is not first:
        return [], []
    kind, memory, width = type(first), (x.dtype, x.device), x.shape[-1]
    layers, gates = [], []
    modules = [module for module in modules[place:] if type(module) is not nn.Identity]
    for layer, reader in pairwise(modules):
        if type(layer) is not kind or type(reader) is not kind:
            break
        weight, gate = ready(layer)
        if gate is None or (weight.dtype, weight.device) != memory or weight.shape[1] != width:
            break
        width = weight.shape[0]
        layers.append(layer)
        gates.append(gate)
    return layers, gates


def ready(layer: nn.Module) -> tuple[Tensor | None, Gate | None]:
    """Weight and gate of a layer that may be computed without its call; None where it may not, or
    where it has no gate."""
    if hooked(layer):
        return None, None
    of = layer.__dict__
    weight, bias = of["_parameters"].get("weight"), of["_parameters"].get("bias")
    if type(weight) is not nn.Parameter or not weight.requires_grad:
        return None, None
    if bias is not None and (type(bias) is not nn.Parameter or not bias.requires_grad):
        return None, None
    gate = gate_of(of["_modules"].get("activation"))
    return weight, gate if gate is not None and gate.from_output else None


def _compute(layers: list[nn.Module], gates: list[Gate], x: Tensor) -> Chain:
    weights = [layer._parameters["weight"] for layer in layers]
    biases = [layer._parameters.get("bias") for layer in layers]
    x, weights = in_dtype_of_autocast(x, weights)
    with torch.no_grad():
        kinds, params = zip(*gates, strict=True)
        saved = ops.linear_chain(as_matrix(x), weights, biases, kinds, params)
        if x.dim() != 2:
            saved = [h.view(*x.shape[:-1], h.shape[1]) for h in saved]
    affine = map_of(x, weights[0])
    chain = Chain(layers, gates, [x, *saved[:-1]], weights, biases, saved, affine)
    results = _ActivatedChain.apply(x, saved, gates, affine, chain.fed, *weights, *biases)
    *chain.outputs, chain.token = results
    return chain


# What the projections e B of a chain are made from: what is fed, the dense matrices, and e [M, C].
Projection = tuple[Group, list[Tensor], Tensor]


# Takes the deltas of layers, from a number on, and their sums, and puts in the place of those that
# are behind a norm what comes out in front of it.
Through = Callable[[int, list[Tensor | None], list[Tensor | None]], None]


def gradients(
    projection: Projection | None,
    gates: Sequence[Gate],
    affine: LinearMap,
    x: Tensor,
    hidden: list[Tensor],
    grads: Sequence[Tensor | None],
    gating: list[Tensor] | None = None,
    through: Through | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The weight gradients of a chain, and the sums of its deltas over rows.

    Args:
        projection: of its first layers, which are fed.
        affine: of all layers.
        gates, grads: of each layer, where its output may receive a gradient besides.
        x, hidden: its input and the outputs of its layers. `hidden` is emptied from the top, as
            layers are done, so that their memory is free for the gradients.
        gating: what the gates read, where that is not the outputs; emptied as these.
        through: takes deltas through the norms behind their layers, where there are any.
    """
    weights: list[Tensor | None] = []
    sums: list[Tensor | None] = []
    x = as_matrix(x)
    while hidden:
        classes = 0 if projection is None else projection[2].shape[1]
        first = plan.first_of_group(hidden, classes)
        saved = [as_matrix(h) for h in hidden[first:]]
        inputs = [as_matrix(hidden[first - 1]) if first else x, *saved[:-1]]
        del hidden[first:]
        if gating is not None:
            saved = [as_matrix(h) for h in gating[first:]]
            del gating[first:]
        group = slice(first, first + len(saved))
        deltas, totals = _deltas(projection, gates[group], saved, grads[group], first)
        if through is not None:
            through(first, deltas, totals)
        made: list[Tensor | None] = [None] * len(saved)
        trained = [i for i, d in enumerate(deltas) if d is not None]
        columns = ([values[i] for i in trained] for values in (deltas, saved, inputs))
        for i, grad in zip(trained, affine.weight_gradients(*columns), strict=True):
            made[i] = grad
        weights, sums = made + weights, totals + sums
    return weights, sums


def _deltas(
    projection: Projection | None,
    gates: Sequence[Gate],
    saved: list[Tensor],
    grads: Sequence[Tensor | None],
    first: int,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The deltas of some layers of a chain, from number `first` on, and their sums over rows."""
    deltas: list[Tensor | None] = []
    sums: list[Tensor | None] = []
    if projection is not None:
        group, dense, error = projection
        targets = group.fused[first : first + len(saved)]
        dense = dense[first : first + len(targets)] if len(dense) > 1 else dense
        if targets:
            deltas, sums = products(group, error, dense, targets, saved[: len(targets)])
    for _ in range(len(saved) - len(deltas)):
        deltas.append(None), sums.append(None)
    for i, grad in enumerate(grads):
        if grad is not None:
            delta, total = ops.gate(as_matrix(grad), saved[i], *gates[i])
            deltas[i] = delta if deltas[i] is None else deltas[i] + delta
            sums[i] = total if sums[i] is None else sums[i] + total
    return deltas, sums


class _ActivatedChain(torch.autograd.Function):
    """The outputs of a chain as one node: views, as of a single layer; and a token.

    Behind it the weights, then the biases. Output l depends on those of layer l alone, as every
    layer's input is cut. A gradient of the token announces that those which are read are fed; a
    gradient of an output, that it is used elsewhere.
    """

    @staticmethod
    def forward(ctx, x, saved, gates, affine, fed, *parameters):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *saved)
        ctx.gates, ctx.affine, ctx.fed = gates, affine, fed
        ctx.bias_dtypes = [None if b is None else b.dtype for b in parameters[len(saved) :]]
        return *[h.view_as(h) for h in saved], x.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *hidden = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        *grads, announced = grads
        projection = None if announced is None else ctx.fed[0].projection
        weights, sums = gradients(projection, ctx.gates, ctx.affine, x, hidden, grads)
        biases = [
            None if total is None or dtype is None else in_dtype(total, dtype)
            for total, dtype in zip(sums, ctx.bias_dtypes, strict=True)
        ]
        return None, None, None, None, None, *weights, *biases

    def functions_of(self, output: int) -> tuple[Edge, ...]:
        """The edges behind one output: its weight, and its bias where it has one."""
        biases = [dtype is not None for dtype in self.bias_dtypes]
        edges = self.next_functions[-len(biases) - sum(biases) :]  # None is no edge
        bias = len(biases) + sum(biases[:output])
        return edges[output], *edges[bias : bias + biases[output]]


def separate(edge: Edge) -> Node | Edge:
    """What stands for an edge where paths are compared: the node, of a chain one of its layers."""
    return edge if isinstance(edge[0], _ActivatedChain._backward_cls) else edge[0]


def functions_behind(edge: Edge) -> tuple[Edge, ...]:
    """The edges that lead on from an edge."""
    node, output = edge
    if isinstance(node, _ActivatedChain._backward_cls):
        return _ActivatedChain.functions_of(node, output)
    return node.next_functions
