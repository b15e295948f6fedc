"""Training neural networks by direct feedback alignment (DFA), faster than backprop."""

from . import matrices, ops, projectors, signals
from .alignment import AlignmentMonitor, alignment
from .build import build_info
from .conv import Conv1d, Conv2d
from .convert import convert
from .dfa import DFA, backprop
from .feedback import PRESETS, Feedback
from .forward_gradient import forward_gradient
from .inspect import inspect
from .layer_feedback import LayerFeedback
from .layers import FeedbackPoint, Linear
from .stream import StreamingStep
from .surrogate import Surrogate

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
