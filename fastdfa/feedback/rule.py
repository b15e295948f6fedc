"""Says how an error becomes feedback: how B is drawn, scaled and kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import arguments, ops, signals
from ..ops import capture
from ..signals import Signal

# Above this size a dense B is not kept but generated inside the kernels, piece by piece.
DENSE_LIMIT_BYTES = 256 * 2**20

# The standard deviation of the entries of B_l, from classes C, features n_l, and the widest n.
SCALES: dict[str, Callable[[int, int, int], float]] = {
    # arXiv 1906.04554: randn(C, n_max) / sqrt(n_max C), and the slice times sqrt(n_max / n_l).
    "launay2019": lambda c, n, n_max: (c * n) ** -0.5,
    # arXiv 2006.12878, TinyDFA: U[-1, 1) / sqrt(n_max) for every layer.
    "tinydfa": lambda c, n, n_max: (3 * n_max) ** -0.5,
    # arXiv 1609.01596: U(-1/sqrt(n_l), 1/sqrt(n_l)).
    "nokland2016": lambda c, n, n_max: (3 * n) ** -0.5,
    # The code of DRTP (arXiv 1909.01311): Kaiming-uniform, bound sqrt(6 / n_l).
    "drtp": lambda c, n, n_max: (2 / n) ** 0.5,
    # BioTorch: Xavier-uniform, bound sqrt(6 / (C + n_l)).
    "biotorch": lambda c, n, n_max: (2 / (c + n)) ** 0.5,
    # The ablation of arXiv 1906.04554: no scaling.
    "unit": lambda c, n, n_max: 1.0,
}


@dataclass(frozen=True)
class Feedback:
    """Says how the error is fed back: a point of n_l features receives s e B_l, B_l [C, n_l].

    Args:
        distribution: of the entries of B: "normal", "uniform" or "rademacher", of mean 0.
        scale: their standard deviation, a number or the name of a published choice: "launay2019"
            1/sqrt(C n_l), "tinydfa" 1/sqrt(3 n_max), "nokland2016" 1/sqrt(3 n_l), "drtp"
            sqrt(2/n_l), "biotorch" sqrt(2/(C + n_l)), "unit" 1 (sources beside `SCALES`).
        shared: one B for all points, of which each takes its first n_l columns
            (arXiv 1906.04554); else every point draws its own.
        error: "mean" feeds back e as autograd hands it to the output, "sum" multiplies it by the
            number of rows of the backward call, undoing a loss that is a mean over rows; for the
            feedback alone, and per process.
        signal: what is projected: "error", its "sign", "ternary" or "quantized", the "target"
            (see `DFA.target`), one of `fastdfa.signals` with other options, or a function of
            (output, target, error), each [M, C]. But for the error itself its rows are as long as
            the error's.
        rank: makes B a product Q P of matrices [C, rank] and [rank, n_l], one Q for all points,
            of which each entry has the deviation that `scale` says (low rank: arXiv 2502.20580).
        density: the share of B's entries that are not zero, drawn at random; these are larger by
            1/sqrt(density), so that the deviation stays (arXiv 1903.02083).
        seed: 0 to 2**63 - 1; None draws one from torch's generator when the `DFA` is made.
        anchor: every so many training passes, and at the first, 2nd, 3rd, 5th, 9th, ... before
            those, one runs uncut: an ordinary step of backprop, which fits every B_l to the true
            gradients that it sees, by least squares over the passes so far. Between them z B_l is
            the feedback, as long as the true gradient on average (`fastdfa.feedback.anchors`). Of
            the rule, distribution, scale, shared and density only draw the B that is there before
            anything is fitted. None never does.
        dense: True keeps B in memory, False generates it inside the kernels at each step; None
            keeps it up to 256 MiB. The numbers are the same, to rounding.

    Raises:
        ValueError, TypeError: for a value that is not among these.
    """

    distribution: str = "normal"
    scale: str | float = "launay2019"
    shared: bool = True
    error: str = "mean"
    signal: str | Signal | Callable[..., Tensor] = "error"
    seed: int | None = None
    dense: bool | None = None
    rank: int | None = None
    density: float = 1.0
    anchor: int | None = None

    def __post_init__(self) -> None:
        arguments.choice("distribution", self.distribution, ops.DISTRIBUTIONS)
        arguments.choice("error", self.error, ("mean", "sum"))
        signals.make(self.signal)
        arguments.flag("shared", self.shared)
        arguments.flag("dense", self.dense, optional=True)
        arguments.keep(
            self,
            scale=scale_of(self.scale, SCALES),
            seed=arguments.seed("seed", self.seed, optional=True),
            rank=arguments.integer("rank", self.rank, optional=True),
            anchor=arguments.integer("anchor", self.anchor, optional=True),
            density=arguments.number(
                "density", self.density, "above 0 and at most 1", lambda d: 0 < d <= 1
            ),
        )
        if self.density < 1 and self.dense is False:
            raise ValueError("density below 1 needs a B in memory, got dense=False")
        if self.anchor is not None and self.dense is False:
            raise ValueError("anchor fits a B that is in memory, got dense=False")
        if self.anchor is not None and self.error == "sum":
            raise ValueError(
                "anchor fits B to the true gradient, which error='sum' would multiply: expected "
                "error='mean'"
            )

    @property
    def sends(self) -> Signal:
        """Returns what `signal` names."""
        return signals.make(self.signal)

    def rows(self, columns: int) -> int:
        """Returns the rows of B, or of P where B = Q P, for a signal [M, columns]."""
        return columns if self.rank is None else self.rank

    def deviation(self, classes: int, features: int, widest: int) -> float:
        """Returns the standard deviation of the entries of B_l [classes, features]."""
        if isinstance(self.scale, str):
            return SCALES[self.scale](max(classes, 1), max(features, 1), max(widest, 1))
        return float(self.scale)

    def stream(self, name: str) -> int:
        """Returns the generator's stream for a point: 0 where B is shared, else a hash of the
        name."""
        if self.shared:
            return 0
        return hash_of(name)


def make(feedback: Feedback | str | None) -> Feedback:
    """Returns the rule for a preset's name; a `Feedback` as it is; the default for None.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if feedback is None:
        return Feedback()
    if isinstance(feedback, Feedback):
        return feedback
    arguments.instance("feedback", feedback, str, "a Feedback or the name of a preset")
    arguments.choice("feedback", feedback, PRESETS)
    return PRESETS[feedback]


def hash_of(name: str) -> int:
    """Returns 32 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


LOW_RANK_STREAM = hash_of("Q of B = Q P")
_MASK = 2**31  # of a stream, that of its mask


class Source(NamedTuple):
    """Holds what determines an unscaled B, whatever its size."""

    seed: int
    stream: int
    distribution: str
    density: float
    dtype: torch.dtype
    device: torch.device

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Draws B [rows, columns]; its first columns are those of a narrower one."""
        draw = partial(
            ops.feedback, rows, columns, seed=self.seed, dtype=self.dtype, device=self.device
        )
        made = draw(stream=self.stream, distribution=self.distribution)
        if self.density < 1:
            uniform = draw(stream=self.stream ^ _MASK, distribution="uniform")
            # U(-sqrt 3, sqrt 3) is below this at a share `density` of the places.
            kept = uniform < 3**0.5 * (2 * self.density - 1)
            made.mul_(kept).mul_(self.density**-0.5)
        return made


class DenseCache:
    """Keeps the dense matrices of one root, drawn when first asked for: a cache, as B is a
    function."""

    def __init__(self) -> None:
        self._matrices: dict[Source, Tensor] = {}
        self._channels_last: dict[tuple[Source, tuple[int, ...]], Tensor] = {}

    def get(
        self, source: Source, rows: int, columns: int, channels_last: tuple[int, ...] = ()
    ) -> Tensor:
        """Returns the unscaled B [rows, >= columns]; a wider one serves, as a prefix is a B.

        With the sizes (C, *S) of a point in `channels_last`, it is [rows, C S] and its columns are
        those of B in the order of [*S, C].
        """
        if channels_last:
            key = (source, channels_last)
            if key not in self._channels_last:
                capture.refuse(capture.MADE_BEFORE.format("make its B"))
                reordered = in_channels_last(self.get(source, rows, columns), channels_last)
                self._channels_last[key] = ready_on_every_stream(reordered)
            return self._channels_last[key]
        matrix = self._matrices.get(source)
        if matrix is None or matrix.shape[0] != rows or matrix.shape[1] < columns:
            capture.refuse(capture.MADE_BEFORE.format("make its B"))
            self._drop_other_seeds(source.seed)
            matrix = self._matrices[source] = ready_on_every_stream(source.matrix(rows, columns))
        return matrix

    def _drop_other_seeds(self, seed: int) -> None:
        self._matrices = {s: m for s, m in self._matrices.items() if s.seed == seed}
        self._channels_last = {k: m for k, m in self._channels_last.items() if k[0].seed == seed}


def ready_on_every_stream(matrix: Tensor) -> Tensor:
    """Returns the same, once the GPU has written it: what is kept is read on the stream of any
    pass."""
    if matrix.is_cuda:
        torch.cuda.current_stream(matrix.device).synchronize()
    return matrix


def in_channels_last(matrix: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Returns the first columns of B, of a point [C, *S], in the order of [*S, C]."""
    columns = math.prod(sizes)
    out = matrix.new_zeros(len(matrix), ops.aligned_width(columns, matrix.device))[:, :columns]
    return out.copy_(matrix[:, :columns].unflatten(1, (sizes[0], -1)).mT.flatten(1))


def fits_dense(rule: Feedback, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Tells whether B [rows, columns] is kept in memory rather than generated at each use."""
    if rule.dense is not None or rule.density < 1:
        return rule.dense is not False
    return rows * columns * dtype.itemsize <= DENSE_LIMIT_BYTES


def scale_of(scale: object, named: Collection[str]) -> str | float:
    """Returns a scale that is one of some names, or a positive number.

    Raises:
        ValueError, TypeError: for any other.
    """
    if isinstance(scale, str):
        if scale not in named:
            names = arguments.listed(named)
            raise arguments.wrong_value("scale", f"a number or one of {names}", scale)
        return scale
    positive: float = arguments.number(
        "scale", scale, "positive and finite", lambda s: s > 0, kind="a number or a name"
    )
    return positive


PRESETS: dict[str, Feedback] = {
    # 1906.04554 feeds back softmax - onehot, not divided by the batch.
    "launay2019": Feedback(error="sum"),
    "tinydfa": Feedback(distribution="uniform", scale="tinydfa"),
    "nokland2016": Feedback(distribution="uniform", scale="nokland2016", shared=False),
    "drtp": Feedback(distribution="uniform", scale="drtp", shared=False),
    "biotorch": Feedback(distribution="uniform", scale="biotorch", shared=False),
}
