"""Checks the arguments of public names: an error says which, what was expected, and what came.

What counts as a number is what Python counts so, of numpy and in a tensor of one entry too, but no
bool. A function that checks a number returns it as an int or a float of Python.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

_LONGEST = 80  # characters of what came
_MOST = 20  # names of what could have come
_LARGEST_SEED = 2**63 - 1


def wrong_type(name: str, expected: str, value: object) -> TypeError:
    """Returns the error for an argument of another kind than expected."""
    kind, text = type(value).__name__, shown(value)
    told = kind if value is None else text if text.startswith(kind) else f"{kind} {text}"
    return TypeError(f"{name} must be {expected}, got {told}")


def wrong_value(name: str, expected: str, value: object) -> ValueError:
    """Returns the error for an argument of the right kind that is out of range."""
    return ValueError(f"{name} must be {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """Returns what a value looks like, in one short line; of a tensor, whose entries are many, its
    shape and dtype."""
    try:
        if isinstance(value, Tensor):
            return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
        text = " ".join(repr(value).split())
    except Exception:  # an int of 4300 digits has no repr, a nested tensor no shape
        return f"{type(value).__name__} that cannot be shown"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def listed(names: Iterable[object]) -> str:
    """Returns the first of some names, as an error shows what there is."""
    told = [repr(name) for name in names]
    return ", ".join([*told[:_MOST], *["..."][: len(told) > _MOST]])


def one_of(names: Collection[str], what: str) -> str:
    """Returns what is expected of a name, where there may be nothing to name."""
    return f"one of {listed(names)}" if names else f"one of the {what}, of which there are none"


def flag(name: str, value: object, optional: bool = False) -> None:
    """Raises unless a value is a bool; or None, where it is optional."""
    if not isinstance(value, bool) and not (optional and value is None):
        raise wrong_type(name, f"a bool{_or_none(optional)}", value)


def integer(
    name: str,
    value: object,
    low: int | None = 1,
    high: int | None = None,
    optional: bool = False,
) -> Any:
    """Returns a value as an int, or None where it is optional; raises unless it is in range."""
    if optional and value is None:
        return None
    try:
        number = index(value)  # type: ignore[arg-type]  # which it tells
    except (TypeError, ValueError, RuntimeError):  # of Python, of torch: several entries, on meta
        number = None
    if number is None or _is_bool(value):
        raise wrong_type(name, f"an int{_or_none(optional)}", value)
    if (low is not None and number < low) or (high is not None and number > high):
        expected = f"at least {low}" if low != 1 else "a positive int"
        if high is not None:
            most = "2**63 - 1" if high == _LARGEST_SEED else high
            expected = f"from {low} to {most}"
        raise wrong_value(name, f"{expected}{_or_none(optional)}", value)
    return number


def seed(name: str, value: object, optional: bool = False) -> Any:
    """Returns a seed as an int, or None where it is optional."""
    return integer(name, value, 0, _LARGEST_SEED, optional)


def number(
    name: str,
    value: object,
    expected: str,
    fits: Callable[[float], bool],
    *,
    kind: str = "a number",
    optional: bool = False,
) -> Any:
    """Returns a value as a float, or None where it is optional; raises unless it is finite and
    fits to what is expected."""
    if optional and value is None:
        return None
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if _is_bool(value) or not (one or isinstance(value, numbers.Real)):
        raise wrong_type(name, f"{kind}{_or_none(optional)}", value)
    try:
        made = float(value)  # type: ignore[arg-type]  # as `one` tells
    except (OverflowError, ValueError, RuntimeError):  # of a huge int, a tensor on meta
        made = math.nan
    if not (math.isfinite(made) and fits(made)):
        raise wrong_value(name, f"{expected}{_or_none(optional)}", value)
    return made


def choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises unless a value is one of some names."""
    choices = list(choices)
    if not isinstance(value, str):
        raise wrong_type(name, f"one of {listed(choices)}", value)
    if value not in choices:
        raise wrong_value(name, f"one of {listed(choices)}", value)


def function(name: str, value: object, expected: str = "callable") -> None:
    """Raises unless a value can be called, and is no class: calling that would make an object."""
    if isinstance(value, type):
        raise wrong_type(name, f"{expected}, and no class", value)
    if not callable(value):
        raise wrong_type(name, expected, value)


def instance(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises unless a value is an object of these classes."""
    if not isinstance(value, kinds):
        raise wrong_type(name, expected, value)


def module(name: str, value: object) -> None:
    """Raises unless a value is a module."""
    instance(name, value, nn.Module, "an nn.Module")


def memory(device: Any, dtype: object) -> None:
    """Raises unless a device and a dtype are what torch makes a parameter of; each may be None."""
    if dtype is not None:
        instance("dtype", dtype, torch.dtype, "a torch.dtype or None")
        real: Any = dtype
        if not (real.is_floating_point or real.is_complex):
            raise wrong_value("dtype", "a floating torch.dtype or None", dtype)
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise wrong_value("device", "a torch.device, its name or None", device) from None


def matrix(name: str, value: object, expected: str) -> None:
    """Raises unless a value is a dense floating matrix whose entries are finite."""
    if not isinstance(value, Tensor):
        raise wrong_type(name, "a tensor", value)
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout)
        raise ValueError(f"{name} must be a dense {expected}, got one that is {layout}")
    if value.dim() != 2 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be a floating {expected}, got {value.dtype} of shape {tuple(value.shape)}"
        )
    if not value.is_meta and not value.double().isfinite().all():  # as no float8 is asked
        raise ValueError(f"{name} must be a {expected} of finite entries, got NaN or infinity")


def keep(of: object, **values: object) -> None:
    """Writes what checks have returned into a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(of, name, value)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)


def _or_none(optional: bool) -> str:
    return " or None" if optional else ""
