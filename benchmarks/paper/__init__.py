"""The experiments of arXiv 1906.04554 on CIFAR-10: `python -m benchmarks.paper`."""
