"""Holds the feedback matrices of a root that are not drawn: given ones, and ones that learn.

Elsewhere B is a function of the seed. These are parameters of the root, so they are in its
checkpoint; those that learn require grad, and any optimizer of torch updates them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments

SHARED = "shared"
# What no point may be called there: "keys" and "values" are names of an attention's layers as well.
_TAKEN = {SHARED, *dir(nn.ParameterDict()), *dir(nn.ModuleDict())}

# grad_B [C, n] from B [C, n], the error e [M, C] and what the point reads, h [M, n]; also from the
# target [M, C], by that name, where a rule has such a parameter. Where B = Q P it is P's, from P
# [r, n] and the compressed error e Q [M, r].
Rule = Callable[..., Tensor]

# grad_Q [C, r] from Q [C, r] and the error e [M, C].
Compression = Callable[[Tensor, Tensor], Tensor]


def kolen_pollack(B: Tensor, error: Tensor, h: Tensor) -> Tensor:
    """Returns e^T h, which is the gradient of the output layer's weight where h is its input.

    With the same learning rate and weight decay for B and the weights, B of the last hidden layer
    comes to the output layer's weight (Kolen and Pollack 1994; for weight transport arXiv
    1904.05391); for the layers below it is the same rule, for the way from there to the output.
    """
    return error.t() @ h


def cross_correlation(B: Tensor, error: Tensor, h: Tensor) -> Tensor:
    """Returns B - e^T h: with SGD of rate 1 - lambda, B is the exponential average of the
    correlation of error and activation. Error broadcast and decorrelation (arXiv 2504.11558) brings
    |e^T h|^2 / 2 down, whose gradient at h, with e held, is e B, whatever the sign of e. For a loss
    that is a mean over rows."""
    return B - error.t() @ h


def local_classifier(B: Tensor, error: Tensor, h: Tensor, target: Tensor) -> Tensor:
    """Returns (p - t)^T h / M with p = softmax(h B^T): the gradient of the mean cross-entropy of a
    linear classifier of what the point reads, whose logits are h B^T.

    Its transpose, which takes an error at the logits to h, is then the feedback for the error at
    the output. Local classifiers, trained or fixed, with their own error as the feedback: arXiv
    1711.06756, 1901.06656. The target t holds classes or probabilities; rows without any are left
    out. Not scaled with the loss: where a `GradScaler` does so, give B an optimizer of its own.
    """
    total = target.sum(1, keepdim=True)
    p = (h @ B.t()).softmax(1)
    return (p * total - target).t() @ h / total.sum().clamp(min=1)


def oja(Q: Tensor, error: Tensor) -> Tensor:
    """Returns (Q z^T z - e^T z) / rho with z = e Q: Oja's subspace rule, by which the columns of Q
    come to be orthonormal and to span the r directions in which the error is largest (Oja 1989).

    After LDFA (arXiv 2502.20580), which has a Q and a P for each layer, in place of the layer's own
    W in the error's way back; here there is one Q for all layers, straight from the output. And
    rho, the root mean square length of a row of e, is ours: with it the gradient grows as the loss
    does, and not as its square.

    Q must move slowly, as P learns for the Q that there was. On the digits (rank 4, 12 epochs, P by
    Adam, two seeds) SGD of rate 1 for Q left 44 and 59% of held-out samples wrong, 0.1 6.3%; but so
    did a Q that stays, 6.3 and 7.0%.
    """
    z = error @ Q
    rho = (error.square().sum() / max(len(error), 1)).sqrt()
    return (Q @ (z.t() @ z) - error.t() @ z) / rho.where(rho > 0, 1)


LEARNING: dict[str, Rule | None] = {
    "kolen_pollack": kolen_pollack,
    "cross_correlation": cross_correlation,
    "local_classifier": local_classifier,
    "forward_gradient": None,  # by `fastdfa.forward_gradient`, not in backward passes
}
COMPRESSION: dict[str, Compression] = {"oja": oja}


class Learning(NamedTuple):
    """Says how the matrices of a root learn in its backward passes."""

    rule: Rule | None  # of every B_l, or P_l where B = Q P
    compression: Compression | None  # of Q
    needs_target: bool  # whether the rule does

    @property
    def name(self) -> str:
        """Returns the name of the rule, for error texts."""
        return _name(self.rule)


def learning_of(
    rule: str | Rule, compression: str | Compression | None, rank: int | None
) -> Learning:
    """Returns the rules of names of `LEARNING` and `COMPRESSION`, any other callables as they are;
    that of Q where B is a product, of a rank.

    Raises:
        ValueError, TypeError: for anything else, and for a rule with a target where B is one.
    """
    chosen = _chosen("rule", rule, LEARNING)
    of_low = None if compression is None else _chosen("compression", compression, COMPRESSION)
    needs_target = chosen is not None and _takes_target(chosen)
    if needs_target and rank is not None:
        raise ValueError(
            f"{_name(chosen)} takes the target, of C classes, and so needs a B [C, n_l]: expected "
            f"a Feedback without rank, got rank={rank}"
        )
    return Learning(chosen, None if rank is None else of_low, needs_target)


def _chosen(
    argument: str, value: Any, choices: Mapping[str, Callable[..., Tensor] | None]
) -> Callable[..., Tensor] | None:
    if not isinstance(value, str):
        arguments.function(argument, value, "a name or callable")
        function: Callable[..., Tensor] = value
        return function
    if value not in choices:
        names = arguments.listed(choices)
        raise arguments.wrong_value(argument, f"one of {names}, or callable", value)
    return choices[value]


def _takes_target(rule: Rule) -> bool:
    try:
        return "target" in inspect.signature(rule).parameters
    except ValueError:  # some callables of C have no signature
        return False


def _name(rule: Rule | None) -> str:
    return str(getattr(rule, "__name__", type(rule).__name__))


class Matrices(nn.ParameterDict):
    """Holds B [C, >= n_max] for all points, or B_l [C, n_l] by the names of points; scaled already.

    In the names of parameters a slash stands for the dot (`key_of`).
    """

    def __init__(self, given: Tensor | Mapping[str, Tensor]) -> None:
        if isinstance(given, Tensor):
            arguments.matrix("matrices", given, "matrix [C, >= n_max]")
            of_key = {SHARED: given}
        else:
            arguments.instance("matrices", given, Mapping, "a tensor or a dict of tensors")
            for name, matrix in given.items():
                arguments.instance("a key of matrices", name, str, "the name of a point")
                arguments.matrix(f"matrices[{name!r}]", matrix, "matrix [C, n]")
            of_key = {key_of(name): matrix for name, matrix in given.items()}
        super().__init__({k: nn.Parameter(B.detach().clone(), False) for k, B in of_key.items()})

    def add(self, name: str, matrix: Tensor) -> None:
        """Adds the matrix of another point."""
        self[key_of(name)] = nn.Parameter(matrix, False)

    def of(self, name: str) -> nn.Parameter:
        """Returns the matrix of a point."""
        matrix: nn.Parameter = self[SHARED if SHARED in self else key_of(name)]
        return matrix

    def version(self, values: bool = False) -> tuple[object, ...]:
        """Returns what changes where a plan that holds these would be stale: also with their
        `values`, where it holds copies of these."""
        return tuple(
            (matrix.data_ptr(), matrix.dtype, matrix._version if values else 0)
            for matrix in self.values()
        )

    def check(
        self,
        rows: int,
        points: Sequence[tuple[str, int, torch.dtype, torch.device]],
        spare: bool = False,
    ) -> None:
        """Raises a ValueError or TypeError unless every point (name, n_l, dtype, device) has one
        that fits, with `rows` rows; there may be others only where they are `spare`."""
        expected = {name: f"[{rows}, {features}]" for name, features, *_ in points}
        fits = set(self).issuperset if spare else set(self).__eq__
        if SHARED not in self and not fits({key_of(name) for name in expected}):
            names = ", ".join(name.rstrip("/").replace("/", ".") for name in self)
            raise ValueError(
                f"matrices must have one for each feedback point, {expected}, got {names or 'none'}"
            )
        for name, features, dtype, device in points:
            matrix = self.of(name)
            wide = SHARED in self and matrix.shape[1] >= features
            if matrix.shape[0] != rows or (matrix.shape[1] != features and not wide):
                raise ValueError(
                    f"matrices: expected {'>= ' * (SHARED in self)}{expected[name]} for feedback "
                    f"point {name!r}, got {tuple(matrix.shape)}"
                )
            if matrix.device != device:
                raise ValueError(
                    f"matrices: expected {device} for feedback point {name!r}, got {matrix.device}"
                )
            allowed = (dtype, torch.promote_types(dtype, torch.float32))
            if matrix.dtype not in allowed:
                raise TypeError(
                    f"matrices: expected {' or '.join(map(str, dict.fromkeys(allowed)))} for "
                    f"feedback point {name!r}, got {matrix.dtype}"
                )


def key_of(name: str) -> str:
    """Returns the name of a point as that of a parameter or module, where no dot may stand, nor a
    name that torch's containers have for themselves."""
    key = name.replace(".", "/")
    return f"{key}/" if key in _TAKEN else key


def learning_gradients(
    learning: Learning,
    error: Tensor,
    target: Tensor | None,
    low: Tensor | None,
    reads: Sequence[Tensor],
    matrices: Sequence[Tensor],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Returns the gradient of Q, where it learns, and of every matrix, from one error.

    Args:
        error: e [M, C].
        target: [M, C], where the rule has one.
        low: Q [C, r], where B = Q P.
        reads: what the point of each matrix reads, [M, n_l].
    """
    rule, compression = learning.rule, learning.compression
    sent = error if low is None else error.to(low.dtype) @ low
    made: list[Tensor | None] = [None] * len(matrices)
    if rule is not None:
        reads_target = target if learning.needs_target else None
        pairs = zip(reads, matrices, strict=True)
        made = [_gradient(rule, matrix, sent, h, reads_target) for h, matrix in pairs]
    if compression is None or low is None:
        return None, made
    return _of_shape(low, compression(low, error.to(low.dtype)), "compression"), made


def _gradient(
    rule: Rule, matrix: Tensor, error: Tensor, h: Tensor, target: Tensor | None
) -> Tensor:
    more = {} if target is None else {"target": target.to(matrix.dtype)}
    gradient = rule(matrix, error.to(matrix.dtype), h.to(matrix.dtype), **more)
    return _of_shape(matrix, gradient, "learning")


def _of_shape(matrix: Tensor, gradient: Tensor, what: str) -> Tensor:
    if gradient.shape != matrix.shape:
        raise ValueError(
            f"a rule of {what} must return shape {tuple(matrix.shape)}, got {tuple(gradient.shape)}"
        )
    return gradient
