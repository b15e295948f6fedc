"""The Python of the README and of docs/ runs as it stands, from top to bottom."""

import contextlib
import copy
import re
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from networks import assert_close

ROOT = Path(__file__).parent.parent


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


@pytest.mark.slow  # compiles
def test_the_recipes_run():
    names = run("docs/performance.md")
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())


class GraphOnCpu:
    """In place of a CUDA graph: a replay calls what was captured."""

    replays = 0

    def replay(self):
        self.replays += 1
        self.step()


def test_the_recipe_of_a_cuda_graph_but_for_the_graph(monkeypatch):
    """On the CPU: each batch is one more ordinary step."""
    (block,) = [block for block in blocks("docs/performance.md") if NEEDS_CUDA in block]
    for there, here in (('"cuda"', '"cpu"'), ("capturable=True", "capturable=False")):
        assert there in block
        block = block.replace(there, here)
    names: dict = {}
    other = []  # the model and its optimizer as they are at the capture

    @contextlib.contextmanager
    def capturing(graph):
        other.extend(copy.deepcopy([names["model"], names["optimizer"]]))
        graph.step = names["step"]
        yield
        for now, before in zip(names["model"].parameters(), other[0].parameters(), strict=True):
            now.data.copy_(before)  # as if it had not run
        names["optimizer"].load_state_dict(copy.deepcopy(other[1].state_dict()))

    stream = Mock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", GraphOnCpu)
    exec(compile(block, "docs/performance.md", "exec"), names)
    assert names["graph"].replays == 4 and stream.wait_stream.call_count == 2
    model, _ = other
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(other[1].state_dict())
    for inputs, targets in names["batches"]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    steps = {state["step"].item() for state in names["optimizer"].state.values()}
    assert steps == {3 + 4}
    assert_close(*(dict(m.module.named_parameters()) for m in (names["model"], model)), 1e-6)


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


def test_the_rules_run():
    names = run("docs/rules.md")
    for name in ["binary", "fa", "spiking"]:
        for parameter in names[name].parameters():
            assert parameter.grad.abs().sum() > 0, name
