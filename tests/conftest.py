"""Settings of every test. Helpers are in formulas.py (the mathematics) and networks.py (models)."""

import pytest
import torch
from networks import mlp

import fastdfa
from fastdfa.engine import network

torch.set_num_threads(2)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "sanitize: the short selection that compute-sanitizer runs on a GPU"
    )


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Every test draws the same weights, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(params=["network", "chain", "layers"])
def path(request, monkeypatch):
    """How layers in an `nn.Sequential` are computed: by one node, as a chain, each by its call."""
    if request.param != "network":
        monkeypatch.setattr(network, "find", lambda *args: None)
    if request.param == "layers":
        monkeypatch.setattr(fastdfa.DFA, "looks_ahead", False)
    return request.param


@pytest.fixture
def model():
    """A fused MLP in float64."""
    return mlp([5, 8, 7, 3])
