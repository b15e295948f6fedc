"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["model"].feedback_points == ["1", "2"]
    for parameter in names["model"].parameters():
        assert parameter.grad.abs().sum() > 0
    names["deep"](names["x"]).sum().backward()
    assert names["deep"].feedback_points == ["1", "2.point", "3.point"]
