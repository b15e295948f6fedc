"""Feedback matrices that a root holds: given ones, and ones that learn.

Elsewhere B is a function of the seed. These are parameters of the root, so they are in its
checkpoint; those that learn require grad, and any optimizer of torch updates them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .feedback import hash_of
from .fused import as_matrix
from .tape import Point

SHARED = "shared"

# grad_B [C, n] from B [C, n], the error e [M, C] and what the point reads, h [M, n].
Learning = Callable[[Tensor, Tensor, Tensor], Tensor]


def kolen_pollack(B: Tensor, error: Tensor, h: Tensor) -> Tensor:
    """e^T h, which is the gradient of the output layer's weight where h is its input.

    With the same learning rate and weight decay for B and the weights, B of the last hidden layer
    comes to the output layer's weight (Kolen and Pollack 1994; for weight transport arXiv
    1904.05391); for the layers below it is the same rule, for the way from there to the output.
    """
    return error.t() @ h


def cross_correlation(B: Tensor, error: Tensor, h: Tensor) -> Tensor:
    """B - e^T h: with SGD of rate 1 - lambda, B is the exponential average of the correlation of
    error and activation, which the feedback e B then brings down (error broadcast and
    decorrelation, arXiv 2504.11558). For a loss that is a mean over rows."""
    return B - error.t() @ h


LEARNING: dict[str, Learning | None] = {
    "kolen_pollack": kolen_pollack,
    "cross_correlation": cross_correlation,
    "forward_gradient": None,  # by `fastdfa.forward_gradient`, not in backward passes
}


def learning_of(rule: str | Learning) -> Learning | None:
    """The rule of a name of `LEARNING`, any other callable as it is.

    Raises:
        ValueError, TypeError: for anything else.
    """
    if isinstance(rule, str):
        if rule not in LEARNING:
            names = ", ".join(map(repr, LEARNING))
            raise ValueError(f"rule must be one of {names}, or callable, got {rule!r}")
        return LEARNING[rule]
    if not callable(rule):
        raise TypeError(f"rule must be a name or callable, got {type(rule).__name__}")
    return rule


class Matrices(nn.ParameterDict):
    """B [C, >= n_max] for all points, or B_l [C, n_l] by the names of points; scaled already.

    In the names of parameters a slash stands for the dot, which torch does not allow there.
    """

    def __init__(self, given: Tensor | Mapping[str, Tensor]) -> None:
        if isinstance(given, Tensor):
            given = {SHARED: given}
        elif not isinstance(given, Mapping):
            raise TypeError(
                f"matrices must be a tensor or a dict of tensors, got {type(given).__name__}"
            )
        for name, matrix in given.items():
            _check_matrix(name, matrix)
        super().__init__(
            {
                _key(name): nn.Parameter(matrix.detach().clone(), False)
                for name, matrix in given.items()
            }
        )
        self._by_stream = {self.stream(name): _key(name) for name in given}

    def stream(self, name: str) -> int:
        """What stands for the matrix of a point, as its stream does where B is generated."""
        return 0 if SHARED in self else hash_of(name)

    def of(self, name: str) -> Tensor:
        return self[SHARED if SHARED in self else _key(name)]

    def of_stream(self, stream: int) -> Tensor:
        return self[SHARED if SHARED in self else self._by_stream[stream]].detach()

    def version(self) -> tuple[object, ...]:
        """What changes where a plan that holds these would be stale; their values may change."""
        return tuple((matrix.data_ptr(), matrix.dtype) for matrix in self.values())

    def check(
        self, rows: int, points: Sequence[tuple[str, int, torch.dtype, torch.device]]
    ) -> None:
        """Raises a ValueError or TypeError unless every point (name, n_l, dtype, device) has one
        that fits, with `rows` rows."""
        expected = {name: f"[{rows}, {features}]" for name, features, *_ in points}
        if SHARED not in self and set(self) != {_key(name) for name in expected}:
            names = ", ".join(name.replace("/", ".") for name in self)
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


def _key(name: str) -> str:
    return name.replace(".", "/")


def _check_matrix(name: str, matrix: object) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"matrices[{name!r}] must be a tensor, got {type(matrix).__name__}")
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ValueError(
            f"matrices[{name!r}] must be a floating matrix [C, n], got {matrix.dtype} of shape "
            f"{tuple(matrix.shape)}"
        )


def learning(rule: Learning, y: Tensor, points: list[Point], matrices: list[Tensor]) -> Tensor:
    """y, whose error gives the matrices of these points their gradients, by a rule."""
    read = [as_fed(point, y.shape[:-1].numel()) for point in points]
    return _Learning.apply(rule, y, *read, *matrices)


def as_fed(point: Point, rows: int) -> Tensor:
    """What a point reads, [M, n_l]; of its positions the sum over the square root of their number,
    which is what its feedback is to each (see `tape.SpreadToken`)."""
    h = point.tensor.detach()
    if point.features is None:
        return h.reshape(rows, -1)
    leading = 1 if point.rows is None else point.rows
    h = h.movedim(point.features, leading).flatten(leading + 1)
    return (h.sum(-1) / h.shape[-1] ** 0.5).reshape(rows, -1)


class _Learning(torch.autograd.Function):
    """Passes the output y through; in backward matrices get the gradients of a rule."""

    @staticmethod
    def forward(ctx, rule: Learning, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        ctx.save_for_backward(*tensors)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, error: Tensor | None):
        tensors = ctx.saved_tensors
        if error is None:
            return None, None, *[None] * len(tensors)
        count = len(tensors) // 2
        e = as_matrix(error)
        gradients = []
        for h, matrix in zip(tensors[:count], tensors[count:], strict=True):
            gradient = ctx.rule(matrix, e.to(matrix.dtype), h.to(matrix.dtype))
            if gradient.shape != matrix.shape:
                raise ValueError(
                    f"a rule of learning must return shape {tuple(matrix.shape)}, got "
                    f"{tuple(gradient.shape)}"
                )
            gradients.append(gradient)
        return None, error, *[None] * count, *gradients
