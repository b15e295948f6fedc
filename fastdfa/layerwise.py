"""Sends feedback down layer by layer, beside which DFA is compared: `LayerFeedback`."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import arguments
from .engine import sites
from .engine.layers import CutLayer
from .engine.root import Root, exporting, names_in
from .engine.tape import state
from .feedback.rule import Feedback, Source, hash_of, ready_on_every_stream, scale_of
from .nn.converted import Conversion, plain_layers
from .ops import capture
from .ops.reference import accumulation_dtype
from .ops.tracing import traced, transformed
from .ops.typed import constant

RULES = ("fa", "usf", "frsf", "brsf", "backprop")

# The standard deviation of the entries of B, from the fan-in and the fan-out of the weight.
SCALES: dict[str, Callable[[int, int], float]] = {
    # Xavier-uniform, bound sqrt(6 / (fan_in + fan_out)): BioTorch's default.
    "xavier": lambda fan_in, fan_out: (2 / (fan_in + fan_out)) ** 0.5,
    # As torch initialises a weight, bound 1 / sqrt(fan_in): BioTorch's other choice.
    "torch": lambda fan_in, fan_out: (3 * fan_in) ** -0.5,
}


class RuleWeight(NamedTuple):
    """Holds what the input gradient of a layer reads in the place of its weight."""

    rule: str
    scale: float
    matrix: Tensor | None  # B of "fa", |B| of "frsf", of the weight's shape; else None

    def of(self, weight: Tensor) -> Tensor:
        """Returns B, of the shape and dtype of the weight; in backward, so no step keeps it."""
        if self.matrix is not None:
            fixed = self.matrix
            return fixed.to(weight.dtype) if self.rule == "fa" else weight.sign().mul_(fixed)
        if self.rule == "usf":
            return weight.sign().mul_(self.scale)
        magnitude = torch.empty_like(weight).uniform_(0, 3**0.5 * self.scale)
        return magnitude.mul_(weight.sign())


class LayerFeedback(Root):
    """Trains the network it wraps by feedback from layer to layer, each through a B of its own.

    As backprop, but the gradient that every fastdfa layer hands down to its input is made with a
    matrix B_l of the shape of its weight W_l, and not with W_l itself:

        d_{l-1} = (d_l B_l) * f'(a_{l-1}),    dW_l = d_l^T h_{l-1},    d_L = e

    So nothing is cut and no work is left out: a step costs what backprop's does. The rules, with M
    drawn from U(-s sqrt(3), s sqrt(3)), of standard deviation s:

    - "fa": B_l = M, fixed. Feedback alignment (Lillicrap et al. 2016, arXiv 1411.0247).
    - "usf": B_l = s sign(W_l). Uniform sign-concordant feedback (Liao et al. 2016, arXiv
      1510.05067), scaled as in Xiao et al. 2019 (arXiv 1811.03567).
    - "frsf": B_l = |M| * sign(W_l), M fixed.
    - "brsf": B_l = |M| * sign(W_l), M drawn anew in each backward pass of each layer.
    - "backprop": B_l = W_l.

    They and their scales are those of BioTorch (Sanfiz and Akrout 2021, arXiv 2108.13446), which
    also initialises the weights that way; here they stay torch's.

    Args:
        module: the network. Of it `Linear`, `Conv1d` and `Conv2d` of fastdfa follow the rule.
        rule: one of these names.
        scale: s, a number or the name of a choice: "xavier" sqrt(2 / (fan_in + fan_out)), "torch"
            1 / sqrt(3 fan_in); fan_in and fan_out as in torch.nn.init.
        seed: 0 to 2**63 - 1, of every fixed M; None draws one from torch's generator. "brsf" draws
            from torch's generator, as dropout does, so under DistributedDataParallel each process
            has its own.

    Buffers: `seed`, int64, as in `DFA`. A fixed M is a function of it and of the layer's name, and
        is never in a checkpoint.

    Warns:
        UserWarning: of torch's own linear and convolutional layers in it, which would hand down
            gradients by their weights.

    Raises:
        TypeError, ValueError: for arguments that are not so, or a root inside `module`.
    """

    made_again = (*Root.made_again, "_matrices", "_sites")
    settings = ("rule", "scale")
    passed_on = (*Root.passed_on, "rule", "scale", "backward_weight")
    conversion: Conversion  # of a root that `convert` has made
    _matrices: dict[tuple[Any, ...], Tensor]

    def __init__(
        self,
        module: nn.Module,
        rule: str = "fa",
        scale: float | str = "xavier",
        seed: int | None = None,
    ) -> None:
        arguments.choice("rule", rule, RULES)
        scale = scale_of(scale, SCALES)
        super().__init__(module, Feedback(seed=seed).seed)
        self.rule = rule
        self.scale = scale
        if rule != "backprop":
            _warn_of_plain_layers(module)
        self._reset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's own output; its backward is that of the rule.

        Raises:
            RuntimeError: inside another root.
        """
        if state.tape is not None or state.layer_rule is not None:
            raise RuntimeError(
                "a LayerFeedback was called inside another root: wrap the outermost only"
            )
        self.follow_modules()
        plain = self.rule == "backprop" or any(self is root for root in state.true_gradients)
        if plain or not torch.is_grad_enabled() or exporting():
            return self.network(*args, **kwargs)
        if transformed():
            raise RuntimeError(
                "a LayerFeedback was called inside a transform of torch.func, which it does not "
                "know: call backward(), or fastdfa.backprop(model) for true gradients"
            )
        state.layer_rule = self
        try:
            return self.network(*args, **kwargs)
        finally:
            state.layer_rule = None

    def feedback_matrix(self, name: str) -> Tensor:
        """Returns B_l of a layer, of the shape of its weight; of "brsf", one draw.

        Raises:
            KeyError: where no layer that follows the rule has this name.
        """
        arguments.instance("name", name, str, "the name of a layer")
        layers = {
            name: layer
            for layer, name in names_in(self.module).items()
            if isinstance(layer, CutLayer)
        }
        if name not in layers:
            raise KeyError(f"no layer {name!r} that follows the rule; there are {list(layers)}")
        weight = layers[name].weight.detach()
        if self.rule == "backprop":
            return weight.clone()
        return self.backward_weight(layers[name]).of(weight).clone()

    def backward_weight(self, layer: CutLayer) -> RuleWeight:
        """Returns what a layer reads in backward, for its call in a forward pass."""
        if layer not in self._names:
            self._find_names()
        matrix = None
        if self.rule in ("fa", "frsf"):
            matrix = self._matrix(self._names.get(layer, type(layer).__name__), layer.weight)
        return RuleWeight(self.rule, self._deviation(tuple(layer.weight.shape)), matrix)

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, scale={self.scale!r}"

    def _deviation(self, shape: tuple[int, ...]) -> float:
        """Returns the standard deviation s of M for a weight of this shape."""
        if not isinstance(self.scale, str):
            return float(self.scale)
        positions = math.prod(shape[2:])
        return SCALES[self.scale](max(shape[1] * positions, 1), max(shape[0] * positions, 1))

    def _matrix(self, name: str, weight: Tensor) -> Tensor:
        """Returns M of a layer, or its absolute value where that is what the rule reads."""
        like = (name, tuple(weight.shape), weight.dtype, weight.device)
        if traced():
            drawn: Tensor = torch.ops.fastdfa.drawn(weight, None, self._site(self.stamp, *like))
            return drawn
        return self._drawn(self.read_seed(), *like)

    @constant
    def _site(self, stamp: int, *like: Any) -> int:
        """Returns the number of what draws M in a compiled step."""
        this = weakref.ref(self)  # which keeps its sites

        def draw(seed: int) -> Tensor:
            root = this()
            assert root is not None  # as its sites live
            return root._drawn(seed, *like)

        return self._sites.number((stamp, *like), lambda: sites.Drawing(self, draw, *like[1:]))

    def _drawn(self, seed: int, name: str, *of_weight: Any) -> Tensor:
        key = (seed, self.stamp, name, *of_weight)
        if key not in self._matrices:
            capture.refuse(capture.MADE_BEFORE.format("make its B"))
            shape, dtype, device = of_weight
            self._matrices = {k: m for k, m in self._matrices.items() if k[:2] == key[:2]}
            dtype_drawn = accumulation_dtype(dtype)
            source = Source(seed, hash_of(name), "uniform", 1.0, dtype_drawn, device)
            matrix = source.matrix(shape[0], math.prod(shape[1:])).reshape(shape)
            matrix *= self._deviation(shape)
            self._matrices[key] = ready_on_every_stream(
                (matrix.abs() if self.rule == "frsf" else matrix).to(dtype)
            )
        return self._matrices[key]

    def _reset(self) -> None:
        super()._reset()
        self._matrices = {}
        self._sites = sites.Sites()


def _warn_of_plain_layers(module: nn.Module) -> None:
    plain = [name or "module" for name in plain_layers(module)]
    if plain:
        warnings.warn(
            f"{', '.join(map(repr, plain))}: no layer of fastdfa, so the gradient of its input is "
            "made with its weight, as in backprop. fastdfa.convert makes fastdfa's of torch's",
            stacklevel=3,
        )
