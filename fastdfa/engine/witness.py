"""Watches the first backward passes of a root, and says which parameters learnt nothing.

What is wrong in a training loop is wrong in its first step. So three backward passes are watched,
and then no step pays for it. Until then each output has a hook; and while a watched pass runs, each
parameter that autograd will come to.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import Node

from .layers import CutLayer

PASSES = 3
_OURS = os.path.dirname(os.path.dirname(__file__))
_NOT_THE_USER = tuple(folder + os.sep for folder in (os.path.dirname(torch.__file__), _OURS))


class Readers(NamedTuple):
    """Holds the modules that cut what they read in a forward pass."""

    fed: Sequence[nn.Module]
    unfed: Sequence[nn.Module]  # read what has no gradient


class Witness:
    """Watches the backward passes of a root, as long as any are left to be watched."""

    def __init__(self) -> None:
        self.left = PASSES
        self.said: set[str] = set()  # names of parameters
        self._watched: _Watched | None = None  # which an exception may have ended

    def watch(self, root: nn.Module, y: Tensor, readers: Readers) -> bool:
        """Watches the backward passes of an output. Returns whether to come again.

        Warns:
            UserWarning: in these, of parameters of the root's module that no gradient comes to.
        """
        self._let_go()
        if self.left <= 0 or y.grad_fn is None:
            return self.left > 0
        of: Any = weakref.ref(root)
        behind = _behind(y.grad_fn)  # not the node itself, which holds its hook

        def begin(grads: Sequence[Tensor | None]) -> None:
            root = of()
            if root is None or self.left <= 0 or grads[0] is None:
                return
            self._let_go()
            self.left -= 1
            leaves = _leaves(behind)
            if self.left == PASSES - 1:
                _warn_of_unfed(root, readers, {id(parameter) for _, parameter in leaves})
            self._watched = _Watched(root.module, leaves, self.said)

        y.grad_fn.register_prehook(begin)
        return True

    def _let_go(self) -> None:
        if self._watched is not None:
            self._watched.let_go()
            self._watched = None


class _Watched:
    """Watches one backward pass, from when the error comes to its end.

    Of the parameters in the graph it waits for those that autograd will come to: not for what
    `autograd.grad` or `backward(inputs=...)` was not asked for. What `fully_shard` has gathered is
    no parameter of the module, and is not waited for.
    """

    def __init__(
        self, network: nn.Module, leaves: Sequence[tuple[Node, Tensor]], said: set[str]
    ) -> None:
        names = {id(p): name for name, p in network.named_parameters()}
        known = [(node, names[id(p)], p) for node, p in leaves if id(p) in names]
        # One may have been frozen since the forward pass.
        waited = [(name, p) for node, name, p in known if p.requires_grad and _comes_to(node)]
        self.missing, self.said = {name for name, _ in waited}, said
        self.hooks = [p.register_hook(self._arrival(name)) for name, p in waited]
        Variable._execution_engine.queue_callback(self.end)

    def _arrival(self, name: str) -> Any:
        missing = self.missing

        def came(gradient: Tensor | None) -> None:
            if gradient is not None:
                missing.discard(name)

        came.__torch_unserializable__ = True  # type: ignore[attr-defined]  # else a pickle warns
        return came

    def let_go(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def end(self) -> None:
        missing = sorted(self.missing - self.said) if self.hooks else []
        if missing:
            self.said.update(missing)
            warn_user(
                f"no gradient came to {_some(missing)} in a backward pass whose graph "
                "leads there: a function on the way gave none. fastdfa.check(model, x) tells from "
                "what every parameter learns"
            )
        self.let_go()


def _behind(node: Node) -> list[Node]:
    return [behind for behind, _ in node.next_functions if behind is not None]


def _leaves(nodes: Sequence[Node]) -> list[tuple[Node, Tensor]]:
    """Returns the leaves of the graph from these nodes on, with their own nodes."""
    found: list[tuple[Node, Tensor]] = []
    seen, waiting = set(nodes), list(nodes)
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append((node, leaf))
        new = set(_behind(node)) - seen
        seen |= new
        waiting += new
    return found


def _comes_to(leaf: Node) -> bool:
    """Returns whether the backward pass that runs will come to a leaf."""
    try:
        return bool(torch._C._will_engine_execute_node(leaf))
    except RuntimeError:  # which it raises of a leaf that `autograd.grad` was asked for
        return True


def _warn_of_unfed(root: Any, readers: Readers, reached: Collection[int]) -> None:
    """Warns of what lies before a point that reads what has no gradient, and is in no graph.

    A plain block is such in a reentrant checkpoint, as nothing it reads has a gradient behind a
    cut, and in backward it would never be run again.
    """
    for module in readers.unfed:
        names = [n for n, p in _before(root.module, module, readers) if id(p) not in reached]
        if names:
            (point,) = root.names_of_points([module])
            warn_user(
                f"nothing trains {_some(names)}: what is read at {point!r} has no graph. Is it "
                "detached, or made under torch.no_grad? A reentrant activation checkpoint makes it "
                "so: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )


def _before(
    network: nn.Module, module: nn.Module, readers: Readers
) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters that train between the last module before that cuts and this one, in
    the order in which the network holds them; of a block that is cut behind, those inside.

    None where no module before it cuts: what it reads may have been made without a graph on
    purpose, as by a network that is there already.
    """
    block = not isinstance(module, CutLayer) and any(True for _ in module.parameters())
    cuts = {*readers.fed, *readers.unfed}
    found: list[tuple[str, nn.Parameter]] = []
    behind_a_cut = False
    for name, inner in network.named_modules():
        if inner is module:
            break
        if inner in cuts:
            found, behind_a_cut = [], True
        found += _trained(name, inner, recurse=False)
    if block:
        found = _trained(name, module, recurse=True)
    return found if behind_a_cut else []


def _trained(name: str, module: nn.Module, recurse: bool) -> list[tuple[str, nn.Parameter]]:
    parameters = module.named_parameters(name, recurse=recurse)
    return [(name, p) for name, p in parameters if p.requires_grad]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more


def warn_user(message: str) -> None:
    """Warns at the line of the user's that leads here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
