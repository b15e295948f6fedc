"""Broadcasts the error: from e [M, C], at the output, to the feedback of every point.

The root begins it in each backward pass; then every node that has been announced a feedback asks
here for its own, when autograd comes to it. So a delta lives no longer than its node needs it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .. import ops, signals
from ..activations import IDENTITY, Gate
from ..projectors import Projected, Projector
from ..signals import Signal

# Up to here a projection is made as fast as memory takes it, and anew for each token that receives
# it; one that is kept for the next adds to the peak of a step (16.2 MiB against backprop's 13.5 at
# a GCN of four layers, 2708 x 256). A small one is kept all the same: it lies in the cache.
FEW_CLASSES = 16
SMALL_BYTES = 2**20


def as_matrix(x: Tensor) -> Tensor:
    """Returns [*rows, n] as [M, n]."""
    if x.dim() == 2:  # flatten would take 2 us to return x itself
        return x
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


_NO_GATE = Gate(IDENTITY)


class Product(NamedTuple):
    """Describes the product to make for a point: scale (e B), times f' where `gate` is fused into
    it."""

    gate: Gate | None
    scale: float
    stream: int
    features: int
    order: tuple[int, ...]  # sizes (C, *S) of a point that lies as [*S, C] in memory
    dtype: torch.dtype
    device: torch.device

    def shaped(self, product: Tensor, shape: torch.Size) -> Tensor:
        """Returns the matrix as a tensor of the point's shape, and in its memory format."""
        return shaped(product, shape, self.order)


def shaped(product: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """Returns a matrix as a tensor of a point's shape; see `Product.order`."""
    if not order:
        return product.view(shape)
    channels, *positions = order
    return product.view(-1, *positions, channels).movedim(-1, 1)


class Drawn(NamedTuple):
    """Says how B is generated where it is not kept, and how the error is reduced."""

    seed: int
    distribution: str
    shared: bool
    sum_error: bool
    projected: bool  # whether what is sent is projected already, by a projector


class Sender(NamedTuple):
    """Makes what is projected in place of an error: a signal of it, times Q where B = Q P; or what
    a projector makes of that."""

    signal: Signal
    low: Tensor | None  # Q [columns of the signal, rank]
    target: Tensor | None  # [M, C]
    projector: Projector | None
    widest: int  # features of a point

    def of(self, error: Tensor, output: Tensor | None) -> Tensor | Projected:
        """Returns [M, columns], maybe as a future, of an error and an output, [*rows, C]."""
        output = None if output is None else as_matrix(output)
        made = signals.made(self.signal, as_matrix(error), output, self.target)
        if self.low is None and self.projector is None:
            return made
        made = made.to(torch.promote_types(made.dtype, torch.float32))
        made = made if self.low is None else made @ self.low.to(made.dtype)
        if self.projector is None:
            return made
        return Projected(self.projector, made.detach(), self.widest)

    def checked(self, output: Tensor) -> Sender:
        """Returns the same with the target as the rows that belong to this output.

        Raises:
            RuntimeError, TypeError, ValueError: where there is none, or it does not fit.
        """
        if not self.signal.needs_target and self.target is None:
            return self
        reader = f"the signal {type(self.signal).__name__}"
        return self._replace(target=signals.given(self.target, output, reader))


class Alike(NamedTuple):
    """Says which products agree, but for their gates."""

    first: list[int]  # of every product the first that it agrees with
    counts: list[int]  # of these, how many tokens receive it

    @classmethod
    def of(cls, products: Sequence[Product]) -> Alike:
        """Returns which of these products agree."""
        seen: dict[Product, int] = {}
        first, counts = [], [0] * len(products)
        for number, product in enumerate(products):
            first.append(seen.setdefault(product._replace(gate=None), number))
            counts[first[-1]] += product.gate is None
        return cls(first, counts)


class Call(NamedTuple):
    """Holds the products of one call of `project_gate`: its arguments beside the error and what the
    gates read."""

    products: Sequence[Product]
    gated: bool  # whether every gate is fused
    matrices: list[Tensor]
    kinds: list[int]
    params: list[float]
    scales: list[float]
    streams: list[int]
    allow_tf32: bool

    @classmethod
    def of(cls, drawn: Drawn, products: Sequence[Product], dense: Sequence[Tensor | None]) -> Call:
        """Returns the call for products, of which each has its B, or None where one is generated.

        One matrix where all have the same; none where one is generated, as all are then.
        """
        gates = [product.gate or _NO_GATE for product in products]
        matrices = [matrix for matrix in dense if matrix is not None]
        if len(matrices) < len(products):
            matrices = []
        elif all(matrix is matrices[0] for matrix in matrices):
            matrices = matrices[:1]
        return cls(
            products,
            all(product.gate is not None for product in products),
            matrices,
            [gate.kind for gate in gates],
            [gate.param for gate in gates],
            [product.scale for product in products],
            [product.stream for product in (products[:1] if drawn.shared else products)],
            ops.allow_tf32(products[0].device, products[0].dtype),
        )


class Broadcast:
    """Makes the feedback of the points of one forward pass, in each backward pass through it.

    Args:
        drawn: how B is generated, and the error reduced.
        products: of every point by its number.
        dense: the B of every point by its number; None where it is generated, or a projector's.
        alike: which products agree; None where none is shared.
        calls: by the numbers of points, the calls that have been made for them: these are the same
            in every pass of one plan.

    Attributes:
        sent: what is projected, [M, columns], while a backward pass is under way.
        was_cut: tells whether the forward pass has cut the network where a layer reads a tensor;
            None where no layer can run again.
    """

    was_cut: Callable[[nn.Module, Tensor], bool] | None = None

    def __init__(
        self,
        drawn: Drawn,
        products: Sequence[Product],
        dense: Sequence[Tensor | None],
        alike: Alike | None,
        calls: dict[tuple[int, ...], Call],
    ) -> None:
        self.drawn, self.products, self.dense = drawn, products, dense
        self.alike, self._calls = alike, calls
        self.sent: Any = None  # a tensor or a `Projected`
        self.end()

    def begin(self, sent: Tensor | Projected) -> None:
        """Keeps what is projected until the end of the backward pass that runs."""
        self.send(sent)
        if self.was_cut is not None:
            under_way.add(self)
        Variable._execution_engine.queue_callback(self.end)

    def send(self, sent: Tensor | Projected) -> None:
        """Keeps what is projected until `end`."""
        self.sent = sent

    def end(self) -> None:
        """Lets go of all that belongs to a backward pass."""
        self.sent = None
        self._shared: dict[int, Tensor] | None = None  # made, and waited for by other points
        self._left: list[int] | None = None  # how many wait for each
        self._copies: dict[torch.device, Tensor] | None = None

    def deltas(
        self, numbers: Sequence[int], saved: Sequence[Tensor], gates: Sequence[Gate]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns delta_l [M, n_l] of points with these numbers, and its sum over rows [n_l].

        Args:
            saved: what the gates read, [M, n_l] each.
            gates: of the stages whose outputs the points are.
        """
        call = self._call(tuple(numbers))
        if call.gated:
            return make(self.drawn, self.sent_on(call.products[0].device), call, saved)
        pairs = [
            ops.gate(self.feedback(number).view(h.shape), h, *gate)
            for number, h, gate in zip(numbers, saved, gates, strict=True)
        ]
        return [delta for delta, _ in pairs], [sums for _, sums in pairs]

    def feedback(self, number: int) -> Tensor:
        """Returns s e B_l [M, n_l] of a point, without a gate; shared by points that agree, where
        it takes long to make."""
        product = self.products[number]
        sent = self.sent_on(product.device)
        size = sent.shape[0] * product.features * product.dtype.itemsize
        cheap = sent.shape[1] <= FEW_CLASSES and size > SMALL_BYTES
        if self.alike is None or cheap:
            return self._without_gate(number, sent)
        if self._left is None or self._shared is None:
            self._left, self._shared = list(self.alike.counts), {}
        first = self.alike.first[number]
        made = self._shared.pop(first, None)
        made = self._without_gate(number, sent) if made is None else made
        self._left[first] -= 1
        if self._left[first] > 0:
            self._shared[first] = made
        return made

    def _without_gate(self, number: int, sent: Tensor) -> Tensor:
        call = self._call((number,))
        if call.gated:
            call = call._replace(kinds=[IDENTITY])
        product = call.products[0]
        # The identity reads nothing: an expanded scalar gives shape and dtype.
        blank = sent.new_empty((), dtype=product.dtype).expand(sent.shape[0], product.features)
        (made,), _ = make(self.drawn, sent, call, [blank])
        return made

    def sent_on(self, device: torch.device) -> Tensor:
        """Returns what is projected, on a device; copied to each device once."""
        sent: Tensor | Projected = self.sent
        if not isinstance(sent, Tensor):
            sent = self.sent = sent.tensor()
        if sent.device == device:
            return sent
        if self._copies is None:
            self._copies = {}
        if device not in self._copies:
            self._copies[device] = sent.to(device)
        return self._copies[device]

    def _call(self, numbers: tuple[int, ...]) -> Call:
        call = self._calls.get(numbers)
        if call is None:
            products = [self.products[number] for number in numbers]
            call = Call.of(self.drawn, products, [self.dense[number] for number in numbers])
            self._calls[numbers] = call
        return call


class UnderWay(threading.local):
    """Knows, in each thread, the broadcasts of the latest backward pass: a checkpoint that runs
    layers again in it must cut where the forward pass did, as what follows a cut saves less."""

    task = -1  # torch's number of that backward pass
    broadcasts: tuple[ref[Broadcast], ...] = ()

    def add(self, broadcast: Broadcast) -> None:
        task = torch._C._current_graph_task_id()
        others = self.broadcasts if task == self.task else ()
        self.task, self.broadcasts = task, (*others, ref(broadcast))

    def cuts(self, layer: nn.Module, x: Tensor) -> bool:
        """Returns whether `layer` runs again in a backward pass of a network that was cut where it
        reads x."""
        if self.task == -1 or self.task != torch._C._current_graph_task_id():
            return False
        found = [broadcast() for broadcast in self.broadcasts]
        return any(b is not None and b.was_cut is not None and b.was_cut(layer, x) for b in found)


under_way = UnderWay()


class Receiver:
    """Tells a node, in backward, what makes the feedback of its points.

    Filled at the end of the forward pass, when the root knows all points.
    """

    __slots__ = ("broadcast", "numbers")

    def __init__(self) -> None:
        self.broadcast: Any = None  # a `Broadcast`, before any backward pass
        self.numbers: list[int | None] = []  # of the points, by the places of a run's outputs

    def set(self, broadcast: Broadcast, number: int, place: int = 0) -> None:
        """Says that the output at `place` is the point of this number."""
        self.broadcast = broadcast
        self.numbers += [None] * (place + 1 - len(self.numbers))
        self.numbers[place] = number

    def numbers_of(self, first: int, last: int) -> list[int | None]:
        """Returns the numbers of the outputs from `first` to before `last`; None of no point."""
        found = self.numbers[first:last]
        return found + [None] * (last - first - len(found))


def make(
    drawn: Drawn, sent: Tensor, call: Call, saved: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the products [M, n_l] of what is sent, and their sums over rows, by one call.

    Args:
        saved: what the gates read; where there is none, of the shape and dtype of the product.
    """
    if drawn.projected:
        return _gated_columns(drawn, sent, call, saved)
    return ops.project_gate(
        sent,
        call.matrices,
        saved,
        call.kinds,
        call.params,
        call.scales,
        sum_error=drawn.sum_error,
        seed=drawn.seed,
        streams=call.streams,
        distribution=drawn.distribution,
        allow_tf32=call.allow_tf32,
    )


def _gated_columns(
    drawn: Drawn, projected: Tensor, call: Call, saved: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the same of what a projector made, [M, >= n_l], of which each takes its columns."""
    factor = len(projected) if drawn.sum_error else 1
    deltas, sums = [], []
    for product, kind, param, h in zip(call.products, call.kinds, call.params, saved, strict=True):
        feedback = projected[:, : product.features] * (factor * product.scale)
        delta, total = ops.gate(feedback.to(h.dtype), h, kind, param)
        deltas.append(delta)
        sums.append(total)
    return deltas, sums
