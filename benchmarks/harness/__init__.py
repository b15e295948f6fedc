"""What the benchmarks share: timing, result files, figures, and the run on a GPU."""
