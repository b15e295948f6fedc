"""Makes a module a root itself, the same object of another class, as `fully_shard` does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import nn

NAME = "fastdfa"  # of the root in the module: the attribute, and where its keys begin


class InPlace(nn.Module):
    """Serves as the base of the classes that are made for modules which are roots themselves.

    The root stands beside the module's children, and not among them, as an `nn.Sequential` would
    call it; but its tensors are the module's: in `parameters()`, `buffers()` and the `state_dict`.
    """

    fastdfa: Any  # the root
    plain_class: ClassVar[type[nn.Module]]
    plain_forward: Callable[..., Any]  # of the class, or of the object where that had its own

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        name = f"{prefix}.{NAME}" if prefix else NAME
        yield from self.fastdfa.named_modules(memo, name, remove_duplicate)

    def train(self, mode: bool = True) -> InPlace:
        super().train(mode)
        self.fastdfa.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> InPlace:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves out its types
        self.fastdfa._apply(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.fastdfa.state_dict(
            destination=destination, prefix=f"{prefix}{NAME}.", keep_vars=keep_vars
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads the root's keys where there are any: a checkpoint of the plain module has none."""
        _rename_keys_of_a_wrapper(self, state_dict, prefix)
        begins = f"{prefix}{NAME}."
        ours = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(begins)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not ours:
            return
        own = {key.removeprefix(begins): value for key, value in ours.items()}
        assign = local_metadata.get("assign_to_params_buffers", False)
        try:
            missing, unexpected = self.fastdfa.load_state_dict(own, strict=False, assign=assign)
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [begins + key for key in missing]
        unexpected_keys += [begins + key for key in unexpected]

    # The class cannot be found by its name: copies and pickles make it anew.
    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        if not is_made(self):  # another has changed the class since
            return (make, args, *rest)
        args = tuple(self.plain_class if arg is type(self) else arg for arg in args)
        return (_remade, (make, args, vars(type(self))["made_from"]), *rest)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        super().__setstate__(attributes)  # type: ignore[no-untyped-call]  # torch leaves out its types
        self.fastdfa.settle_in(self)


def enter(module: nn.Module, root: Any) -> None:
    """Makes a module one of which `root` is the root: calls of it are the root's."""
    if "forward" in vars(module):  # as accelerate sets it on an object
        vars(module)["plain_forward"] = vars(module).pop("forward")
    vars(module)[NAME] = root.train(module.training)
    passed = tuple(name for name in type(root).passed_on if not hasattr(module, name))
    kind: Any = type(module)
    of_root: Any = type(root)
    module.__class__ = _made(kind, of_root, passed)


def leave(module: nn.Module) -> None:
    """Makes a module what it was before `enter`."""
    kind: Any = type(module)
    module.__class__ = kind.plain_class
    del vars(module)[NAME]
    if "plain_forward" in vars(module):
        vars(module)["forward"] = vars(module).pop("plain_forward")


def is_made(module: nn.Module) -> bool:
    """Tells whether a module has the class that `enter` gave it, and no other since."""
    return "plain_class" in vars(type(module))


def class_of(module: Any) -> Any:
    """Returns the class of a module, or that which it would have if it were no root."""
    kind = type(module)
    return kind.__dict__["plain_class"] if is_made(module) else kind


def own_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the names and modules in a network, but not the root that it may be itself."""
    yield from nn.Module.named_modules(module)


@functools.cache
def _made(kind: Any, of_root: Any, passed: tuple[str, ...]) -> Any:
    """Returns the class of modules of some kind that are roots."""

    # Not what else is in the function's __dict__, such as the marks of torch.compile.
    @functools.wraps(kind.forward, updated=())
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.fastdfa(*args, **kwargs)

    attributes: dict[str, Any] = {name: _descriptor(of_root, name) for name in passed}
    attributes |= {"plain_class": kind, "plain_forward": kind.forward, "forward": forward}
    attributes |= {"made_from": (kind, of_root, passed)}
    attributes |= {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    if "in_segments" in vars(kind):
        attributes["in_segments"] = vars(kind)["in_segments"]
    return type(kind)(kind.__name__, (InPlace, kind), attributes)


class _Shown:
    """Shows an attribute of the root where the module has none of that name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, kind: type | None = None) -> Any:
        if module is None:
            return self
        for own in ("_parameters", "_buffers", "_modules"):  # registered since
            if self.name in vars(module)[own]:
                return vars(module)[own][self.name]
        return getattr(module.fastdfa, self.name)


class _PassedOn(_Shown):
    """Sets it, too."""

    def __set__(self, module: Any, value: Any) -> None:
        setattr(module.fastdfa, self.name, value)


class _Itself(_Shown):
    """Stands for the module that `convert` wrapped before."""

    def __get__(self, module: Any, kind: type | None = None) -> Any:
        if module is not None:
            warnings.warn(
                f"convert makes the {type(module).__name__} itself a root, and no wrapper of it: "
                "leave out .module, which will not be there in a later release",
                DeprecationWarning,
                stacklevel=2,
            )
        return super().__get__(module, kind)


def _descriptor(of_root: Any, name: str) -> _Shown:
    if name == "module":
        return _Itself(name)
    return _PassedOn(name) if name in of_root.settable else _Shown(name)


def _remade(make: Callable[..., nn.Module], args: tuple[Any, ...], made_from: Any) -> nn.Module:
    module = make(*args)
    module.__class__ = _made(*made_from)
    return module


def _rename_keys_of_a_wrapper(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Takes a checkpoint of the time when `convert` returned a wrapper: seed, module.0.weight."""
    keys = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    of_wrapper = ("module.", "matrices.", "anchors.", "compression", "seed")
    names = {*module._modules, *module._buffers, *module._parameters}
    if "seed" not in keys or names & {"seed", "module"}:
        return
    if not all(key.startswith(of_wrapper) for key in keys):
        return
    warnings.warn(
        "the checkpoint is that of a wrapper, with keys such as 'module.0.weight', which convert "
        "returned before: save it again, as this will not be read in a later release",
        DeprecationWarning,
        stacklevel=2,
    )
    for key in keys:
        own = key.startswith("module.")
        new = key.removeprefix("module.") if own else f"{NAME}.{key}"
        state[prefix + new] = state.pop(prefix + key)
