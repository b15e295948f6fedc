"""Batch and layer norm by hand, and checks of the kernels by them, on the device of their input."""

from typing import NamedTuple

import torch

from .formulas import ACTIVATIONS
from .kernels import DTYPES, KINDS, wide
from .networks import assert_close, randn

EPS, MOMENTUM = 1e-3, 0.3


class Formulas(NamedTuple):
    """A norm by hand in float64: of columns (dim 0) or of rows (dim 1)."""

    normalised: object  # (a - mean) * rstd
    mean: object
    variance: object
    dim: int

    @classmethod
    def of(cls, a, dim, mean=None, variance=None):
        a = a.double()
        if mean is None:
            mean = a.sum(dim) / a.shape[dim]
            variance = (a - mean.unsqueeze(dim)).square().sum(dim) / a.shape[dim]
        rstd = 1 / (variance.double() + EPS).sqrt()
        normalised = (a - mean.double().unsqueeze(dim)) * rstd.unsqueeze(dim)
        return cls(normalised, mean.double(), variance.double(), dim)

    @property
    def rstd(self):
        return 1 / (self.variance + EPS).sqrt()

    def output(self, weight, bias):
        out = self.normalised
        out = out if weight is None else out * weight.double()
        return out if bias is None else out + bias.double()

    def backward(self, delta, weight, training=True):
        """The gradients of a and of the weight."""
        delta = delta.double()
        g = delta if weight is None else delta * weight.double()
        if training:
            mean, slope = (x.mean(self.dim, keepdim=True) for x in (g, g * self.normalised))
            g = g - mean - self.normalised * slope
        return g * self.rstd.unsqueeze(self.dim), (delta * self.normalised).sum(0)


def vectors(a, dtype, affine=True):
    weight, bias = (randn(a.shape[1], seed=i, dtype=dtype).to(a.device) for i in (3, 4))
    return (weight, bias) if affine else (None, None)


def same_sum(total, rows):
    """Whether it is the sum of these rows, of which most may cancel."""
    tolerance = 1e-12 if total.dtype == torch.float64 else 3e-6
    distance = (total.double() - rows.sum(0)).norm()
    assert distance <= tolerance * rows.abs().sum(0).norm() + 1e-300


def close(actual, right, dtype):
    assert actual.dtype == dtype
    assert_close(actual, right, DTYPES[dtype])


def check_batch_norm(of, a, dtype, affine=True, training=True, name="relu", of_vectors=None):
    """Forward and backward of the functions `of`."""
    n, of_vectors = a.shape[1], of_vectors or dtype
    weight, bias = vectors(a, of_vectors, affine)
    running = [randn(n, seed=i, dtype=of_vectors).abs().to(a.device) + 0.5 for i in (5, 6)]
    before = [x.to(torch.float64, copy=True) for x in running]
    right = Formulas.of(a, 0, *([] if training else before))
    arguments = weight, bias, *running, training, MOMENTUM, EPS
    h, mean, rstd = of.batch_norm(a, *arguments, *KINDS[name][:2])
    close(h, ACTIVATIONS[name].f(right.output(weight, bias)), dtype)
    close(mean, right.mean, wide(dtype)), close(rstd, right.rstd, wide(dtype))
    if training:
        moved = right.mean, right.variance * len(a) / (len(a) - 1)
        before = [(1 - MOMENTUM) * x + MOMENTUM * y for x, y in zip(before, moved, strict=True)]
    for actual, wanted in zip(running, before, strict=True):
        close(actual, wanted, of_vectors)
    # A gradient of pairs of rows is a small difference of large numbers.
    if len(a) > 2 or not training:
        delta = randn(*a.shape, seed=7, dtype=dtype).to(a.device)
        a_grad, weight_grad = right.backward(delta, weight, training)
        delta_sums = delta.sum(0, dtype=wide(dtype))
        found = of.batch_norm_backward_(delta, delta_sums, a, mean, rstd, weight, training)
        close(delta, a_grad, dtype), close(found[0], weight_grad, wide(dtype))
        same_sum(found[1], a_grad)


def check_layer_norm(of, a, dtype, affine=True, name="relu", of_vectors=None):
    """The same of a layer norm."""
    weight, bias = vectors(a, of_vectors or dtype, affine)
    right = Formulas.of(a, 1)
    h, mean, rstd = of.layer_norm(a, weight, bias, EPS, *KINDS[name][:2])
    close(h, ACTIVATIONS[name].f(right.output(weight, bias)), dtype)
    close(mean, right.mean, wide(dtype)), close(rstd, right.rstd, wide(dtype))
    if a.shape[1] > 2:
        delta = randn(*a.shape, seed=7, dtype=dtype).to(a.device)
        a_grad, weight_grad = right.backward(delta, weight)
        found = of.layer_norm_backward_(delta, a, mean, rstd, weight)
        close(delta, a_grad, dtype), close(found[0], weight_grad, wide(dtype))
        same_sum(found[1], a_grad)
