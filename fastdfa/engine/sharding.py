"""Makes FSDP2 (`fully_shard`) work around blocks that end in a feedback point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves

from .tape import state


def watch_sharded_blocks(module: nn.Module) -> bool:
    """Puts `_gather_at_feedback` on the blocks that `fully_shard` has taken, in this process.

    Returns whether there are any.

    Looked for in every forward pass, as blocks are sharded at any time, but only where processes
    have met; a walk over 200 modules takes 0.1 ms.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    blocks = [block for block in module.modules() if isinstance(block, FSDPModule)]
    for block in blocks:
        if _gather_at_feedback not in block._forward_hooks.values():
            block.register_forward_hook(_gather_at_feedback)
    return bool(blocks)


def _gather_at_feedback(block: nn.Module, args: Any, output: Any) -> None:
    """Makes a block whose output is cut gather its weights when feedback comes; a forward hook.

    FSDP frees them after the forward pass, and gathers them when a gradient reaches the block's
    output. Behind the cut none ever does.
    """
    tape = state.tape
    if tape is None or tape.points is None or not torch.is_grad_enabled():
        return
    if any(x.requires_grad for x in tree_leaves(output) if isinstance(x, Tensor)):
        return
    newest = tape.points
    if all(newest.layer is not module for module in block.modules()):
        return
    newest.token.register_hook(_pre_backward(block))


def _pre_backward(block: Any) -> Any:
    """Returns what FSDP itself does when a gradient reaches the block's output; it has no public
    name."""
    try:
        return block._get_fsdp_state()._pre_backward
    except AttributeError:
        raise RuntimeError(
            f"a {type(block).__name__} ends in a FeedbackPoint and is sharded whole by "
            f"fully_shard, which this PyTorch, {torch.__version__}, does only for blocks whose "
            "output has a gradient: shard what is before the point, or give fully_shard "
            "reshard_after_forward=False"
        ) from None
