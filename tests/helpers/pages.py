"""The examples of the README and of docs/."""

import re
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

NEEDS_CUDA = "torch.cuda.CUDAGraph"  # in the text of an example


def blocks(path):
    """The examples of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def run(path):
    """Runs the examples of a page; returns the names that they leave."""
    names: dict = {}
    for block in blocks(path):
        if "import transformers" in block and find_spec("transformers") is None:
            continue  # an optional package
        if NEEDS_CUDA in block and not torch.cuda.is_available():
            continue
        exec(compile(block, path, "exec"), names)
    return names
