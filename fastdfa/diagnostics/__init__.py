"""Measures what training does to a model; here are the types of the results."""

from .alignment import Alignment, PointAlignment
from .checking import Check
from .inspection import Inspection, Row
from .monitor import AlignmentMonitor

__all__ = ["Alignment", "AlignmentMonitor", "Check", "Inspection", "PointAlignment", "Row"]
