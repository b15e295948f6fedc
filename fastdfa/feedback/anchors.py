"""Fits every B_l to true gradients: anchored feedback.

Now and then a training pass runs uncut. It is a step of backprop, and it tells for every point the
true gradient g [M, n_l] beside what is projected there, z [M, C] (the error e, or a signal of it).
B_l becomes the least-squares solution of z B_l = g over the passes so far, the older ones forgotten
step by step, so that an ordinary batch is enough. (GrAPE, ICLR 2026, takes such steps as anchors of
B that forward-mode derivatives move in between.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..matrices import key_of

# What a pass weighs when the next has come: of eight passes one still has a sixth.
FORGETTING = 0.8
# Of the mean of z's second moments, added to each: an error of softmax has rows of sum zero, so one
# direction without any. It bounds B by |g| / (2 sqrt(ridge) |z|).
RIDGE = 1e-3
# The sums of z^T z of a point are [C, C], and solved in float64.
MOST_COLUMNS = 2048


class Moments(NamedTuple):
    """Holds the sums over the rows of one pass, for one point."""

    second: Tensor  # z^T z [C, C]
    cross: Tensor  # z^T g [C, n_l]
    square: Tensor  # of all entries of g, their squares: []

    @classmethod
    def of(cls, z: Tensor, rows: Tensor, square: Tensor) -> Moments:
        """Returns those of z [M, C] and gradients [M, n_l], whose entries have this sum of
        squares."""
        return cls(z.t() @ z, z.t() @ rows, square)


class Fit(nn.Module):
    """Holds the running sums of a point, and solves them for its B [C, n_l].

    Each pass is divided by the trace of z^T z, so that it counts the same however long its errors
    are: they shrink as training goes on, and a `GradScaler` multiplies them by what it likes.
    """

    second: Tensor
    cross: Tensor
    square: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        columns = matrix.shape[0]
        self.register_buffer("second", matrix.new_zeros(columns, columns))
        self.register_buffer("cross", torch.zeros_like(matrix))
        self.register_buffer("square", matrix.new_zeros(()))

    def add(self, moments: Moments) -> None:
        """Adds a pass; one without an error, or that is not finite, is left out (no value is read
        by the host)."""
        size = moments.second.diagonal().sum()
        # Where these are finite, z^T g is: no entry is above their geometric mean.
        good = (size > 0) & size.isfinite() & moments.square.isfinite()
        for name, new in moments._asdict().items():
            total = self._buffers[name]
            assert total is not None
            total.copy_(torch.where(good, total * FORGETTING + new / size, total))

    def matrix(self, before: Tensor) -> Tensor:
        """Returns B, as long as the true gradient is: z B has the sum of squares of g over the
        passes, where the least-squares solution would be shorter by what it does not explain.

        `before` is returned where nothing has been added, or no gradient came.
        """
        solution, made = self._solved()
        scale = (self.square / made).sqrt()
        known = (made > 0) & (self.square > 0)
        return torch.where(known, solution * scale, before)

    def explained(self) -> Tensor:
        """Returns the share of g that z B explains, 1 - |g - z B|^2 / |g|^2 for the solution B: the
        mean squared cosine, so to say, that this B can have; NaN where no gradient came."""
        solution, made = self._solved()
        return (2 * (solution * self.cross).sum() - made) / self.square

    def _solved(self) -> tuple[Tensor, Tensor]:
        """Returns the solution [C, n_l], and the squares of z times it, summed."""
        second = self.second.double()
        mean = second.diagonal().mean()
        ridge = torch.where(mean > 0, mean * RIDGE, 1.0)
        system = second + ridge * torch.eye(len(second), dtype=second.dtype, device=second.device)
        factor, _ = torch.linalg.cholesky_ex(system)  # without a wait for the device
        solution = torch.cholesky_solve(self.cross.double(), factor)
        made = (solution * (second @ solution)).sum()
        return solution.to(self.cross.dtype), made.to(self.cross.dtype)


class Anchors(nn.Module):
    """Counts the training passes of a root, says which are anchors, and holds what these have told.

    Attributes:
        every: every so many passes one is an anchor; among the first so many also those of number
            1, 2, 4, 8, ..., as the network moves fastest then.
        fits: of every point, by its name.
        fitted: whether an anchor has been through its backward pass.
    """

    passes: Tensor

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.fits = nn.ModuleDict()
        self.fitted = False
        self.count = 0  # of passes; the buffer is what a checkpoint holds, as it may lie on a GPU
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def due(self) -> bool:
        """Counts a pass, and returns whether it is an anchor: also while nothing is fitted yet."""
        number = self.count
        self.count += 1
        doubled = number < self.every and number & (number - 1) == 0
        return not self.fitted or doubled or number % self.every == 0

    def fit(self, name: str, matrix: Tensor, moments: Moments) -> None:
        """Adds what a pass tells of a point, and writes its B."""
        self.make_room(name, matrix)
        fit: Any = self.fits[key_of(name)]
        fit.add(moments)
        matrix.copy_(fit.matrix(matrix))
        self.fitted = True

    def explained(self, names: Iterable[str]) -> dict[str, float]:
        """Returns the share of the true gradient that B explains, of points that are fitted."""
        fits: Any = self.fits
        known = [name for name in names if key_of(name) in fits]
        return {name: fits[key_of(name)].explained().item() for name in known}

    def make_room(self, name: str, matrix: Tensor) -> None:
        """Makes the sums of a point, where there are none."""
        if key_of(name) not in self.fits:
            self.fits[key_of(name)] = Fit(matrix)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.passes.fill_(self.count)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.count, self.fitted = int(self.passes), len(self.fits) > 0
