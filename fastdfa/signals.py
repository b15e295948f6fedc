"""Says what is projected in place of the error: its sign, its levels, the target, a function.

A signal that is not linear in e would change with the size of the loss: with GradScaler, with the
number of batches that are accumulated, with a mean in place of a sum. So each row of it is made as
long as the row of e by default, and only its direction is that of the signal. `raw=True` leaves its
entries as they are, but for a mean loss divides them by the number of rows M, as the loss does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import arguments


@dataclass(frozen=True)
class Signal(ABC):
    """Serves as the base of all signals: `of` makes one from an error.

    Args:
        raw: leave its entries as they are, in place of rows as long as those of the error.
        centred: subtract the mean of each row. The error of a softmax has rows of mean 0, its sign
            and levels have not, and what all classes have in common pushes every sample the same
            way: on the digits (8 epochs of `make train`) sign(e) stays at chance, centred it
            reaches 95.6%, the error itself 96.1%.
    """

    raw: bool = False
    centred: bool = False
    needs_error: ClassVar[bool] = True
    needs_output: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def __post_init__(self) -> None:
        arguments.flag("raw", self.raw)
        arguments.flag("centred", self.centred)

    @property
    def known_ahead(self) -> bool:
        """Tells whether it needs nothing of the forward pass: not the error, nor the output, nor
        the length of the error's rows. Then layers can learn in that pass (see `StreamingStep`)."""
        return self.raw and not (self.needs_error or self.needs_output)

    @abstractmethod
    def of(self, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
        """Returns [M, C] from the error e [M, C]; the output y and the target, [M, C], where they
        are needed. In float32, or float64 where e is. The entries of an e that is not needed may be
        NaN."""

    def columns(self, classes: int) -> int:
        """Returns how many columns the signal of an error of so many classes has."""
        return classes


@dataclass(frozen=True)
class Error(Signal):
    """Sends the error itself: direct feedback alignment (arXiv 1609.01596)."""

    def of(self, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
        return error


@dataclass(frozen=True)
class Sign(Signal):
    """Sends sign(e), of 0 where e is (sDFA; arXiv 1909.01311 compares it)."""

    def of(self, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
        return error.sign()


@dataclass(frozen=True)
class Ternary(Signal):
    """Sends sign(e) where |e| is above a share of the largest of its row, else 0.

    For hardware whose inputs are -1, 0 and 1, as an optical processor's (arXiv 2006.01475). There
    the threshold is a number; a share of the row's largest does not depend on the loss's size.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        share = arguments.number(
            "threshold", self.threshold, "from 0 to below 1", lambda t: 0 <= t < 1
        )
        arguments.keep(self, threshold=share)

    def of(self, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
        return error.sign() * (error.abs() > self.threshold * _largest(error))


@dataclass(frozen=True)
class Quantized(Signal):
    """Sends e rounded to 2^bits - 1 levels between minus and plus the largest |e| of its row."""

    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.keep(self, bits=arguments.integer("bits", self.bits, 2, 16))

    def of(self, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
        levels, largest = 2 ** (self.bits - 1) - 1, _largest(error)
        scaled: Tensor = error / largest.where(largest > 0, 1) * levels
        return scaled.round().div(levels)


@dataclass(frozen=True)
class Target(Signal):
    """Sends minus the target: direct random target projection, DRTP (arXiv 1909.01311).

    -onehot is the part of e = softmax - onehot that is known before the forward pass; B is random,
    so that its sign is of no account to the hidden layers alone.
    """

    needs_error: ClassVar[bool] = False
    needs_target: ClassVar[bool] = True

    def of(self, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
        assert target is not None  # as it `needs_target`
        return -target


@dataclass(frozen=True)
class Function(Signal):
    """Sends any function of (output, target, error), each [M, C] in float32 or float64.

    Args:
        function: returns [M, columns]; the target is None where none was given. Not differentiated.
        width: the columns that it returns, those of the error if None.
    """

    function: Callable[[Tensor, Tensor | None, Tensor], Tensor] | None = None
    width: int | None = None
    needs_output: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        arguments.function("function", self.function)
        arguments.keep(self, width=arguments.integer("width", self.width, optional=True))

    def of(self, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
        assert self.function is not None and output is not None  # checked, and needed
        made = self.function(output, target, error)
        expected = (len(error), self.columns(error.shape[1]))
        if not isinstance(made, Tensor):
            raise TypeError(f"a signal's function must return a tensor, got {type(made).__name__}")
        if made.shape != expected:
            raise ValueError(
                f"a signal's function must return shape {expected}, got {tuple(made.shape)}"
            )
        return made.to(error)

    def columns(self, classes: int) -> int:
        return classes if self.width is None else self.width


SIGNALS: dict[str, Signal] = {
    "error": Error(),
    "sign": Sign(),
    "ternary": Ternary(),
    "quantized": Quantized(),
    "target": Target(),
}


def make(signal: object) -> Signal:
    """Returns a `Signal` as it is, that of a name of `SIGNALS`, or of a callable its `Function`.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything else.
    """
    if isinstance(signal, Signal):
        return signal
    if isinstance(signal, str):
        if signal not in SIGNALS:  # asked in every step
            raise arguments.wrong_value("signal", f"one of {arguments.listed(SIGNALS)}", signal)
        return SIGNALS[signal]
    arguments.function("signal", signal, "a name, a Signal or callable")
    function: Any = signal
    return Function(function=function)


def made(signal: Signal, error: Tensor, output: Tensor | None, target: Tensor | None) -> Tensor:
    """Returns what is projected, [M, columns], for an error e [M, C]."""
    if isinstance(signal, Error):
        return error
    e = _wide(error)
    rows = signal.of(e, None if output is None else _wide(output), target)
    if signal.centred:
        rows = rows - rows.mean(1, keepdim=True)
    if signal.raw:
        return rows / max(len(e), 1)
    length = rows.norm(dim=1, keepdim=True)
    factor: Tensor = e.norm(dim=1, keepdim=True) / length.where(length > 0, 1)
    return rows * factor


def given(target: Tensor | None, output: Tensor, reader: str) -> Tensor:
    """Returns the target that `reader` needs as [M, C], of an output [*rows, C]: class indices
    [*rows] as their one-hot rows.

    Raises:
        RuntimeError: where none was set.
        TypeError, ValueError: for one that is neither these nor of the output's shape.
    """
    if target is None:
        raise RuntimeError(
            f"{reader} needs the target: set the target of the DFA (model.target = y) before each "
            "forward pass"
        )
    arguments.instance("target", target, Tensor, "a tensor")
    classes = output.shape[-1]
    if target.shape == output.shape:
        return _wide(target.detach()).reshape(-1, classes)
    if target.shape == output.shape[:-1] and not target.is_floating_point():
        # By comparison, as a class to be ignored is out of range, and an empty row.
        indices = torch.arange(classes, device=target.device)
        return (target.reshape(-1, 1) == indices).to(_wide(output).dtype)
    raise ValueError(
        f"target must hold class indices of shape {tuple(output.shape[:-1])} or have the output's "
        f"shape {tuple(output.shape)}, got {target.dtype} of shape {tuple(target.shape)}"
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _largest(error: Tensor) -> Tensor:
    """Returns |e| of each row's largest entry, [M, 1]."""
    return error.abs().amax(1, keepdim=True) if error.shape[1] else error.new_zeros(len(error), 1)
