"""From a network of torch's own modules to one that trains by feedback: `convert`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from types import NoneType
from typing import Any, NamedTuple

from torch import Tensor, jit, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import activations
from .dfa import DFA
from .engine.root import Root
from .engine.tape import state
from .feedback.rule import Feedback
from .layerwise import RULES, LayerFeedback
from .nn.conv import Conv1d, Conv2d
from .nn.linear import FeedbackPoint, Linear

Selector = type | str

_LAYERS: dict[type, type] = {nn.Linear: Linear, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d}
_PLAIN = {ours: torchs for torchs, ours in _LAYERS.items()}
_CUTTING = (*_LAYERS.values(), FeedbackPoint)
_LAYER_LIKE = (nn.Linear, nn.modules.conv._ConvNd)
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, NonDynamicallyQuantizableLinear)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# Torch's blocks that have skip connections round their layers.
_RESIDUAL = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# What a layer does in a network of each kind.
_CUT, _FED_BACK = "cut at its input", "hands down its gradient by the rule"


def convert(
    model: nn.Module,
    feedback: Feedback | str | None = None,
    output: str | None = None,
    blocks: Selector | Sequence[Selector] | None = None,
    *,
    rule: str = "dfa",
    point: FeedbackPoint | None = None,
    fold: bool = True,
    allow_bypass: bool = False,
    allow_tied: bool = False,
) -> Root:
    """Makes a network of torch's own modules train by direct feedback alignment, or another rule.

    Without `blocks`, every `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` becomes fastdfa's, which cuts
    the network at its input. With `blocks`, the network is cut behind each block and nothing else
    is changed: for residual networks and transformers, where a cut beside a skip connection would
    leak. The model itself is changed, and shares everything with the result: a layer changes its
    class alone, so parameters, `state_dict` keys, names, hooks, mode and every reference to it
    stay. The forward numbers stay too. `convert(...).conversion` tells what was changed, when
    printed, and its `undo()` takes it back.

    Subclasses of these layers (adapters, parametrized or quantized layers, `out_proj` of torch's
    attention, which is never called) are left alone: they train by local backprop.

    Args:
        model: the network, before DistributedDataParallel wraps it, and before fully_shard takes
            single layers of it, which would then be left alone.
        feedback, output, allow_bypass: as in `DFA`.
        rule: "dfa" gives a `DFA`; "fa", "usf", "frsf", "brsf" and "backprop" give a `LayerFeedback`
            of that rule, every layer of which follows it; "shallow" one of "backprop" in which the
            last layer alone requires grad: what a rule must beat to have taught the others
            anything. Of the arguments for where and how a `DFA` feeds back, they take none.
        blocks: which modules have a feedback point behind them, of the same name: classes, or
            patterns of qualified names, in which `*` stays within one part ("encoder.layers.*").
            Of a tuple or list that a block returns, the first tensor is the point.
        point: with `blocks`, a `FeedbackPoint` that says how they are fed (rows, features).
        fold: an activation that follows a layer in an `nn.Sequential` becomes the layer's own,
            for the fused path, and leaves an `nn.Identity` in its place. False leaves it: for a
            model that reads its `nn.Sequential` piece by piece, between the two.
        allow_tied: accept parameters that modules on two sides of a cut share: their gradient is
            the sum of what each side gives.

    Warns:
        UserWarning: of a linear layer of n units between others, where its input is wider and so
            is the error, C > n + 1. Behind such a bottleneck the true gradients have rank n, the
            feedback rank C - 1 (of a softmax), so that the layers before it align in part only.

    Raises:
        TypeError, ValueError: for arguments that are not so; where there is nothing to convert;
            for tied parameters, lazy layers that have not run, torch's transformer layers without
            `blocks`, and modules that it cannot see into: scripted, or wrapped for several
            devices. The model is then as it was.
        RuntimeError: in the first forward pass, where a path leads round a cut, as in `DFA`.
    """
    _check_model(model)
    if rule != "dfa":
        no_others = {"feedback": feedback, "output": output, "blocks": blocks, "point": point,
                     "allow_bypass": allow_bypass or None}  # fmt: skip
        return _convert_by_layer(model, rule, fold, no_others)
    if blocks is None:
        _check_layers(model, point, allow_bypass)
        conversion = _plan_layers(model, output, fold)
    else:
        conversion = _plan_blocks(model, blocks, point)
    if not allow_tied:
        _check_tied(model, conversion.blocks)
    # The last that can fail, and before the blocks' hooks: a block that is tapped is not cut.
    root = DFA(model, feedback, output, allow_bypass)
    _warn_of_bottlenecks(conversion.layers, output)
    conversion._apply()
    root.conversion = conversion
    return root


def _convert_by_layer(
    model: nn.Module, rule: str, fold: bool, no_others: dict[str, Any]
) -> LayerFeedback:
    """`no_others`: arguments that only a `DFA` takes, None where not given."""
    if rule not in (*RULES, "shallow"):
        known = ", ".join(map(repr, ("dfa", *RULES, "shallow")))
        raise ValueError(f"rule must be one of {known}, got {rule!r}")
    for name, value in no_others.items():
        if value is not None:
            raise ValueError(f"{name} is of rule='dfa' alone, got it with rule={rule!r}")
    _check_visible(model)
    conversion = _plan_layers(model, None, fold)
    conversion.role = _FED_BACK
    conversion._apply()
    root = LayerFeedback(model, "backprop" if rule == "shallow" else rule)
    if rule == "shallow":
        conversion.freeze_all_but_the_last()
    root.conversion = conversion
    return root


class Fold(NamedTuple):
    """An activation of an `nn.Sequential` that becomes that of the layer before it."""

    name: str
    parent: nn.Sequential
    key: str
    activation: nn.Module


@dataclass(eq=False, repr=False)
class Conversion:
    """What `convert` changed; prints as a table.

    Attributes:
        model: the network that was converted.
        layers: by name, the layers that are cut at their input now.
        folds: by the name of such a layer, the activation that it took over.
        kept: by name, the class of a layer that is as it was, and why.
        blocks: by name, the modules that have a feedback point behind them now.
        point: how these are fed.
        role: what the layers do in the network.
        frozen: parameters that required grad and do no longer, for rule="shallow".
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    folds: dict[str, Fold] = field(default_factory=dict)
    kept: dict[str, tuple[type, str]] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    point: FeedbackPoint | None = None
    role: str = _CUT
    frozen: list[nn.Parameter] = field(default_factory=list)

    def undo(self) -> nn.Module:
        """Makes the model what it was, with the parameters that it has now, and returns it.

        Raises:
            RuntimeError: if the class of a layer was changed since, or this was called before.
        """
        for name, layer in self.layers.items():
            if type(layer) not in _PLAIN:
                raise RuntimeError(f"{name!r} is no longer as convert made it: {type(layer)}")
        for name, layer in self.layers.items():
            layer.__class__ = _PLAIN[type(layer)]
            del layer.activation
            if name in self.folds:
                _, parent, key, activation = self.folds[name]
                parent._modules[key] = activation
        for block in self.blocks.values():
            for key, hook in list(block._forward_hooks.items()):
                if isinstance(hook, _CutBehind):
                    del block._forward_hooks[key]
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return self.model

    def freeze_all_but_the_last(self) -> None:
        """In the order in which the model holds its layers."""
        last = [m for m in self.model.modules() if isinstance(m, tuple(_PLAIN))][-1]
        kept = set(last.parameters())
        self.frozen = [p for p in self.model.parameters() if p.requires_grad and p not in kept]
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def _apply(self) -> None:
        """A layer changes its class, as in torch's parametrize: who holds it holds the new one."""
        for name, layer in self.layers.items():
            layer.__class__ = _LAYERS[type(layer)]
            layer.activation = None
            if name in self.folds:
                _, parent, key, layer.activation = self.folds[name]
                parent._modules[key] = nn.Identity().train(layer.activation.training)
        for block in self.blocks.values():
            block.register_forward_hook(_CutBehind(self.point or FeedbackPoint()))

    def __repr__(self) -> str:
        rows = [(name, type(layer), self._told(name)) for name, layer in self.layers.items()]
        rows += [(name, type(block), "feedback behind it") for name, block in self.blocks.items()]
        rows += [(name, kind, f"left alone: {why}") for name, (kind, why) in self.kept.items()]
        rows = [(name or "(the model)", kind.__name__, what) for name, kind, what in rows]
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
        return "\n".join(f"{a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in rows)

    def _told(self, name: str) -> str:
        fold = self.folds.get(name)
        taken = f", applies {type(fold.activation).__name__} {fold.name!r}" if fold else ""
        return f"{self.role}{taken}"


class _CutBehind:
    """The forward hook of a block: its output is a feedback point, of the block's name."""

    def __init__(self, point: FeedbackPoint) -> None:
        self.point = point

    def __call__(self, block: nn.Module, args: Any, output: Any) -> Any:
        if state.tape is None:
            return None
        _check_no_backward_hooks(type(block).__name__, block)
        if isinstance(output, Tensor):
            return self.point.cut(block, output)
        if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            items = [self.point.cut(block, output[0]), *output[1:]]
            return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        raise TypeError(
            f"blocks: a {type(block).__name__} must return a tensor, or a tuple or list that "
            f"begins with one, got {type(output).__name__}; name a module inside it instead"
        )


# What is to change.


def _plan_layers(model: nn.Module, output: str | None, fold: bool) -> Conversion:
    layers: dict[str, nn.Module] = {}
    kept: dict[str, tuple[type, str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _LAYER_LIKE) or isinstance(module, _CUTTING):
            continue
        reason = _reason_to_keep(module)
        if reason is None:
            layers[name] = module
        else:
            kept[name] = (type(module), reason)
    if not layers and not any(isinstance(module, _CUTTING) for module in model.modules()):
        raise ValueError(
            f"model holds nothing to convert: no module whose class is one of "
            f"{', '.join(kind.__name__ for kind in _LAYERS)} itself, and not a subclass. "
            "blocks= puts feedback points behind modules of any kind"
        )
    folds = _find_folds(model, layers, output) if fold else {}
    return Conversion(model, layers, folds, kept)


def _reason_to_keep(layer: nn.Module) -> str | None:
    if type(layer) not in _LAYERS:
        bases = [kind.__name__ for kind in _LAYERS if isinstance(layer, kind)]
        return f"a subclass of {bases[0]}" if bases else "fastdfa has no such layer"
    # A forward of its own, as some libraries set on an object, would go on being called.
    changed = {"forward", "activation"} & {*vars(layer), *layer._modules}
    return f"it has its own {changed.pop()!r}" if changed else None


def _find_folds(
    model: nn.Module, layers: dict[str, nn.Module], output: str | None
) -> dict[str, Fold]:
    """Activations that the kernels know, where nothing reads what is between layer and them."""
    places = Counter(child for module in model.modules() for child in module._modules.values())
    names = {layer: name for name, layer in layers.items()}
    folds: dict[str, Fold] = {}
    for path, parent in model.named_modules():
        if type(parent) is not nn.Sequential or "forward" in vars(parent):
            continue
        for (_, layer), (key, activation) in pairwise(parent._modules.items()):
            name, taken = names.get(layer), f"{path}.{key}".lstrip(".")
            if name is None or activations.gate_of(activation) is None:
                continue
            if places[layer] == 1 and not _output_is_watched(layer) and output not in (name, taken):
                folds[name] = Fold(taken, parent, key, activation)
    return folds


def _output_is_watched(layer: nn.Module) -> bool:
    """Whether a hook sees the layer's output or the gradient of that."""
    return bool(layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _plan_blocks(model: nn.Module, blocks: Any, point: FeedbackPoint | None) -> Conversion:
    if not isinstance(point, (FeedbackPoint, NoneType)):
        raise TypeError(f"point must be a FeedbackPoint, got {type(point).__name__}")
    matching: set[nn.Module] = set()
    for selector in _selectors(blocks):
        found = {
            module
            for name, module in model.named_modules(remove_duplicate=False)
            if name and _matches(selector, name, module)
        }
        if not found:
            names = [name for name, _ in model.named_modules() if name]
            shown = ", ".join([*names[:20], *["..."][: len(names) > 20]])
            raise ValueError(f"blocks: {selector!r} matches no module, of {shown}")
        matching |= found
    chosen = {name: module for name, module in model.named_modules() if module in matching}
    for name, block in chosen.items():
        _check_block(name, block)
    return Conversion(model, {}, blocks=chosen, point=point)


def _selectors(blocks: Any) -> list[Selector]:
    selectors = list(blocks) if isinstance(blocks, (list, tuple, set)) else [blocks]
    for selector in selectors:
        is_class = isinstance(selector, type) and issubclass(selector, nn.Module)
        if not is_class and not isinstance(selector, str):
            raise TypeError(
                "blocks must be a class of modules, a pattern of names, or a list of such, got "
                f"{selector!r}"
            )
    if not selectors:
        raise ValueError("blocks must name at least one block, got an empty list")
    return selectors


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, type):
        return isinstance(module, selector)
    patterns, parts = selector.split("."), name.split(".")
    return len(patterns) == len(parts) and all(map(fnmatchcase, parts, patterns))


# What is warned of.


def _warn_of_bottlenecks(layers: dict[str, nn.Module], output: str | None) -> None:
    """In the order in which the model holds its layers: the last gives the size of the error."""
    inside = [
        (name, layer)
        for name, layer in layers.items()
        if output is None or f"{name}.".startswith(f"{output}.")
    ]
    for (_, before), (name, layer), (_, behind) in zip(
        inside, inside[1:], inside[2:], strict=False
    ):
        if not all(isinstance(each, nn.Linear) for each in (before, layer, behind, inside[-1][1])):
            continue
        n, classes = layer.out_features, inside[-1][1].out_features
        in_turn = before.out_features == layer.in_features and n == behind.in_features
        if in_turn and n < min(layer.in_features, classes - 1):
            warnings.warn(
                f"{name!r} has {n} units between {layer.in_features} and an error of {classes}: "
                "the layers before it cannot fully align with their feedback, which is as wide as "
                f"the error (the bottleneck of arXiv 1906.04554). {classes - 1} units or more do "
                "not have this effect",
                stacklevel=3,
            )


# What is refused.


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"at {name!r}" if name else "itself"
        if isinstance(module, Root):
            kind = type(module).__name__
            raise ValueError(
                f"model must hold no {kind}, got one {where}: convert what is inside it"
            )
        if isinstance(module, _WRAPPERS):
            raise ValueError(
                f"model must not be wrapped yet, got a {type(module).__name__} {where}: convert "
                "first, and wrap the DFA"
            )


def _check_layers(model: nn.Module, point: Any, allow_bypass: bool) -> None:
    if point is not None:
        raise ValueError("point says how blocks are fed, and needs blocks=")
    _check_visible(model)
    for name, module in model.named_modules():
        for kind in _RESIDUAL:
            if isinstance(module, kind) and not allow_bypass:
                raise ValueError(
                    f"{_described(name, module)}: later feedback would pass by its layers along "
                    f"its skip connections. Cut behind each instead, by blocks=nn.{kind.__name__}"
                )


def _check_visible(model: nn.Module) -> None:
    """Raises where there may be layers that cannot be found."""
    for name, module in model.named_modules():
        what = _described(name, module)
        if isinstance(module, jit.ScriptModule) and any(map(_trainable, module.parameters())):
            raise ValueError(
                f"{what}: convert cannot see into a scripted module. Name the modules to cut "
                "behind in blocks="
            )
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(f"{what} without parameters yet: run the model once, then convert")


def _described(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'!r} is a {type(module).__name__}"


def _check_block(name: str, block: nn.Module) -> None:
    if isinstance(block, _NEVER_CALLED):
        raise ValueError(
            f"blocks: {name!r}, a {type(block).__name__}, is never called, so there is nothing "
            f"behind it; its modules would be named {name + '.*'!r}"
        )
    if isinstance(block, jit.ScriptModule):
        raise ValueError(
            f"blocks: {name!r}, scripted, takes no hook: put it into an nn.Sequential, and name "
            "that"
        )
    _check_no_backward_hooks(name, block)


def _check_no_backward_hooks(name: str, block: nn.Module) -> None:
    """They wait for a gradient of the output that the block returns, and it has none."""
    if block._backward_hooks or block._backward_pre_hooks:
        raise ValueError(
            f"blocks: {name!r} has backward hooks, which would never fire, as its output is cut. "
            "Register them on a module inside it"
        )


def _check_tied(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Raises where a trainable parameter is shared by modules that are not in one segment."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in set(filter(_trainable, module._parameters.values())):
            owners.setdefault(parameter, []).append(name)
    for names in owners.values():
        if len(names) > 1 and not _inside_one(names, blocks):
            raise ValueError(
                f"{' and '.join(map(repr, names))} share a parameter, on two sides of a cut: it "
                "would learn from the sum of feedback and another gradient. Untie it (give each "
                "its own nn.Parameter), or accept that by allow_tied=True"
            )


def _inside_one(names: list[str], blocks: Iterable[str]) -> bool:
    """Whether one block holds all these modules, with no point inside it."""
    innermost = [b for b in blocks if not any(other.startswith(f"{b}.") for other in blocks)]
    return any(all(f"{name}.".startswith(f"{b}.") for name in names) for b in innermost)


def _trainable(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad
