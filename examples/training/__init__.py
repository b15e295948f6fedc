"""Trains one network by direct feedback alignment and by backprop, side by side."""
