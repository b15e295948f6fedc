"""Trains neural networks by direct feedback alignment (DFA), faster than backprop."""

from . import matrices, ops, projectors, signals
from .conversion import convert
from .dfa import DFA, backprop
from .diagnostics.alignment import alignment
from .diagnostics.checking import check
from .diagnostics.inspection import inspect
from .diagnostics.monitor import AlignmentMonitor
from .feedback.rule import PRESETS, Feedback
from .forward_mode import forward_gradient
from .info import build_info
from .layerwise import LayerFeedback
from .nn.conv import Conv1d, Conv2d
from .nn.linear import Linear
from .nn.point import FeedbackPoint
from .nn.surrogate import Surrogate
from .streaming.step import StreamingStep
from .version import __version__

__all__ = [
    "DFA",
    "PRESETS",
    "AlignmentMonitor",
    "Conv1d",
    "Conv2d",
    "Feedback",
    "FeedbackPoint",
    "LayerFeedback",
    "Linear",
    "StreamingStep",
    "Surrogate",
    "__version__",
    "alignment",
    "backprop",
    "build_info",
    "check",
    "convert",
    "forward_gradient",
    "inspect",
    "matrices",
    "ops",
    "projectors",
    "signals",
]
