"""Training neural networks by direct feedback alignment (DFA), faster than backprop."""

from . import matrices, ops, projectors, signals
from .conversion import convert
from .dfa import DFA, backprop
from .diagnostics.alignment import AlignmentMonitor, alignment
from .diagnostics.inspection import inspect
from .feedback.rule import PRESETS, Feedback
from .forward_mode import forward_gradient
from .layerwise import LayerFeedback
from .nn.conv import Conv1d, Conv2d
from .nn.linear import FeedbackPoint, Linear
from .nn.surrogate import Surrogate
from .ops.loading import build_info
from .streaming.step import StreamingStep

__version__ = "0.1.0"

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
    "convert",
    "forward_gradient",
    "inspect",
    "matrices",
    "ops",
    "projectors",
    "signals",
]
