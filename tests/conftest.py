"""Settings of every test. Helpers are in formulas.py (the mathematics) and networks.py (models)."""

import pytest
import torch
from networks import mlp

torch.set_num_threads(2)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "sanitize: the short selection that compute-sanitizer runs on a GPU"
    )


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Every test draws the same weights, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture
def model():
    """A fused MLP in float64."""
    return mlp([5, 8, 7, 3])
