"""Refuses what must not happen while a CUDA graph is captured, as replays would be wrong."""

from __future__ import annotations

import torch

MADE_BEFORE = (
    "a CUDA graph was being captured when a DFA had to {}: after building the model or loading a "
    "checkpoint make a step with such a batch, and capture then"
)


def refuse(message: str) -> None:
    """Raises a RuntimeError with this message inside a capture."""
    initialized = torch.cuda.is_initialized()
    if initialized and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(message)
