"""Finds the plan of a backward pass from its forward pass, and remembers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import ops
from ..feedback.bank import Layout, Settled, Size
from ..matrices import SHARED
from ..ops.typed import constant
from . import bypass, plan, whole
from .broadcast import Alike, Drawn, Product
from .handed import Handed
from .inplace import class_of
from .plan import Plan
from .tape import Point, Tape, TrainedRoot
from .whole import Whole


class PlannedWhole(NamedTuple):
    """Holds a network that is one segment, and the plan of its backward."""

    whole: Whole
    plan: Plan


class Planner:
    """Plans the backward of a root's forward passes, and remembers the latest.

    Attributes:
        layout: the sizes of the latest pass; None before the first.
    """

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.forget()

    def forget(self) -> None:
        """Lets go of all plans, as modules have changed."""
        self._plan: Plan | None = None
        self._checked: Layout | None = None  # that of a pass without a way round a cut
        self._whole: PlannedWhole | None = None

    def plan(self, root: TrainedRoot, tape: Tape, points: Sequence[Point], y: Tensor) -> Plan:
        """Returns the plan of a pass: that of the pass before, where it serves this one as well.

        Raises:
            ValueError, TypeError, RuntimeError: where a point does not fit the error, and for a way
                round a cut.
        """
        key = (*plan.key_of(points, y), root.read_seed(), *root.bank.version())
        made = self._plan  # which another thread may exchange meanwhile
        if made is None or made.key != key:
            made = self._plan = self._planned(root, tape, points, y, key)
        self.layout = made.layout
        return made

    def _planned(
        self, root: TrainedRoot, tape: Tape, points: Sequence[Point], y: Tensor, key: Any
    ) -> Plan:
        layout, names = self._laid_out(root, points, y)
        if layout != self._checked:
            bypass.check(root, tape, points, names, y)
            self._checked = layout
        if not points:
            return Plan(key, layout, self.drawn(root), [], [], Alike.of([]), {})
        self._remember(*layout)
        settled = root.bank.settle(root.read_seed(), layout)
        projected = root.projector is not None
        products = [
            plan.product_of(point, y, each, root.bank, layout, projected)
            for point, each in zip(points, settled, strict=True)
        ]
        return self.with_products(root, layout, products, key)

    def handed(
        self, root: TrainedRoot, points: Sequence[Point], y: Tensor
    ) -> tuple[Handed, list[Tensor]]:
        """Returns how a pass that is traced or transformed hands its feedback, and the given
        matrices that it reads."""
        layout, names = self._laid_out(root, points, y)
        self._remember(*layout)
        projected = root.projector is not None
        orders = tuple(plan.order_of(p, y, root.bank, layout, projected) for p in points)
        number, places = root.handing.projection(root.stamp, *layout, orders, projected)
        given: list[Tensor] = []
        if root.matrices is not None:
            count = 1 if SHARED in root.matrices else max(places, default=-1) + 1
            found = [root.matrices.of(names[places.index(i)]) for i in range(count)]
            given = [matrix.detach() for matrix in found]
        return Handed(number, places, orders, None, None, root.learning, len(given), 0), given

    def _laid_out(
        self, root: TrainedRoot, points: Sequence[Point], y: Tensor
    ) -> tuple[Layout, list[str]]:
        names = root.names_of_points([point.layer for point in points])
        return plan.lay_out(points, names, y, root.columns(y.shape[-1])), names

    @constant
    def _remember(self, classes: int, points: tuple[Size, ...]) -> None:
        self.layout = Layout(classes, tuple(Size(*point) for point in points))

    def with_products(
        self, root: TrainedRoot, layout: Layout, products: list[Product], key: Any = None
    ) -> Plan:
        """Returns a plan of these products, with the matrices that they multiply by."""
        pairs = zip(root.bank.settle(root.read_seed(), layout), products, strict=True)
        dense = [self.dense(root, layout, settled, product) for settled, product in pairs]
        return Plan(key, layout, self.drawn(root), products, dense, Alike.of(products), {})

    def dense(
        self, root: TrainedRoot, layout: Layout, settled: Settled, product: Product
    ) -> Tensor | None:
        """Returns the B of a product; None where it is generated, or a projector's."""
        if root.projector is not None:
            return None
        return root.bank.dense(root.read_seed(), layout, settled, product.order)

    def drawn(self, root: TrainedRoot) -> Drawn:
        """Returns how the B of a root are generated, and its error reduced."""
        rule, projected = root.bank.rule, root.projector is not None
        sum_error = rule.error == "sum"
        return Drawn(root.read_seed(), rule.distribution, rule.shared, sum_error, projected)

    def whole(self, root: TrainedRoot, x: Any) -> PlannedWhole | None:
        """Returns the network of a root, where it is one segment for such an input."""
        module: Any = root.module
        if class_of(module) is not nn.Sequential or not whole.runs_alone(x):
            return None
        found = self._whole
        if found is None or not whole.still_holds(found.whole, x):
            found = None
            network = whole.find(module, x, root.cut_at)
        else:
            network = found.whole
        if network is None:
            self._whole = None
            return None
        key = (root.read_seed(), ops.allow_tf32(x.device, x.dtype), *root.bank.version())
        if found is None or found.plan.key != key:
            found = self._whole = PlannedWhole(network, self._planned_whole(root, network, key))
        self.layout = found.plan.layout
        return found

    def _planned_whole(self, root: TrainedRoot, network: Whole, key: Any) -> Plan:
        segment, head = network.segment, network.layers[-1]
        pairs = [
            (stage, after)
            for stage, after, cut in zip(
                segment.stages, network.layers[1:], segment.cuts, strict=True
            )
            if cut
        ]
        names = root.names_of_points([after for _, after in pairs])
        sizes = tuple(
            Size(name, len(stage.layer.weight), *network.memory)
            for name, (stage, _) in zip(names, pairs, strict=True)
        )
        layout = Layout(root.columns(len(head.weight)), sizes)
        settled = root.bank.settle(root.read_seed(), layout)
        products = [
            Product(stage.gate, each.scale, each.stream, each.size.features, (), *network.memory)
            for (stage, _), each in zip(pairs, settled, strict=True)
        ]
        return self.with_products(root, layout, products, key)
