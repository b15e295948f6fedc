"""Settings of every test. Helpers are in formulas.py (the mathematics) and networks.py (models)."""

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _fixed_seed():
    """Every test draws the same weights, alone or in any order."""
    torch.manual_seed(0)
