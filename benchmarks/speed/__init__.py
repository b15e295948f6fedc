"""How fast a training step, its kernels and its memory are, beside backprop."""
