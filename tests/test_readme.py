"""The Python of the README and of docs/ runs as it stands, from top to bottom."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(path):
    """Runs the examples of a page; returns the names that they leave."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL):
        if "import transformers" in block and find_spec("transformers") is None:
            continue  # an optional package
        exec(compile(block, path, "exec"), names)
    return names


@pytest.mark.slow  # compiles
def test_the_recipes_run():
    names = run("docs/performance.md")
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())


def test_the_examples_run():
    names = run("README.md")
    assert names["model"].feedback_points == ["1", "2"]
    for parameter in names["model"].parameters():
        assert parameter.grad.abs().sum() > 0
    names["deep"](names["x"]).sum().backward()
    assert names["deep"].feedback_points == ["1", "2.point", "3.point"]
    networks = ["cnn", "resnet", "language_model", "gcn", "recurrent", "two_tasks"]
    for name in networks + ["gpt2"] * ("gpt2" in names):
        assert len(names[name].feedback_points) > 0, name
        for parameter in names[name].parameters():
            assert parameter.grad.abs().sum() > 0, name
