"""Hands the feedback to the points of a pass that torch traces or transforms.

No node can ask for its feedback there, as whom it would ask is no part of the graph. So the node
behind the output hands every token its own. Ops make it, that read the seed when they run: a
compiled step follows what is written into that, and modules that `torch.func` has stacked have a B
each.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..feedback.bank import Bank, Layout, Settled, Size
from ..matrices import Learning, learning_gradients
from ..ops.typed import Function, constant
from ..projectors import Projected
from . import sites
from .broadcast import Call, Drawn, Product, Sender, as_matrix, make, shaped
from .nodes import spread
from .root import Root

# The products of a dtype and device, by their numbers, and what the gates of their call read.
_Prepared = tuple[Drawn, list[int], Call, list[Tensor]]


class Projection(sites.Site):
    """Makes the feedback of the points of one layout, by the seed that it is given.

    Args:
        settled, products: of every point without its like.
        drawn: how B is generated, but for the seed.
    """

    def __init__(
        self,
        root: Root,
        bank: Bank,
        layout: Layout,
        settled: Sequence[Settled],
        products: Sequence[Product],
        drawn: Drawn,
    ) -> None:
        super().__init__(root)
        self.bank, self.layout, self.settled = bank, layout, settled
        self.products, self.drawn = products, drawn
        self.counts_rows = drawn.sum_error  # whether the feedback of a row depends on their number
        self._kept: tuple[int, int, list[_Prepared]] | None = None  # for a seed and rows

    def feedback(self, sent: Tensor, seed: int, given: Sequence[Tensor]) -> list[Tensor]:
        """Returns s e B_l [M, n_l] of every product; `given` has the B of each, or one for all,
        unless they are generated."""
        made: list[Tensor] = [sent] * len(self.products)
        for drawn, numbers, call, blanks in self._calls(seed, len(sent), given):
            deltas, _ = make(drawn, sent.to(blanks[0].device), call, blanks)
            for number, delta in zip(numbers, deltas, strict=True):
                made[number] = delta
        return made

    def like(self, sent: Tensor) -> list[Tensor]:
        """Returns tensors like the feedback, without values."""
        rows = sent.shape[0]
        return [
            sent.new_empty(rows, p.features, dtype=p.dtype, device=p.device) for p in self.products
        ]

    def _calls(self, seed: int, rows: int, given: Sequence[Tensor]) -> list[_Prepared]:
        if given:
            one = list(given) * (len(self.products) if len(given) == 1 else 1)
            return self._grouped(seed, rows, one)
        kept = self._kept
        if kept is None or kept[:2] != (seed, rows):
            pairs = zip(self.settled, self.products, strict=True)
            dense = [self._dense(seed, *pair) for pair in pairs]
            kept = self._kept = seed, rows, self._grouped(seed, rows, dense)
        return kept[2]

    def _dense(self, seed: int, settled: Settled, product: Product) -> Tensor | None:
        if self.drawn.projected:
            return None
        return self.bank.dense(seed, self.layout, settled, product.order)

    def _grouped(self, seed: int, rows: int, dense: Sequence[Tensor | None]) -> list[_Prepared]:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for number, product in enumerate(self.products):
            groups.setdefault((product.dtype, product.device), []).append(number)
        drawn, calls = self.drawn._replace(seed=seed), []
        for (dtype, device), numbers in groups.items():
            products = [self.products[i] for i in numbers]
            # The identity reads nothing: an expanded scalar gives shape and dtype.
            blank = torch.empty((), dtype=dtype, device=device)
            blanks = [blank.expand(rows, product.features) for product in products]
            call = Call.of(drawn, products, [dense[i] for i in numbers])
            calls.append((drawn, numbers, call, blanks))
        return calls


class Handing:
    """Finds, for the passes of a root that are traced or transformed, what hands their feedback."""

    def __init__(self, root: Root, bank: Bank) -> None:
        self.root = weakref.ref(root)  # which holds this
        self.bank = bank
        self.sites = sites.Sites()

    # Constants of a traced pass, guarded by their arguments, of which one is the root's stamp.

    @constant
    def projection(
        self,
        stamp: int,
        classes: int,
        points: tuple[Size, ...],
        orders: tuple[tuple[int, ...], ...],
        projected: bool,
    ) -> tuple[int, tuple[int, ...]]:
        """Returns the number of what makes the feedback of the points, and the product of each."""
        layout, rule = Layout(classes, tuple(Size(*point) for point in points)), self.bank.rule
        settled = self.bank.settle(0, layout)  # where no B is drawn, as none is fitted
        products = [
            Product(None, each.scale, each.stream, each.size.features, order, *each.size[2:])
            for each, order in zip(settled, orders, strict=True)
        ]
        distinct = list(dict.fromkeys(products))
        firsts = [settled[products.index(product)] for product in distinct]
        drawn = Drawn(0, rule.distribution, rule.shared, rule.error == "sum", projected)
        number = self.sites.number(
            (stamp, layout, *distinct),
            lambda: Projection(self._root(), self.bank, layout, firsts, distinct, drawn),
        )
        return number, tuple(map(distinct.index, products))

    @constant
    def low(self, stamp: int, columns: int, device: torch.device) -> int:
        """Returns the number of what draws Q [columns, rank]."""
        root, bank, shape = self._root(), self.bank, (columns, self.bank.rule.rank or 0)

        def make() -> sites.Drawing:
            return sites.Drawing(
                root, lambda seed: bank.low(seed, columns, device), shape, torch.float32, device
            )

        return self.sites.number((stamp, columns, device), make)

    def _root(self) -> Root:
        root = self.root()
        assert root is not None  # whose pass it is
        return root


class Handed(NamedTuple):
    """Says how the root of a pass hands its error to the tokens.

    Attributes:
        projection: the number of the `Projection`.
        places: which of its products each point has.
        orders: of every point, as of a product.
        low: the number of what draws Q where B = Q P, and Q does not learn.
        sender: what makes a signal of the error; None where that is the error itself.
        learning: how matrices learn from the error; None where none does.
        given: how many given matrices are among the tensors.
        learnt: how many matrices learn.
    """

    projection: int
    places: Sequence[int]
    orders: Sequence[tuple[int, ...]]
    low: int | None
    sender: Sender | None
    learning: Learning | None
    given: int
    learnt: int


class HandingNode(Function):
    """Passes the output y through; in backward hands every token its feedback, and gives the
    matrices that learn their gradients.

    The tensors after the seed: the given matrices; what the points read, then the matrices, where
    these learn; and the tokens.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        handed: Handed,
        y: Tensor,
        output: Tensor | None,
        low: Tensor | None,
        target: Tensor | None,
        seed: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.handed, _, *tensors = inputs
        ctx.save_for_backward(*tensors)  # tokens for their shapes: they have no memory

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> Any:
        handed = ctx.handed
        output, low, target, seed, *tensors = ctx.saved_tensors
        given, rest = tensors[: handed.given], tensors[handed.given :]
        reads, learnt = rest[: handed.learnt], rest[handed.learnt : 2 * handed.learnt]
        grads: list[Tensor | None] = []
        e, low_grad = as_matrix(error), None
        if handed.low is not None:
            low = torch.ops.fastdfa.drawn(e, seed, handed.low)
        if handed.learning is not None:
            low_grad, grads = learning_gradients(handed.learning, e, target, low, reads, learnt)
        sent: Tensor | Projected = e
        if handed.sender is not None:
            sent = handed.sender._replace(low=low, target=target).of(error, output)
        if isinstance(sent, Projected):
            sent = sent.tensor()
        made = torch.ops.fastdfa.handed(sent, seed, given, handed.projection)
        if not torch.compiler.is_compiling():  # a compiled backward refuses another one
            error, *made = _Once.apply(error, *made)
        triples = zip(handed.orders, handed.places, rest[2 * handed.learnt :], strict=True)
        fed = [shaped(made[place], token.shape, order) for order, place, token in triples]
        nothing = [None] * (handed.given + handed.learnt)
        return None, error, None, low_grad, None, None, *nothing, *grads, *fed


class _Once(Function):
    """Passes on an error and the feedback made of it, which cannot be differentiated: what
    `once_differentiable` is where nothing transforms."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*made: Tensor) -> tuple[Tensor, ...]:
        return tuple(each.view_as(each) for each in made)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("the gradients of a DFA cannot be differentiated again")


class HandedToken(Function):
    """Holds the place of x in the graph, as a `Token` does; its gradient is the feedback."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rows: Any, features: Any) -> Tensor:
        shape = x.shape if features is None else (*x.shape[:rows], x.shape[features])
        return x.new_empty(()).expand(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.rows, ctx.features = inputs
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, feedback: Tensor) -> Any:
        if ctx.features is not None:
            feedback = spread(feedback, ctx.shape, ctx.rows, ctx.features)
        return feedback, None, None
