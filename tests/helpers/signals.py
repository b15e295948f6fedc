"""What is projected in place of the error, by formulas of its own, and the matrices of a rule."""

import hashlib

import torch
import torch.nn.functional as F

from fastdfa import signals

from .formulas import mask, standard_deviation, unit_feedback


def ternary(e, share):
    largest = e.abs().max(1, keepdim=True).values
    return torch.where(e.abs() > share * largest, e.sign(), 0.0)


def quantized(e, bits):
    largest, levels = e.abs().max(1, keepdim=True).values, 2 ** (bits - 1) - 1
    return torch.where(largest > 0, torch.round(e / largest * levels) / levels, 0.0)


def centred(rows):
    return rows - rows.sum(1, keepdim=True) / rows.shape[1]


def product(output, target, error):
    """A function of all three, with as many columns."""
    return output * error + (0 if target is None else target)


def two_columns(output, target, error):
    return torch.stack((error.sum(1), output[:, 0]), 1)


# By the name of a signal: the signal, and its formula from e, y and the one-hot target.
CASES = {
    "error": ("error", lambda e, y, t: e),
    "sign": ("sign", lambda e, y, t: torch.sign(e)),
    "centred": (signals.Sign(centred=True), lambda e, y, t: centred(torch.sign(e))),
    "ternary": ("ternary", lambda e, y, t: ternary(e, 0.5)),
    "ternary 0.1": (
        signals.Ternary(threshold=0.1, centred=True),
        lambda e, y, t: centred(ternary(e, 0.1)),
    ),
    "ternary 0": (signals.Ternary(threshold=0), lambda e, y, t: torch.sign(e)),
    "quantized": ("quantized", lambda e, y, t: quantized(e, 8)),
    "two bits": (signals.Quantized(bits=2), lambda e, y, t: quantized(e, 2)),
    "target": ("target", lambda e, y, t: -t),
    "function": (product, lambda e, y, t: y * e + t),
    "two columns": (
        signals.Function(function=two_columns, width=2),
        lambda e, y, t: torch.stack((e.sum(1), y[:, 0]), 1),
    ),
}


def as_long_as(e, s):
    length = s.norm(dim=1, keepdim=True)
    return torch.where(length == 0, 0.0, s * e.norm(dim=1, keepdim=True) / length)


def sent(name, e, y, raw, target):
    """By the formula: e and y are [M, C], the target is of class indices [M]."""
    if name == "error":
        return e
    made = CASES[name][1](e, y.detach(), F.one_hot(target, e.shape[1]).double())
    return made / len(e) if raw else as_long_as(e, made)


def stream_of(name):
    """The stream of a point whose B is its own: the hash of its name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def matrix(rule, name, classes, features, widest):
    """The scaled B_l [C, n_l] of a point, Q P_l where it is of low rank: a function of the rule."""
    stream, rows = 0 if rule.shared else stream_of(name), rule.rank or classes
    B = unit_feedback(rule.seed, rows, features, rule.distribution, stream)
    if rule.density < 1:
        B = B * mask(rule.seed, rows, features, rule.density, stream) / rule.density**0.5
    if rule.rank is not None:
        low = stream_of("Q of B = Q P")
        Q = unit_feedback(rule.seed, classes, rule.rank, rule.distribution, low)
        B = Q @ B / rule.rank**0.5
    return standard_deviation(rule.scale, classes, features, widest) * B
