"""The Python of the README and of docs/ runs as it stands, from top to bottom; their links lead
somewhere, and their figures are those of the tracked results."""

import contextlib
import copy
import re
import runpy
import sys
from unittest.mock import Mock

import pytest
import torch
from helpers.networks import assert_close
from helpers.pages import NEEDS_CUDA, ROOT, blocks, run

from benchmarks.harness.figures import memory

PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


@pytest.mark.slow  # compiles
def test_the_recipes_run():
    torch._dynamo.reset()  # it leaves functions alone in which other tests had to break the graph
    names = run("docs/pytorch.md")
    assert names["tapped"].output == "1"
    assert all(p.grad.abs().sum() > 0 for p in names["model"].parameters())


class GraphOnCpu:
    """In place of a CUDA graph: a replay calls what was captured."""

    replays = 0

    def replay(self):
        self.replays += 1
        self.step()


def test_the_recipe_of_a_cuda_graph_but_for_the_graph(monkeypatch):
    """On the CPU: each batch is one more ordinary step."""
    (block,) = [block for block in blocks("docs/pytorch.md") if NEEDS_CUDA in block]
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
    exec(compile(block, "docs/pytorch.md", "exec"), names)
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


def test_the_examples_of_the_first_page_run():
    names = run("README.md")
    assert names["model"].feedback_points == ["1", "2"]
    for parameter in names["model"].parameters():
        assert parameter.grad.abs().sum() > 0
    points = [names[name].feedback_points for name in ("dfa", "pairs", "chosen", "exact")]
    assert points == [list("12345678"), list("2468"), ["4", "8"], []]
    assert names["per_block"].feedback_points == ["0", "1.layers.0", "1.layers.1"]


def test_the_networks_run():
    names = run("docs/networks.md")
    names["deep"](names["x"]).sum().backward()
    assert names["deep"].feedback_points == ["1", "2.point", "3.point"]
    networks = ["cnn", "resnet", "language_model", "gcn", "recurrent", "two_tasks"]
    for name in networks + ["gpt2"] * ("gpt2" in names):
        assert len(names[name].feedback_points) > 0, name
        for parameter in names[name].parameters():
            assert parameter.grad.abs().sum() > 0, name


def test_the_uncut_network_runs():
    names = run("docs/speed.md")
    model = names["fused_backprop"]
    assert model.feedback_points == []
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_recipe_of_a_network_runs():
    names = run("docs/accuracy.md")
    names["best"](torch.randn(8, 3072)).sum().backward()
    assert names["best"].feedback_points == ["3", "6", "9"]


def test_the_streaming_step_runs():
    names = run("docs/streaming.md")
    assert names["loss"] > 0 and all(p.grad is None for p in names["streamed"].parameters())


def test_the_rules_run():
    names = run("docs/rules.md")
    for name in ["binary", "fa", "spiking"]:
        for parameter in names[name].parameters():
            assert parameter.grad.abs().sum() > 0, name


def test_every_page_with_examples_is_run_here():
    here = (ROOT / "tests/test_readme.py").read_text()
    for page in PAGES:
        assert not blocks(page) or f'run("{page}")' in here, page


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked.relative_to(ROOT.resolve())), target


def test_the_first_page_leads_to_every_other():
    text = (ROOT / "README.md").read_text()
    assert [page for page in PAGES[1:] if f"]({page})" not in text] == []


@pytest.mark.parametrize("changed", [False, True])
def test_check_says_whether_the_figures_are_those_of_the_results(changed, monkeypatch):
    """As a command: it once ended well without having looked."""
    monkeypatch.setattr(sys, "argv", ["readme", "--check"])
    monkeypatch.delitem(sys.modules, "benchmarks.harness.readme", raising=False)
    if changed:
        monkeypatch.setattr(memory, "memory", lambda: "other figures")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("benchmarks.harness.readme", run_name="__main__")
    assert end.value.code == changed
