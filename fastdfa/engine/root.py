"""Holds what the modules that wrap a network share: a seed, and the names of its layers."""

from __future__ import annotations

import itertools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import arguments
from ..ops import capture
from ..ops.typed import constant
from . import inplace
from .inplace import InPlace, own_modules
from .layers import CutLayer, NoScript

# Parts that wrappers add to names; B must not depend on them.
_OF_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


_stamps = itertools.count()


class Root(NoScript):
    """Wraps `module`, or stands behind one that is a root itself.

    `seed`, a buffer, is the one source of randomness of its feedback.

    Raises:
        TypeError, ValueError: for what is no module, or holds a root already.
    """

    seed: Tensor
    # What a module that is a root itself shows of this, and what of that may be set there.
    passed_on: tuple[str, ...] = ("module", "seed", "conversion", "feedback_matrix")
    settable: tuple[str, ...] = ()
    # Copies and pickles carry the seed and the rule; what `_reset` can make again is left out.
    made_again: tuple[str, ...] = ("_seed_version", "_names", "_children")
    # What a step depends on and a user may set anew. No other root has this stamp, nor the same one
    # once a setting has changed: by it a compiled step is guarded, and so is traced again.
    settings: tuple[str, ...] = ()
    stamp: int

    def __init__(self, module: nn.Module, seed: int | None) -> None:
        super().__init__()
        _check_module(module)
        self.module = module
        if seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64))
        self._key = seed

    def settle_in(self, module: nn.Module) -> None:
        """Becomes the root that `module` is itself, no longer a wrapper."""
        self._modules.pop("module", None)
        self.__dict__["module"] = module  # of which it is no parent
        self._reset()

    def give_up(self) -> None:
        """Takes what it has put on the network's modules off again."""

    def network(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the network, which may be in the root's own place."""
        module = self.module
        if isinstance(module, InPlace):
            return module.plain_forward(*args, **kwargs)
        return module(*args, **kwargs)

    def _reset(self) -> None:
        """Ends the construction, and that of a copy."""
        self.stamp = next(_stamps)
        self._seed_version: tuple[Tensor, int] | None = None
        self._find_names()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self.settings:
            self.stamp = next(_stamps)

    def __getstate__(self) -> dict[str, Any]:
        left_out = (*self.made_again, "module")  # a module in whose place this is settles it again
        return {k: v for k, v in self.__dict__.items() if k not in left_out}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)  # type: ignore[no-untyped-call]  # torch leaves out its types
        if "module" in self._modules:
            self._reset()

    def read_seed(self) -> int:
        """Returns the seed; it reads the buffer only when that was written: loaded, broadcast,
        moved."""
        seen = self._seed_version
        written = seen is None or seen[0] is not self.seed or seen[1] != self.seed._version
        if written and not self.seed.is_meta:
            capture.refuse(capture.MADE_BEFORE.format("read its seed"))
            self._key = int(self.seed)
            self._seed_version = (self.seed, self.seed._version)
        return self._key

    # A constant of a compiled step, which is traced again where modules have changed.
    @constant
    def follow_modules(self) -> None:
        """Finds the names anew where a module was moved, replaced, added or removed since."""
        found = self._children
        same = all(module.__dict__["_modules"] == children for module, children in found)
        if not same or found[0][0] is not self.module:
            self._find_names()

    def _find_names(self) -> None:
        self._names = names_in(self.module)
        # But for a layer's own activation: to look at those of 32 layers takes ten times as long.
        inside = [m for m in self._names if m.__dict__["_modules"] and not isinstance(m, CutLayer)]
        holding = dict.fromkeys([self.module, *inside])
        self._children = [(module, dict(module.__dict__["_modules"])) for module in holding]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.read_seed()


_R = TypeVar("_R", bound=Root)


def names_in(module: nn.Module) -> dict[nn.Module, str]:
    """Returns the name of every module inside, as if nothing was compiled, checkpointed or
    sharded."""
    names: dict[nn.Module, str] = {}
    for name, inner in own_modules(module):
        names[inner] = ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS)
    return names


def roots_in(model: nn.Module, kind: type[_R]) -> dict[str, _R]:
    """Returns the roots of a class in a model by their names.

    Raises:
        TypeError, ValueError: for what is no module, or holds none.
    """
    arguments.module("model", model)
    roots = {name: inner for name, inner in model.named_modules() if isinstance(inner, kind)}
    if not roots:
        raise ValueError(f"model must hold a fastdfa.DFA, got {type(model).__name__} without one")
    return roots


def only_root(roots: dict[str, _R]) -> _R:
    """Returns the root of a model that must hold one, not more; of those that are there."""
    if len(roots) > 1:
        raise ValueError(f"model must hold one DFA, got {len(roots)}")
    (root,) = roots.values()
    return root


# A constant, as the Dynamo of PyTorch 2.11 tells whatever it traces that it is exported.
@constant
def exporting() -> bool:
    """Tells whether a program is being exported, which has no backward."""
    return torch.compiler.is_exporting()


def _check_module(module: nn.Module) -> None:
    arguments.module("module", module)
    for name, inner in module.named_modules():
        if isinstance(inner, Root):
            kind, where = type(inner).__name__, name.removesuffix(inplace.NAME).rstrip(".")
            raise ValueError(f"module must hold no {kind}, got one at {where or 'its top'!r}")
