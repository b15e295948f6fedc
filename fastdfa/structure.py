"""Looks at one forward pass of a plain network for where it can be cut: `Structure`."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from .diagnostics.untouched import called, left_as_it_was


class _Call(NamedTuple):
    """Holds a call of a module: the nodes of the first tensors that it was given and returned."""

    name: str
    module: nn.Module
    read: Node | None
    made: Node | None
    output: Any


class Structure(NamedTuple):
    """Says where a network can be cut.

    Attributes:
        blocks: by name, the smallest modules round every layer that has a skip connection or a
            branch beside it, where what is above them reads nothing else than what they return.
        output: the name of the submodule that made the model's output, or of a structure of
            tensors the largest of these; None where the output is one tensor, or nobody's.
        returned: what the model returned.
    """

    blocks: dict[str, nn.Module]
    output: str | None
    returned: Any


def look_at(model: nn.Module, example: Any, output: str | None) -> Structure:
    """Runs a plain model on an example, and leaves it as it was.

    Args:
        output: as in `DFA`, of a model that returns something else than a tensor.
    """
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(_note(calls, name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        with left_as_it_was(model):
            returned = called(model, example)
    finally:
        for handle in handles:
            handle.remove()
    name = output
    if output is None and not isinstance(returned, Tensor):
        name = _maker_of(returned, calls)
    error_at = next((call.made for call in calls if call.name == name), None)
    if name is None:
        error_at = returned.grad_fn if isinstance(returned, Tensor) else None
    return Structure(_blocks(calls, error_at), name, returned)


def patterns(names: list[str], model: nn.Module) -> list[str]:
    """Returns these names as `blocks` takes them, a `*` for numbers where none else match."""
    of_model = [name for name, _ in model.named_modules()]
    found: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        like = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        alike = [other for other in of_model if like.fullmatch(other)]
        found[pattern if set(alike) <= set(names) else name] = None
    return list(found)


def _note(calls: list[_Call], name: str) -> Callable[..., None]:
    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append(_Call(name, module, _node((args, kwargs)), _node(output), output))

    return note


def _node(tensors: Any) -> Node | None:
    """Returns what made the first tensor, as the first of a tuple is the point of a block."""
    first = next((x for x in tree_leaves(tensors) if isinstance(x, Tensor)), None)
    return None if first is None else first.grad_fn


def _maker_of(returned: Any, calls: list[_Call]) -> str | None:
    """Returns the module that made the largest of the tensors, the smallest such module."""
    tensors = [x for x in tree_leaves(returned) if isinstance(x, Tensor) and x.dim() > 1]
    for x in sorted(tensors, key=Tensor.numel, reverse=True):
        for call in calls:  # those inside end before
            if x.grad_fn is not None and call.output is x:
                return call.name
    return None


def _blocks(calls: list[_Call], error_at: Node | None) -> dict[str, nn.Module]:
    if error_at is None:
        return {}
    single = set(_all_pass_by(error_at))
    ends = {call.name: place for place, call in enumerate(calls)}  # in the order in which they end
    whole = {
        call.name: call.module
        for call in calls
        if call.made in single and call.made is not error_at and _begins_with_a_tensor(call.output)
        if call.read is None or call.read in single or not call.read.next_functions
        if sum(other.name == call.name for other in calls) == 1
    }
    inside: dict[str, str] = {}  # for each layer with another way beside it, the smallest of these
    for call in calls:
        own = any(p is not None for p in call.module._parameters.values())
        if own and call.made is not None and call.made not in single:
            around = [name for name in whole if call.name.startswith(f"{name}.")]
            inside |= {call.name: max(around, key=len)} if around else {}
    chosen: set[str] = set()
    for layer, name in sorted(inside.items(), key=lambda item: -len(item[1])):
        # As an embedding, in a model of blocks: the first of these is behind it.
        if not any(other.startswith(f"{name}.") and ends[layer] < ends[other] for other in chosen):
            chosen.add(name)
    return {call.name: call.module for call in calls if call.name in chosen}


def _begins_with_a_tensor(output: Any) -> bool:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return isinstance(first, Tensor)


def _all_pass_by(top: Node) -> Iterator[Node]:
    """Yields the nodes through which every way from the top leads down to what is below them.

    Autograd numbers nodes as they are made: taken from the newest down, one that is alone among
    those still to be taken is passed by all. Parameters are ends, and not counted.
    """
    waiting, seen = [(-top._sequence_nr(), 0, top)], {top}
    while waiting:
        _, _, node = heapq.heappop(waiting)
        if not waiting:
            yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen and not hasattr(after, "variable"):
                seen.add(after)
                heapq.heappush(waiting, (-after._sequence_nr(), len(seen), after))
