"""Settings and fixtures of every test. What the tests share is in helpers/."""

import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers.networks import mlp
from hypothesis import HealthCheck, configuration, settings
from torch import nn

import fastdfa

torch.set_num_threads(2)

# Failures found are kept beside pytest's own cache, and tried first in the next run.
configuration.set_hypothesis_home_dir(Path(__file__).parents[1] / ".pytest_cache" / "hypothesis")
# The fixture that sets the seed is no matter: what hypothesis runs sets it itself.
UNCHECKED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("local", deadline=None, suppress_health_check=UNCHECKED)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


# What the kernels and plain PyTorch compute, each in its own way: what the run without the
# extension repeats. The others are about which points there are, what is refused, processes and
# threads, documentation and scripts; by the programs, the machine and the ways below all of that
# runs without the extension too.
DIFFERS = {
    "test_build.py", "test_errors.py", "ops", "engine/test_autocast.py", "engine/test_chain.py",
    "engine/test_cut.py", "engine/test_general_path.py", "engine/test_gradients.py",
    "engine/test_in_place.py", "engine/test_in_turn.py", "engine/test_machine.py",
    "engine/test_network.py", "engine/test_programs.py", "engine/test_ways.py",
    "feedback/test_feedback.py", "nn", "streaming/test_one_pass.py", "streaming/test_stream.py",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        if {path.as_posix(), path.parts[0]} & DIFFERS:
            item.add_marker("kernels")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "kernels: what the kernels and plain PyTorch compute, each in its own way"
    )
    config.addinivalue_line(
        "markers", "sanitize: the short selection that compute-sanitizer runs on a GPU"
    )


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Every test draws the same weights, alone or in any order."""
    torch.manual_seed(0)


def idle(*arguments):
    """A hook that does nothing."""


@pytest.fixture(params=["network", "chain", "layers"])
def path(request, monkeypatch):
    """Gives the layers of an `nn.Sequential` the three ways in which they may be computed.

    "network": all at once, as nothing is there that could notice. "chain": an idle hook waits for
    the call of every `nn.Sequential`, so that it has to be called, and layers at most one after the
    other ahead of their calls. "layers": such a hook waits for each layer, which is called alone.
    """
    if request.param == "network":
        return request.param
    kinds = nn.Sequential if request.param == "chain" else (nn.Linear, nn.Conv2d)
    forward, hooked = fastdfa.DFA.forward, weakref.WeakSet()

    def forward_with_hooks(self, *args, **kwargs):
        for module in self.module.modules():
            if isinstance(module, kinds) and module not in hooked:
                module.register_forward_hook(idle)
                hooked.add(module)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(fastdfa.DFA, "forward", forward_with_hooks)
    return request.param


@pytest.fixture
def model():
    """A fused MLP in float64."""
    return mlp([5, 8, 7, 3])


@pytest.fixture(autouse=True)
def _no_compiled_code_is_left():
    """Dynamo leaves a function alone for good in which it had to break the graph of a test."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()
        dynamo.utils.counters.clear()
