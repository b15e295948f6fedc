"""Makes a network of torch's own modules one that trains by feedback: `convert`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import jit, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import activations, arguments, structure
from .dfa import DFA
from .diagnostics.untouched import called, left_as_it_was
from .engine.inplace import NAME, enter
from .engine.layers import CutLayer
from .engine.root import Root
from .engine.witness import warn_user
from .feedback.rule import Feedback
from .layerwise import RULES, LayerFeedback
from .nn.converted import BY_RULE, KINDS, LAYERS, Conversion, Fold, is_plain, plain_layers
from .nn.point import FeedbackPoint, check_no_backward_hooks, cuts_before

__all__ = ["Conversion", "Fold", "convert"]

Selector = type | str

_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict, NonDynamicallyQuantizableLinear)
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# Torch's blocks that have skip connections round their layers.
_RESIDUAL = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


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
    cut: str | int | Sequence[str] = "all",
    example: Any = None,
) -> Any:  # `model`, which has the root's attributes as well, as no type says
    """Makes a network of torch's own modules train by direct feedback alignment, or another rule.

    The model itself is changed, and is the root: the same object, of its own class still, with its
    attributes, methods, signature and children. A step of it is one of DFA, whether or not what
    `convert` returns, the model, is taken. It has the attributes of the root as well (`feedback`,
    `cut`, `feedback_points`, `conversion`, ...), but for those names that it has itself:
    `model.fastdfa` is the root, a `DFA` or a `LayerFeedback`, and has them all.

    Without `blocks`, the network is cut at the input of every linear layer and convolution. An
    `nn.Linear`, `nn.Conv1d` and `nn.Conv2d` becomes fastdfa's: it changes its class alone, so
    parameters, names, hooks, mode and every reference to it stay. What has a forward or a weight of
    its own (parametrized, pruned, quantized, a subclass, an adapter of peft round such a layer,
    other convolutions) is cut by a hook before it, and otherwise as it was. With `blocks`, the
    network is cut behind each block and nothing else is changed: for residual networks and
    transformers, where a cut beside a skip connection would leak. The forward numbers stay.
    `model.conversion` tells what was changed, and what is not cut, when printed; its `undo()` takes
    it back.

    The `state_dict` has the model's keys, and `fastdfa.seed`. A checkpoint without that loads
    strictly, such as one of the plain model, and leaves the seed as it is.

    Args:
        model: the network, before DistributedDataParallel wraps it.
        feedback, output, allow_bypass: as in `DFA`.
        rule: "dfa" is a `DFA`; "fa", "usf", "frsf", "brsf" and "backprop" are a `LayerFeedback` of
            that rule, which fastdfa's layers follow and no others; "shallow" one of "backprop" in
            which the last layer alone requires grad: what a rule must beat to have taught the
            others anything. Of the arguments for where and how a `DFA` feeds back, they take none.
        blocks: which modules have a feedback point behind them, of the same name: classes, or
            patterns of qualified names, in which `*` stays within one part ("encoder.layers.*").
            Of a tuple or list that a block returns, the first tensor is the point. "auto" takes the
            smallest modules that contain a skip connection or branches, as a pass of `example`
            shows them, where the model cannot be cut without `blocks`.
        point: with `blocks`, a `FeedbackPoint` that says how these receive it (rows, features).
        fold: an activation that follows a layer in an `nn.Sequential` becomes the layer's own,
            for the fused path, and leaves an `nn.Identity` in its place. False leaves it: for a
            model that reads its `nn.Sequential` piece by piece, between the two.
        cut: at which of these inputs, or behind which of the blocks, the network is cut; as in
            `DFA`.
        allow_tied: accept parameters that modules on two sides of a cut share: their gradient is
            the sum of what each side gives.
        example: an input, of which a forward pass is made at once; a tuple holds several arguments,
            a dict keyword arguments. What otherwise the first step would refuse is refused now, all
            in one message, with the call that does convert the model where there is one. Its
            parameters, buffers and torch's random state stay as they are.

    Warns:
        UserWarning: of what holds matrices and is not cut at its input, such as recurrent networks
            and attention, where something that learns is before it: that learns by backprop
            through it. And of a linear layer of n units between others, where its input is wider
            and so is the error, C > n + 1. Behind such a bottleneck the true gradients have rank n,
            the feedback rank C - 1 (of a softmax), so that the layers before it align in part only.

    Raises:
        TypeError, ValueError: for arguments that are not so; where there is nothing to convert;
            for tied parameters, lazy layers that have not run, torch's transformer layers without
            `blocks`, and modules that it cannot see into: scripted, or wrapped for several
            devices. The model is then as it was.
        RuntimeError: in the first forward pass, or that of `example`, where a path leads round a
            cut, as in `DFA`.
    """
    _check_model(model)
    arguments.flag("fold", fold)
    arguments.flag("allow_tied", allow_tied)
    if rule != "dfa":
        no_others = {"feedback": feedback, "output": output, "blocks": blocks, "point": point,
                     "allow_bypass": allow_bypass or None, "example": example,
                     "cut": None if cut == "all" else cut}  # fmt: skip
        return _convert_by_layer(model, rule, fold, no_others)
    how = _How(feedback, output, blocks, point, fold, allow_bypass, allow_tied, cut)
    if blocks == "auto":
        if example is None:
            raise ValueError("blocks='auto' looks at a forward pass: give example=, an input")
        found = list(structure.look_at(model, example, output).blocks)
        how = how._replace(blocks=None)
        if found and not _converts(model, how, example):
            how = how._replace(blocks=structure.patterns(found, model))
    try:
        return _tried(model, how, example)
    except (TypeError, ValueError, RuntimeError) as refusal:
        if example is not None:
            _say_what_converts(model, how, example, refusal)
        raise


class _How(NamedTuple):
    """Holds the arguments of `convert` for a `DFA`."""

    feedback: Feedback | str | None
    output: str | None
    blocks: Any
    point: FeedbackPoint | None
    fold: bool
    allow_bypass: bool
    allow_tied: bool
    cut: Any


def _tried(model: nn.Module, how: _How, example: Any) -> nn.Module:
    """Returns the model, converted, after a pass of an example; as it was where that fails."""
    _convert(model, how)
    if example is None:
        return model
    root: Any = vars(model)[NAME]
    anchors, root.anchors = root.anchors, None  # a pass that trains nothing does not count
    try:
        with left_as_it_was(model):
            called(model, example)
    except BaseException:
        root.conversion.undo()
        raise
    root.anchors = anchors
    return model


def _converts(model: nn.Module, how: _How, example: Any) -> bool:
    """Tells whether a model can be converted so, and leaves it as it was."""
    try:
        with warnings.catch_warnings(), torch.random.fork_rng([]):
            warnings.simplefilter("ignore")
            vars(_tried(model, how, example))[NAME].conversion.undo()
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _say_what_converts(model: nn.Module, how: _How, example: Any, refusal: Exception) -> None:
    """Raises an error with all that is missing, if the model converts so; else nothing."""
    seen = structure.look_at(model, example, how.output)
    better, missing = how, []
    if how.output is None and seen.output is not None:
        better = better._replace(output=seen.output)
        kind = type(seen.returned).__name__
        missing.append(f"the model returns a {kind}: {seen.output!r} makes the output in it")
    if how.blocks is None and not how.allow_bypass and seen.blocks:
        blocks = structure.patterns(list(seen.blocks), model)
        better = better._replace(blocks=blocks)
        missing.append(f"paths lead round the layers in {', '.join(map(repr, blocks))}")
    try:
        if not how.allow_tied:
            _check_tied(
                model, _plan_blocks(model, better.blocks, None).blocks if better.blocks else {}
            )
    except ValueError as tied:
        better = better._replace(allow_tied=True)
        missing.append(str(tied))
    if not _converts(model, better, example):
        return
    changed = [n for n in how._fields if getattr(how, n) is not getattr(better, n)]
    given = "".join(f", {name}={getattr(better, name)!r}" for name in changed)
    reasons = "".join(f"\n- {reason}" for reason in missing)
    raise ValueError(
        f"model cannot be converted so, and is as it was. This does it:\n"
        f"    fastdfa.convert(model{given}){reasons}"
    ) from refusal


def _convert(model: nn.Module, how: _How) -> nn.Module:
    feedback, output, blocks, point, fold, allow_bypass, allow_tied, cut = how
    if blocks is not None:
        conversion = _plan_blocks(model, blocks, point)
    elif point is not None:
        raise ValueError("point says how blocks receive feedback, and needs blocks=")
    else:
        conversion = _plan_layers(model, output, fold, allow_bypass)
    if not allow_tied:
        _check_tied(model, conversion.blocks)
    # The last that can fail, and before the blocks' hooks: a block that is tapped is not cut.
    root = DFA(model, feedback, output, allow_bypass)
    _warn_of_bottlenecks(conversion.layers, output)
    _warn_of_uncut(model, conversion)
    conversion.apply()
    _in_place(model, root, conversion)
    try:
        root.cut = cut  # names of points that are there only now
    except (TypeError, ValueError):
        conversion.undo()
        raise
    return model


def _in_place(model: nn.Module, root: DFA | LayerFeedback, conversion: Conversion) -> nn.Module:
    root.conversion = conversion
    root.settle_in(model)
    enter(model, root)
    return model


def _convert_by_layer(
    model: nn.Module, rule: str, fold: bool, no_others: dict[str, Any]
) -> nn.Module:
    """Converts for a rule of `LayerFeedback`.

    `no_others` are arguments that only a `DFA` takes, None where not given.
    """
    if rule not in (*RULES, "shallow"):
        known = ", ".join(map(repr, ("dfa", *RULES, "shallow")))
        raise ValueError(f"rule must be one of {known}, got {rule!r}")
    for name, value in no_others.items():
        if value is not None:
            raise ValueError(f"{name} is of rule='dfa' alone, got it with rule={rule!r}")
    conversion = _plan_layers(model, None, fold, allow_residual=True, by_rule=True)
    conversion.role = BY_RULE
    conversion.apply()
    root = LayerFeedback(model, "backprop" if rule == "shallow" else rule)
    if rule == "shallow":
        conversion.freeze_all_but_the_last()
    return _in_place(model, root, conversion)


# What is to change.


def _plan_layers(
    model: nn.Module, output: str | None, fold: bool, allow_residual: bool, by_rule: bool = False
) -> Conversion:
    _check_layers(model, allow_residual)
    found = plain_layers(model) if by_rule else _cuttable(model)
    kept = {
        name: (type(layer), why)
        for name, layer in found.items()
        if (why := _reason_to_keep(layer, by_rule)) is not None
    }
    layers = {name: layer for name, layer in found.items() if name not in kept}
    if not layers and not any(map(cuts_before, model.modules())):
        raise ValueError(
            "model holds nothing to convert: no linear layer, no convolution. blocks= puts "
            "feedback points behind modules of any kind"
        )
    folds = _find_folds(model, layers, output) if fold else {}
    if not by_rule:
        kept |= {name: (type(module), _UNCUT) for name, module in _uncut(model, layers).items()}
    return Conversion(model, layers, folds, kept)


def _cuttable(model: nn.Module) -> dict[str, nn.Module]:
    """Returns linear and convolutional layers by name, and what wraps such a layer as an adapter,
    but nothing that is inside one of these."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside or isinstance(module, CutLayer):
            continue
        # As peft's adapters, which add to what that layer makes of their input.
        wrapped = module
        while "base_layer" in wrapped._modules:
            wrapped = wrapped._modules["base_layer"]
        if isinstance(wrapped, KINDS):
            found[name] = module
            inside |= set(module.modules())
    return found


def _reason_to_keep(layer: nn.Module, by_rule: bool) -> str | None:
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "torch's attention reads its weight, and never calls it"
    if not by_rule or is_plain(layer):
        return None
    if type(layer) in LAYERS:
        return "it has a forward, an activation or a weight of another kind"
    bases = [kind.__name__ for kind in LAYERS if isinstance(layer, kind)]
    return f"a subclass of {bases[0]}" if bases else "fastdfa has no such layer"


_UNCUT = "not cut at its input, it learns by backprop from the next point above"


def _uncut(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns by name what has trainable matrices of its own and is not cut at its input."""
    cut = [*layers.values(), *filter(cuts_before, model.modules())]
    inside = {module for layer in cut for module in layer.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if module not in inside and any(map(_is_matrix, module._parameters.values())):
            owner = name.partition(".parametrizations.")[0]
            found[owner] = model.get_submodule(owner)
    return {
        name: module
        for name, module in found.items()
        if not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def _is_matrix(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad and parameter.dim() > 1


def _find_folds(
    model: nn.Module, layers: dict[str, nn.Module], output: str | None
) -> dict[str, Fold]:
    """Finds activations that the kernels know, and before which nothing else reads the layer."""
    held = Counter(child for module in model.modules() for child in module._modules.values())
    names = {layer: name for name, layer in layers.items()}
    folds: dict[str, Fold] = {}
    for path, parent in model.named_modules():
        if type(parent) is not nn.Sequential or "forward" in vars(parent):
            continue
        for (_, layer), (key, activation) in pairwise(parent._modules.items()):
            name, taken = names.get(layer), f"{path}.{key}".lstrip(".")
            if name is None or activations.gate_of(activation) is None:
                continue
            if held[layer] == 1 and not _output_is_watched(layer) and output not in (name, taken):
                folds[name] = Fold(taken, parent, key, activation)
    return folds


def _output_is_watched(layer: nn.Module) -> bool:
    """Tells whether a hook sees the layer's output or the gradient of that."""
    return bool(layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _plan_blocks(model: nn.Module, blocks: Any, point: FeedbackPoint | None) -> Conversion:
    if point is not None and not isinstance(point, FeedbackPoint):
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
    """Warns of narrow layers; the last that the model holds gives the size of the error."""
    inside: list[tuple[str, Any]] = [
        (name, layer)
        for name, layer in layers.items()
        if output is None or f"{name}.".startswith(f"{output}.")
    ]
    for (_, before), (name, layer), (_, behind) in zip(
        inside, inside[1:], inside[2:], strict=False
    ):
        _, last = inside[-1]
        if not all(isinstance(each, nn.Linear) for each in (before, layer, behind, last)):
            continue
        n, classes = layer.out_features, last.out_features
        in_turn = before.out_features == layer.in_features and n == behind.in_features
        if in_turn and n < min(layer.in_features, classes - 1):
            warn_user(
                f"{name!r} has {n} units between {layer.in_features} and an error of {classes}: "
                "the layers before it cannot fully align with their feedback, which is as wide as "
                f"the error (the bottleneck of arXiv 1906.04554). {classes - 1} units or more do "
                "not have this effect",
            )


def _warn_of_uncut(model: nn.Module, conversion: Conversion) -> None:
    """Warns of what hands a true gradient down to what has parameters too; not of embeddings, which
    read indices."""
    told = []
    before = False  # whether anything is that learns
    for name, module in model.named_modules():
        kept = conversion.kept.get(name, (None, ""))[1] == _UNCUT
        if kept and before and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            told.append(f"{name!r}, a {type(module).__name__}")
        before = before or any(map(_trainable, module._parameters.values()))
    if told:
        warn_user(
            f"{'; '.join(told)}: not cut at the input, so that what is before it learns through it "
            "by backprop, from the next feedback point above. Put a fastdfa.FeedbackPoint before "
            "it, or name the modules to cut behind in blocks=",
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


def _check_layers(model: nn.Module, allow_residual: bool) -> None:
    """Raises where there may be layers that cannot be found, or skip connections round them."""
    for name, module in model.named_modules():
        what = f"{name or 'the model'!r} is a {type(module).__name__}"
        if isinstance(module, jit.ScriptModule) and any(map(_trainable, module.parameters())):
            raise ValueError(
                f"{what}: convert cannot see into a scripted module. Name the modules to cut "
                "behind in blocks="
            )
        lazy: Any = module
        if isinstance(module, LazyModuleMixin) and lazy.has_uninitialized_params():
            raise ValueError(f"{what} without parameters yet: run the model once, then convert")
        for kind in _RESIDUAL:
            if isinstance(module, kind) and not allow_residual:
                raise ValueError(
                    f"{what}: later feedback would pass by its layers along its skip connections. "
                    f"Cut behind each instead, by blocks=nn.{kind.__name__}"
                )


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
    check_no_backward_hooks(name, block)


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
    """Tells whether one block holds all these modules, with no point inside it."""
    innermost = [b for b in blocks if not any(other.startswith(f"{b}.") for other in blocks)]
    return any(all(f"{name}.".startswith(f"{b}.") for name in names) for b in innermost)


def _trainable(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad
