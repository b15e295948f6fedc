"""Computes a segment, forward and backward, without a graph.

A segment is a run of stages: a layer, a norm of what it makes, if any, and the activation. Where
the input of a stage is cut, the stage below learns from its own feedback; where it is not, from the
gradient of that input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import activations, ops
from ..activations import FIRST_KIND_FROM_INPUT, IDENTITY, Gate
from ..ops import products
from ..ops.reference import accumulation_dtype
from ..ops.typed import constant
from . import norms
from .broadcast import Receiver, as_matrix
from .layers import CutLayer

# The deltas of one group of stages exist at a time: of one stage, or of as many as fit in this. At
# its peak backprop holds two gradients of a layer's size. And deltas this small are still in the
# cache for the weight gradients; on CUDA in the L2 cache, 40 MB on an A100 and 50 MB on an H100
# (predicted).
WORKSPACE_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
# The same where there are few classes: with 4 MiB a step of 8x512, batch 256, peaked at 17.3 MiB on
# the CPU, backprop's at 9.1.
FEW_CLASSES_BYTES = {"cpu": 2**20, "cuda": 32 * 2**20}
# From so many classes on, a product e B that several stages share is worth the memory.
_MANY_CLASSES = 64

# Multiplications of a product from which ours save more time than the node in Python takes: on one
# Zen 4 core 2^24, on two 2^24 to 2^25 (float32, four layers with batch norm between them).
_PAYING = 2**24


class Stage(NamedTuple):
    """Holds a fully connected layer, a norm of what it makes, if any, and the activation."""

    layer: CutLayer
    norm: norms.Module | None
    gate: Gate


class Segment:
    """Holds stages that are computed at once, behind one node.

    Attributes:
        stages: from the input up.
        head: whether a layer without norm and activation ends it, at whose output the error is.
        cuts: whether the network is cut at the input of each stage but the first, and of the head.
        layers: how many there are, the head among them.
        gates, widths: of each stage, and n_l.
        normed: whether any stage has a norm.
        read: how many outputs layers behind the same node read: all, or all but the last.
        gates_apart: the stages whose gate reads something else than a layer does that follows.
        weights_kept: the layers whose weight makes the gradient of an input. A single layer keeps
            it in any case: activation checkpointing, which runs it again outside of every root,
            demands that it saves the same tensors.
    """

    __slots__ = (
        "cuts", "gates", "gates_apart", "head", "layers", "normed", "read", "stages",
        "weights_kept", "widths",
    )  # fmt: skip

    def __init__(self, stages: Sequence[Stage], head: bool, cuts: Sequence[bool]) -> None:
        self.stages, self.head, self.cuts = stages, head, cuts
        self.layers = len(stages) + head
        self.gates = [stage.gate for stage in stages]
        self.widths = [stage.layer.out_features for stage in stages]
        self.normed = any([stage.norm is not None for stage in stages])
        self.read = len(stages) - (not head)
        self.gates_apart = [
            i
            for i, gate in enumerate(self.gates)
            if gate.kind and not (i < self.read and gate.kind < FIRST_KIND_FROM_INPUT)
        ]
        self.weights_kept = [0] if self.layers == 1 else []
        self.weights_kept += [i + 1 for i, cut in enumerate(cuts) if not cut]


class Passed(NamedTuple):
    """Holds what a forward pass leaves of the stages, from the input up."""

    outputs: list[Tensor]  # h [M, n], which the next stage reads
    gating: list[Tensor]  # what the gate reads: h, or the activation's input
    normed: dict[int, tuple[norms.Norm, norms.Kept]]  # by the numbers of the stages


def compute(
    stages: Sequence[Stage], x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Passed:
    """Returns the outputs of all stages, for an input [*rows, n_0]."""
    outputs: list[Tensor] = []
    passed, h = Passed(outputs, [], {}), x
    while len(outputs) < len(stages):
        first = last = len(outputs)
        while last < len(stages) and _in_chain(stages[last], alone=len(stages) == 1):
            last += 1
        if last > first:
            run = slice(first, last)
            gates = [stage.gate for stage in stages[run]]
            kinds, params = [gate.kind for gate in gates], [gate.param for gate in gates]
            outputs += ops.linear_chain(as_matrix(h), weights[run], biases[run], kinds, params)
            passed.gating.extend(outputs[run])
        else:
            _, norm, gate = stages[first]
            a = as_matrix(plain_linear(h, weights[first], biases[first]))
            if norm is not None:
                a, how, kept = norms.forward(norm, a, gate)
                passed.normed[first] = how, kept
            elif gate.from_output and gate.kind != IDENTITY:
                ops.activate_(a, None, *gate)
            passed.gating.append(a)
            outputs.append(a if gate.from_output else activations.apply(a, *gate))
        h = outputs[-1]
    return passed


def _in_chain(stage: Stage, alone: bool) -> bool:
    """Returns whether the kernel of a chain computes a stage; of one without an activation only
    among others, as a single product may be torch's."""
    return stage.norm is None and stage.gate.from_output and (stage.gate.kind > 0 or not alone)


class Saved(NamedTuple):
    """Holds what the backward of a segment reads. Lists are emptied from the top, as stages are
    done, so that their memory is free for the gradients."""

    x: Tensor  # [M, n_0]
    hidden: list[Tensor]  # the outputs [M, n_l] that a layer reads
    gating: list[Tensor | None]  # what the gates read; None of the identity
    normed: dict[int, tuple[norms.Norm, norms.Kept]]
    weights: dict[int, Tensor]  # of the layers whose input has a gradient, by their numbers


class Gradients(NamedTuple):
    """Holds what the backward of a segment makes, by the numbers of its layers."""

    x: Tensor | None  # [M, n_0]
    weights: list[Tensor | None]  # [n_l, n_{l-1}]
    sums: list[Any]  # of the deltas over rows [n_l], the gradients of biases
    norms: list[Tensor]  # of the norms' trained parameters, from the input up


class Backward:
    """Runs the backward of a segment: deltas from the top down, and their gradients in groups.

    Args:
        segment, saved: of the forward pass.
        receiver: of the feedback of the stages' outputs; None where none was announced.
        wide: whether weights and their gradients are in the accumulation dtype.
        trained: which layers need the gradient of their weight or bias.
    """

    def __init__(
        self,
        segment: Segment,
        saved: Saved,
        receiver: Receiver | None,
        wide: bool,
        trained: Sequence[bool],
    ) -> None:
        self.segment, self.saved, self.receiver = segment, saved, receiver
        self.wide, self.trained = wide, trained
        self.columns = 0 if receiver is None else _columns(receiver)
        self.weights: list[Tensor | None] = [None] * segment.layers
        self.sums: list[Any] = [None] * segment.layers
        self.norm_gradients: list[Tensor] = []
        self.above: Tensor | None = None  # the delta of the layer above

    def run(self, error: Tensor | None, grads: Sequence[Tensor | None], needs_x: bool) -> Gradients:
        """Returns all gradients.

        Args:
            error: e [M, C] at the output of the head, where there is one.
            grads: of each stage's output, where that is used elsewhere, [*rows, n_l].
            needs_x: whether the input needs a gradient.
        """
        if error is None and self.receiver is None and len(grads) == 1:
            return self._of_one(grads[0], needs_x)
        if error is not None:
            self.above = error
            self._head_gradients(error)
        # Every delta of a stage without a norm that is cut off from all others is its feedback's.
        fed_alone = not self.segment.normed and all(self.segment.cuts) and not any_of(grads)
        last = len(self.segment.stages)
        while last > 0:
            first = self._first_of_group(last)
            if fed_alone:
                self._fed_group(first, last)
            else:
                self._group(first, last, grads)
            del self.saved.hidden[first:], self.saved.gating[first:]
            last = first
        x_grad = None
        if self.above is not None and needs_x:
            x_grad = self.above @ in_dtype(self.saved.weights[0], self.above.dtype)
        return Gradients(x_grad, self.weights, self.sums, self.norm_gradients)

    def _of_one(self, grad: Tensor | None, needs_x: bool) -> Gradients:
        """Returns the gradients of a layer alone, from that of its output."""
        if grad is None:
            return Gradients(None, self.weights, self.sums, [])
        delta, total = _gated(as_matrix(grad), self.segment.gates[0], self._gate_reads(0))
        weight = x_grad = None
        if self.trained[0]:
            (weight,) = ops.weight_gradients([delta], [self.saved.x], self.wide)
        if needs_x:
            x_grad = delta @ in_dtype(self.saved.weights[0], delta.dtype)
        return Gradients(x_grad, [weight], [total], [])

    def _head_gradients(self, error: Tensor) -> None:
        """Makes those of the head, by the product that its node has where it is called alone."""
        head, read = self.segment.layers - 1, self.saved.hidden[-1]
        self.sums[head] = _sums(error) if self.wide else error.sum(0)
        if self.wide or _large(read, error.shape[1]):
            self._weight_gradients([head], [error])
        elif self.trained[head]:
            self.weights[head] = error.t() @ read

    def _fed_group(self, first: int, last: int) -> None:
        """Makes the gradients of the stages from `first` to before `last` from their feedback."""
        numbers = [] if self.receiver is None else self.receiver.numbers_of(first, last)
        fed = [first + i for i, number in enumerate(numbers) if number is not None]
        self.above = None
        if not fed:
            return
        deltas, sums = self._deltas(fed)
        for i, total in zip(fed, sums, strict=True):
            self.sums[i] = total
        self.above = deltas[0] if fed[0] == 0 else None
        self._weight_gradients(fed, deltas)

    def _group(self, first: int, last: int, grads: Sequence[Tensor | None]) -> None:
        """Makes the gradients of the stages from `first` to before `last`, one after the other."""
        numbers = [] if self.receiver is None else self.receiver.numbers_of(first, last)
        fed = [first + i for i, number in enumerate(numbers) if number is not None]
        made = dict(zip(fed, zip(*self._deltas(fed), strict=True), strict=True)) if fed else {}
        deltas: list[Tensor | None] = [None] * (last - first)
        for i in reversed(range(first, last)):
            delta = deltas[i - first] = self._delta(i, made.pop(i, None), grads[i])
            # Below a cut nothing reads it, and it would live through the next group.
            self.above = None if i and self.segment.cuts[i - 1] else delta
        layers = [i for i in range(first, last) if deltas[i - first] is not None]
        self._weight_gradients(layers, [delta for delta in deltas if delta is not None])

    def _deltas(self, fed: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns delta and its sums of stages that have feedback, by one call."""
        receiver: Any = self.receiver
        numbers, gates = receiver.numbers, self.segment.gates
        deltas: tuple[list[Tensor], list[Tensor]] = receiver.broadcast.deltas(
            [numbers[i] for i in fed],
            [self._gate_reads(i) for i in fed],
            [gates[i] for i in fed],
        )
        return deltas

    def _delta(
        self, i: int, fed: tuple[Tensor, Tensor] | None, grad: Tensor | None
    ) -> Tensor | None:
        """Returns the delta of a stage: of its feedback, of the layer above, and of a gradient."""
        _, norm, gate = self.segment.stages[i]
        parts = [] if fed is None else [fed]
        if self.above is not None and i < len(self.segment.cuts) and not self.segment.cuts[i]:
            (delta,), (total,) = ops.backpropagate(
                self.above,
                [self.saved.weights[i + 1]],
                [self._gate_reads(i)],
                [gate.kind],
                [gate.param],
            )
            parts.append((delta, total))
        if grad is not None:
            parts.append(_gated(as_matrix(grad), gate, self._gate_reads(i)))
        if not parts:
            return None
        delta, self.sums[i] = parts[0]
        for other, total in parts[1:]:
            delta, self.sums[i] = delta + other, self.sums[i] + total
        if norm is not None:
            # Overwrites the delta: it is made here, as only a network has norms in its stages, and
            # the outputs of a network's stages have no gradients from elsewhere.
            how, kept = self.saved.normed.pop(i)
            self.sums[i], made = norms.backward_(how, delta, self.sums[i], kept)
            self.norm_gradients[:0] = made
        return delta

    def _gate_reads(self, i: int) -> Tensor:
        read = self.saved.gating[i]
        if read is not None:
            return read
        # The identity reads nothing: an expanded scalar gives shape and dtype.
        rows, columns = self.saved.x.shape[0], self.segment.widths[i]
        return self.saved.x.new_empty(()).expand(rows, columns)

    def _weight_gradients(self, layers: Sequence[int], deltas: Sequence[Tensor]) -> None:
        """Makes those of some layers as one list, as none depends on another's."""
        pairs = [(i, d) for i, d in zip(layers, deltas, strict=True) if self.trained[i]]
        if not pairs:
            return
        inputs = [self.saved.hidden[i - 1] if i else self.saved.x for i, _ in pairs]
        made = ops.weight_gradients([delta for _, delta in pairs], inputs, self.wide)
        for (i, _), grad in zip(pairs, made, strict=True):
            self.weights[i] = grad

    def _first_of_group(self, last: int) -> int:
        """Returns the first of the stages to go with the one before `last`."""
        x, widths = self.saved.x, self.segment.widths
        sizes = WORKSPACE_BYTES if self.columns >= _MANY_CLASSES else FEW_CLASSES_BYTES
        room = sizes.get(x.device.type, sizes["cpu"]) // max(x.shape[0] * x.itemsize, 1)
        first = last - 1
        room -= widths[first]
        while first > 0 and widths[first - 1] <= room:
            first -= 1
            room -= widths[first]
        return first


def any_of(grads: Sequence[Tensor | None]) -> bool:
    """Returns whether there is any gradient."""
    return any(grad is not None for grad in grads)


def _gated(grad: Tensor, gate: Gate, reads: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the delta of a gradient and its sums over rows; no copy of it without a gate."""
    return ops.gate(grad, reads, *gate) if gate.kind else (grad, _sums(grad))


def _sums(delta: Tensor) -> Tensor:
    return delta.sum(0, dtype=accumulation_dtype(delta.dtype))


def workspace(device: torch.device) -> int:
    """Returns the bytes that the deltas of a group of stages may take."""
    return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"])


def _columns(receiver: Receiver) -> int:
    sent = receiver.broadcast.sent
    return sent.shape[1] if isinstance(sent, Tensor) else 0


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x W^T + b without a graph, by the product that takes less time."""
    if pays(x, weight):
        leading = x.shape[:-1]
        (out,) = ops.linear_chain(as_matrix(x), [weight], [bias], [IDENTITY], [0.0])
        return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, [*leading, out.shape[1]])
    bias = None if bias is None else in_dtype(bias, x.dtype)
    return F.linear(x, in_dtype(weight, x.dtype), bias)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Returns whether our own product of x and a weight saves more time than its node takes."""
    if not _large(x, weight.size(0)):
        return False
    return products.multiplies(x, wide=x.dtype != weight.dtype)


def _large(x: Tensor, outputs: int) -> bool:
    return x.numel() * outputs >= _PAYING


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x in a dtype; `to` would take 1 us to return x itself."""
    return x if x.dtype == dtype else x.to(dtype)


def saved_tensor_hooks_active() -> bool:
    """Returns whether an activation checkpoint or offloading sees what a node saves."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast casts the arguments of `F.linear`, where it does."""
    if not torch._C._is_any_autocast_enabled():  # a tenth of what it takes to ask for a device
        return None
    kind = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@constant  # the Dynamo of PyTorch 2.11 cannot trace it
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def in_dtype_of_autocast(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Returns input and weights as autocast would cast them for `F.linear`.

    But weights that the kernels round as they read them stay as they are.
    """
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, list(weights)
    x = x.to(dtype)
    may_be_wide = all(weight.dtype == torch.float32 for weight in weights)
    if may_be_wide and products.multiplies(x, wide=True):
        return x, list(weights)
    return x, [weight.to(dtype) for weight in weights]
