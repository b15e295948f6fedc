"""Says what `fastdfa.convert` changes in a network, and takes it back: `Conversion`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..engine.inplace import NAME, class_of, is_made, leave
from ..engine.layers import CutLayer
from ..engine.tape import OfRoot
from .conv import Conv1d, Conv2d
from .linear import Linear
from .point import CutBefore, CutBehind, FeedbackPoint

# What has a matrix or a kernel, and may have a forward of its own.
KINDS = (nn.Linear, nn.modules.conv._ConvNd)
LAYERS: dict[type, type] = {nn.Linear: Linear, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d}
PLAIN = {ours: torchs for torchs, ours in LAYERS.items()}
# What a layer does in a network of each kind.
CUT, BY_RULE = "cut at its input", "hands down its gradient by the rule"


def plain_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns torch's linear and convolutional layers, and what derives from these, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, KINDS) and not isinstance(layer, CutLayer)
    }


def is_plain(layer: nn.Module) -> bool:
    """Tells whether a layer is just what its class, one of torch's, says."""
    # A forward of its own, as some libraries set on an object, would go on being called.
    if type(layer) not in LAYERS or {"forward", "activation"} & {*vars(layer), *layer._modules}:
        return False
    return type(layer.weight) in (nn.Parameter, Tensor)  # not quantized, nor sharded


def _hooks_before(layer: nn.Module) -> list[int]:
    hooks = layer._forward_pre_hooks.items()
    return [number for number, hook in hooks if isinstance(hook, CutBefore)]


class Fold(NamedTuple):
    """Names an activation of an `nn.Sequential` that becomes that of the layer before it."""

    name: str
    parent: nn.Sequential
    key: str
    activation: nn.Module


@dataclass(eq=False, repr=False)
class Conversion:
    """Says what `convert` changed; prints as a table.

    Attributes:
        model: the network that was converted.
        layers: by name, the layers that are cut at their input now.
        folds: by the name of such a layer, the activation that it took over.
        kept: by name, the class of what is as it was though it holds matrices, and why.
        blocks: by name, the modules that have a feedback point behind them now.
        point: how these receive feedback.
        role: what the layers do in the network.
        frozen: parameters that required grad and do no longer, for rule="shallow".
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    folds: dict[str, Fold] = field(default_factory=dict)
    kept: dict[str, tuple[type, str]] = field(default_factory=dict)
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    point: FeedbackPoint | None = None
    role: str = CUT
    frozen: list[nn.Parameter] = field(default_factory=list)

    def undo(self) -> nn.Module:
        """Makes the model what it was, with the parameters that it has now, and returns it.

        Raises:
            RuntimeError: if the class of a layer was changed since, or this was called before.
        """
        if not is_made(self.model):
            raise RuntimeError(f"the model is no longer as convert made it: {type(self.model)}")
        for name, layer in self.layers.items():
            if class_of(layer) not in PLAIN and not _hooks_before(layer):
                raise RuntimeError(f"{name!r} is no longer as convert made it: {type(layer)}")
        vars(self.model)[NAME].give_up()
        leave(self.model)
        for module in [*self.layers.values(), *self.blocks.values()]:
            vars(module).pop("of_root", None)
        for name, layer in self.layers.items():
            if type(layer) not in PLAIN:
                for number in _hooks_before(layer):
                    layer._forward_pre_hooks.pop(number)
                    layer._forward_pre_hooks_with_kwargs.pop(number, None)
                continue
            layer.__class__ = PLAIN[type(layer)]
            del layer.activation
            if name in self.folds:
                _, parent, key, activation = self.folds[name]
                parent._modules[key] = activation
        for block in self.blocks.values():
            for number, hook in list(block._forward_hooks.items()):
                if isinstance(hook, CutBehind):
                    del block._forward_hooks[number]
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        return self.model

    def freeze_all_but_the_last(self) -> None:
        """Freezes all parameters but those of the last layer that the model holds."""
        last = [m for m in self.model.modules() if isinstance(m, tuple(PLAIN))][-1]
        kept = set(last.parameters())
        self.frozen = [p for p in self.model.parameters() if p.requires_grad and p not in kept]
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def apply(self) -> None:
        """Changes the class of each layer, as torch's parametrize does: who holds it holds the new
        one. What has a forward of its own is given a hook."""
        for name, layer in self.layers.items():
            if not is_plain(layer):
                layer.register_forward_pre_hook(CutBefore(), with_kwargs=True)
                continue
            layer.__class__ = LAYERS[type(layer)]
            taken = self.folds.get(name)
            converted: Any = layer
            converted.activation = None if taken is None else taken.activation
            if taken is not None:
                identity = nn.Identity().train(taken.activation.training)
                taken.parent._modules[taken.key] = identity
        told: list[str] = []
        for name, module in [*self.layers.items(), *self.blocks.items()]:
            if self.role == CUT:
                vars(module)["of_root"] = OfRoot(name, told)
        for block in self.blocks.values():
            block.register_forward_hook(CutBehind(self.point or FeedbackPoint()))

    def __repr__(self) -> str:
        found = [(name, type(layer), self._told(name)) for name, layer in self.layers.items()]
        found += [(name, type(block), "feedback behind it") for name, block in self.blocks.items()]
        found += [(name, kind, f"left alone: {why}") for name, (kind, why) in self.kept.items()]
        rows = [(name or "(the model)", kind.__name__, what) for name, kind, what in found]
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)] if rows else []
        return "\n".join(f"{a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in rows)

    def _told(self, name: str) -> str:
        fold = self.folds.get(name)
        taken = f", applies {type(fold.activation).__name__} {fold.name!r}" if fold else ""
        return f"{self.role}{taken}"
