"""Records a call of a root in a streaming step, and all that is needed to run it again."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import get_device_states, set_device_states

from ..dfa import DFA
from ..engine.tape import Tape


class End(BaseException):
    """Ends a second pass at the tap: what follows has learnt from the first pass."""


class Call:
    """Keeps the arguments of a root, and what else its forward pass depends on, to run it again."""

    def __init__(self, root: DFA, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.root, self.args, self.kwargs = root, args, kwargs
        self.inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        _check_call(root, self.inputs)
        self.versions = _versions(self.inputs)
        self.modules = list(root.module.modules())  # to find them takes 1 us a layer
        groups = [module._parameters.values() for module in self.modules]
        self.parameters = [p for group in groups for p in group if p is not None]
        self.trained = tuple(parameter.requires_grad for parameter in self.parameters)
        self.places = {x.device: x for x in [*self.parameters, *self.inputs]}  # one each device
        kinds = {device.type for device in self.places}
        self.kinds = [kind for kind in kinds if torch.amp.is_autocast_available(kind)]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in self.kinds
        ]
        self.key = self._key()

    def _key(self) -> Hashable:
        """Returns what calls share that most likely read the same points, of the same sizes."""
        given = [*tree_leaves((self.args, self.kwargs)), self.root.target]
        modes = (self.root.training, *self.autocast)
        return (*map(_size, given), *self.kwargs, *modes, *self.modules, *self.trained)

    def record(self) -> None:
        """Keeps what `run_again` puts back."""
        self.random = _random_state(self.places)
        self.buffers = _copied(_buffers(self.modules))

    def run(self, tape: Tape) -> Any:
        """Runs a pass that writes on this tape, and returns the module's output."""
        with ExitStack() as stack:
            for settings in self.autocast:
                # No cache: a cast weight that two blocks share would be a way round the cut.
                stack.enter_context(torch.autocast(*settings, cache_enabled=False))
            stack.enter_context(tape.mode())
            return self.root.run(tape, self.args, self.kwargs)

    def run_again(self, tape: Tape) -> None:
        """Runs a pass from the random states and copies of the buffers before the first, and leaves
        those after it."""
        if self.versions != _versions(self.inputs):
            raise RuntimeError(
                "an input of the DFA was modified in place by the model or the closure, and a "
                "StreamingStep needs it as it was for its second pass"
            )
        random, buffers = _random_state(self.places), _buffers(self.modules)
        _set_random_state(self.random)
        _put(_copied(self.buffers))
        try:
            with suppress(End):
                self.run(tape)
        finally:
            _set_random_state(random)
            _put(buffers)

    def without_autocast(self) -> ExitStack:
        """Leaves autocast, for a backward pass, as torch recommends."""
        stack = ExitStack()
        for kind in self.kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return stack


Buffers = dict[tuple[nn.Module, str], Tensor]
RandomState = tuple[Tensor, tuple[list[int], list[Tensor]]]


def _buffers(modules: list[nn.Module]) -> Buffers:
    named = ((module, *item) for module in modules for item in module._buffers.items())
    return {(module, name): x for module, name, x in named if x is not None}


def _copied(buffers: Buffers) -> Buffers:
    copies = {id(x): x.detach().clone() for x in buffers.values()}
    return {place: copies[id(x)] for place, x in buffers.items()}


def _put(buffers: Buffers) -> None:
    for (module, name), x in buffers.items():
        module._buffers[name] = x


def _random_state(places: dict[torch.device, Tensor]) -> RandomState:
    """Returns the state of torch's generators on the CPU and on these devices."""
    # Torch's own walk leaves objects behind that only the garbage collector frees.
    others = [x for device, x in places.items() if device.type != "cpu"]
    return torch.get_rng_state(), get_device_states(*others) if others else ([], [])


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    set_device_states(*state[1])


def _size(x: Any) -> Hashable:
    """Returns what tells a tensor's size; of a plain value, itself."""
    if isinstance(x, Tensor):
        return x.shape, x.dtype, x.device
    return (x,) if isinstance(x, (bool, int, float, str, type(None))) else (type(x),)


def _versions(inputs: list[Tensor]) -> list[int]:
    return [0 if x.is_inference() else x._version for x in inputs]


def _check_call(root: DFA, inputs: list[Tensor]) -> None:
    sharded = any(type(x.data).__name__ == "DTensor" for x in root.module.parameters())
    if sharded or DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "a StreamingStep updates in one process: it cannot be used under "
            "DistributedDataParallel or fully_shard, which exchange gradients"
        )
    if any(x.requires_grad for x in inputs):
        raise ValueError(
            "the inputs of the DFA must not require grad in a StreamingStep, which gives them no "
            "gradient, got one that does: pass x.detach(), and put layers before the DFA inside it"
        )
