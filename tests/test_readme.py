"""The README's Python runs as it stands, from top to bottom."""

import re
from importlib.util import find_spec
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        if "import transformers" in block and find_spec("transformers") is None:
            continue  # an optional package
        exec(compile(block, "README.md", "exec"), names)
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
