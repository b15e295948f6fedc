"""What the tests compare with: DFA written out by hand, and the feedback matrix in NumPy.

Nothing here uses autograd or the library, so a mistake there cannot hide here.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


class Activation(NamedTuple):
    """An activation f and its derivative, both as functions of the pre-activation in float64."""

    argument: object  # makes what `activation=` is given: a name or a module
    f: object
    derivative: object


def _normal_cdf(a):
    return 0.5 * (1 + torch.erf(a / math.sqrt(2)))


def _normal_pdf(a):
    return torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


def _gelu_tanh_inner(a):
    return torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))


def _gelu_tanh_derivative(a):
    t = _gelu_tanh_inner(a)
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * math.sqrt(2 / math.pi) * (
        1 + 3 * 0.044715 * a * a
    )


def _leaky_relu(slope):
    return (
        lambda a: torch.where(a > 0, a, slope * a),
        lambda a: torch.where(a > 0, torch.ones_like(a), slope),
    )


def _elu(alpha):
    return (
        lambda a: torch.where(a > 0, a, alpha * (torch.exp(a) - 1)),
        lambda a: torch.where(a > 0, torch.ones_like(a), alpha * torch.exp(a)),
    )


def _softplus(beta):
    return (
        # Linear from 20 on, as torch's.
        lambda a: torch.where(beta * a > 20, a, torch.log1p(torch.exp(beta * a)) / beta),
        lambda a: 1 / (1 + torch.exp(-beta * a)),
    )


def _silu_derivative(a):
    s = 1 / (1 + torch.exp(-a))
    return s * (1 + a * (1 - s))


ACTIVATIONS = {
    "none": Activation(lambda: None, lambda a: a, torch.ones_like),
    "relu": Activation(lambda: "relu", lambda a: a.clamp(min=0), lambda a: (a > 0).to(a)),
    "leaky_relu": Activation(lambda: "leaky_relu", *_leaky_relu(0.01)),
    "tanh": Activation(lambda: "tanh", torch.tanh, lambda a: 1 - torch.tanh(a) ** 2),
    "sigmoid": Activation(
        lambda: "sigmoid",
        lambda a: 1 / (1 + torch.exp(-a)),
        lambda a: torch.exp(-a) / (1 + torch.exp(-a)) ** 2,
    ),
    "elu": Activation(lambda: "elu", *_elu(1.0)),
    "softplus": Activation(lambda: "softplus", *_softplus(1.0)),
    "gelu": Activation(
        lambda: "gelu",
        lambda a: a * _normal_cdf(a),
        lambda a: _normal_cdf(a) + a * _normal_pdf(a),
    ),
    "silu": Activation(lambda: "silu", lambda a: a / (1 + torch.exp(-a)), _silu_derivative),
    # Modules whose parameters the kernels take.
    "GELU(tanh)": Activation(
        lambda: nn.GELU(approximate="tanh"),
        lambda a: 0.5 * a * (1 + _gelu_tanh_inner(a)),
        _gelu_tanh_derivative,
    ),
    "LeakyReLU(0.2)": Activation(lambda: nn.LeakyReLU(0.2), *_leaky_relu(0.2)),
    "ELU(0.7)": Activation(lambda: nn.ELU(0.7), *_elu(0.7)),
    "Softplus(2)": Activation(lambda: nn.Softplus(2.0), *_softplus(2.0)),
    "ReLU(inplace)": Activation(
        lambda: nn.ReLU(inplace=True), lambda a: a.clamp(min=0), lambda a: (a > 0).to(a)
    ),
    # Modules that look like those of the kernels and are not: f' cannot come from the output.
    "LeakyReLU(-0.5)": Activation(lambda: nn.LeakyReLU(-0.5), *_leaky_relu(-0.5)),
    "ELU(-0.5)": Activation(lambda: nn.ELU(-0.5), *_elu(-0.5)),
    # Modules that no kernel knows.
    "Softsign": Activation(
        nn.Softsign, lambda a: a / (1 + a.abs()), lambda a: 1 / (1 + a.abs()) ** 2
    ),
    "Tanhshrink": Activation(
        nn.Tanhshrink, lambda a: a - torch.tanh(a), lambda a: torch.tanh(a) ** 2
    ),
}


class Layer(NamedTuple):
    weight: torch.Tensor  # [n_out, n_in]
    bias: torch.Tensor | None  # [n_out]
    activation: str = "none"  # a key of ACTIVATIONS


def mlp_forward(layers, x):
    """Pre-activations and activations [M, n_l] of every layer, in float64."""
    h, pre, post = x.detach().double().reshape(-1, x.shape[-1]), [], []
    for layer in layers:
        a = h @ layer.weight.detach().double().T
        if layer.bias is not None:
            a = a + layer.bias.detach().double()
        h = ACTIVATIONS[layer.activation].f(a)
        pre.append(a)
        post.append(h)
    return pre, post


def mlp_gradients(layers, x, error, feedback, reduction="mean", sent=None):
    """[(weight gradient, bias gradient)] of every layer of an MLP, by the formulas of DFA.

    error: dL/dy [*rows, C], feedback: the scaled B_l [C, n_l] of every layer but the last; sent:
    what is projected in place of the error, [M, C].
    """
    pre, post = mlp_forward(layers, x)
    inputs = [x.detach().double().reshape(-1, x.shape[-1]), *post[:-1]]
    e = error.detach().double().reshape(-1, error.shape[-1])
    factor = e.shape[0] if reduction == "sum" else 1
    sent = e if sent is None else sent
    signals = [factor * (sent @ B.detach().double()) for B in feedback] + [e]
    gradients = []
    for layer, a, h, signal in zip(layers, pre, inputs, signals, strict=True):
        delta = signal * ACTIVATIONS[layer.activation].derivative(a)
        gradients.append((delta.T @ h, None if layer.bias is None else delta.sum(0)))
    return gradients


def cross_entropy_error(y, target):
    """dL/dy of the mean cross entropy: (softmax(y) - onehot) / M, in float64."""
    p = torch.softmax(y.detach().double(), -1)
    p[torch.arange(len(target)), target] -= 1
    return p / len(target)


# The feedback matrix -----------------------------------------------------------------------

_WORD = np.uint64(0xFFFFFFFF)


def philox4x32(counter, key):
    """Philox4x32-10 of Salmon et al. (SC 2011). counter: four arrays, key: two integers."""
    x = [np.asarray(c, dtype=np.uint64) for c in counter]
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * x[0]
        p1 = np.uint64(0xCD9E8D57) * x[2]
        x = [
            (p1 >> np.uint64(32)) ^ x[1] ^ np.uint64(k0),
            p1 & _WORD,
            (p0 >> np.uint64(32)) ^ x[3] ^ np.uint64(k1),
            p0 & _WORD,
        ]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x


def unit_feedback(seed, rows, columns, distribution, stream=0):
    """B [C, n] of mean 0 and variance 1 in float64: a function of seed, stream, row and column."""
    words = -(-columns // 4)
    j, c = np.meshgrid(np.arange(words), np.arange(rows))
    zero = np.zeros_like(j)
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    w = np.stack(philox4x32((j, c, zero + stream, zero), key), -1)  # [C, words, 4]
    u = ((w >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    if distribution == "rademacher":
        b = np.where(w >> np.uint64(31), -1.0, 1.0)
    elif distribution == "uniform":
        b = math.sqrt(3) * (2 * u - 1)
    else:
        r = np.sqrt(-2 * np.log(u[..., 0::2]))
        t = 2 * math.pi * u[..., 1::2]
        b = np.stack((r * np.cos(t), r * np.sin(t)), -1)
    return torch.from_numpy(b.reshape(rows, 4 * words)[:, :columns].copy())


def mask(seed, rows, columns, density, stream=0):
    """Which entries of a sparse B are kept: U(0, 1) of the stream beside its own, < density."""
    u = unit_feedback(seed, rows, columns, "uniform", stream ^ 2**31) / math.sqrt(12) + 0.5
    return (u < density).double()


def standard_deviation(scale, c, n, n_max):
    """Of the entries of B_l [c, n], where the widest point has n_max features."""
    if not isinstance(scale, str):
        return float(scale)
    return {
        "launay2019": 1 / math.sqrt(c * n),  # randn(C, n_max)/sqrt(n_max C) * sqrt(n_max/n_l)
        "tinydfa": 1 / math.sqrt(3 * n_max),  # U[-1,1)/sqrt(n_max); U[-1,1) has variance 1/3
        "nokland2016": 1 / math.sqrt(3 * n),  # U(+-1/sqrt(n_l))
        "drtp": math.sqrt(6 / n) / math.sqrt(3),  # Kaiming-uniform, bound sqrt(6/n_l)
        "biotorch": math.sqrt(6 / (c + n)) / math.sqrt(3),  # Xavier-uniform, bound sqrt(6/(C+n_l))
        "unit": 1.0,
    }[scale]


SCALES = ("launay2019", "tinydfa", "nokland2016", "drtp", "biotorch", "unit")
DISTRIBUTIONS = ("normal", "uniform", "rademacher")
