"""Holds activations whose backward is not their derivative: `Surrogate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import arguments
from ..ops.typed import Function

Elementwise = Callable[[Tensor], Tensor]


class Surrogate(nn.Module):
    """Applies an activation f whose gate is any function g of the pre-activation.

    Forward gives h = f(a); backward multiplies what arrives by g(a), in the place of f'(a):

        d_l = (e B_l) * g(a_l)

    That is augmented direct feedback alignment (Nakajima et al. 2022, arXiv 2204.13991): g need
    not be the derivative of f, and f need not have one. It may be a sign, a spike or a physical
    system that is only measured. Outside a `DFA` the same module is backprop with a surrogate
    gradient, as of spiking networks (Neftci et al. 2019, arXiv 1901.09948).

        fastdfa.Linear(784, 1024, activation=fastdfa.Surrogate(torch.sign, hard_tanh_derivative))

    The module can be pickled where f and g can: functions of a module and `functools.partial` can,
    a lambda cannot.

    Args:
        f: the activation; takes a tensor and returns one of the same shape. It runs without
            autograd. Its result is cast to the dtype of a, so that `lambda a: a > 0` is a step.
        g: the gate; likewise. It is called in the forward pass, where a requires grad, and its
            result is what is kept for backward (one byte an element where it is a bool tensor).

    Shapes: [*] -> [*].

    Raises:
        TypeError: for an f or g that cannot be called, or, in the forward pass, that returns no
            tensor.
        ValueError: in the forward pass, where its result has another shape than a.
    """

    def __init__(self, f: Elementwise, g: Elementwise) -> None:
        super().__init__()
        arguments.function("f", f)
        arguments.function("g", g)
        self.f = f
        self.g = g

    def forward(self, input: Tensor) -> Tensor:
        node = _Surrogate if forward_ad._current_level < 0 else _InForwardMode
        h: Tensor = node.apply(input, self.f, self.g)
        return h

    def extra_repr(self) -> str:
        return f"f={_name(self.f)}, g={_name(self.g)}"


class _Surrogate(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, f: Elementwise, g: Elementwise) -> Tensor:
        h = _result("f", f, a).to(a.dtype)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_result("g", g, a))
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (gate,) = ctx.saved_tensors
        return (grad * gate).to(grad.dtype), None, None


class _InForwardMode(_Surrogate):
    """Gives the forward-mode derivative too; apart, as torch.compile takes no node that has one."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, f: Elementwise, g: Elementwise) -> Tensor:
        gate = _result("g", g, a)
        ctx.save_for_backward(gate)
        ctx.save_for_forward(gate)
        return _result("f", f, a).to(a.dtype)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        (gate,) = ctx.saved_tensors
        moved: Tensor = tangent * gate
        return moved.to(tangent.dtype)


def _result(name: str, function: Elementwise, a: Tensor) -> Tensor:
    result = function(a)
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must return a tensor, got {type(result).__name__}")
    if result.shape != a.shape:
        raise ValueError(
            f"{name} must return a tensor of its input's shape {tuple(a.shape)}, got "
            f"{tuple(result.shape)}"
        )
    return result


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
