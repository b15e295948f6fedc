"""Training neural networks by direct feedback alignment (DFA), faster than backprop."""

from . import ops
from .build import build_info
from .dfa import DFA, backprop
from .feedback import PRESETS, Feedback
from .layers import FeedbackPoint, Linear

__version__ = "0.1.0"

__all__ = [
    "DFA",
    "PRESETS",
    "Feedback",
    "FeedbackPoint",
    "Linear",
    "__version__",
    "backprop",
    "build_info",
    "ops",
]
