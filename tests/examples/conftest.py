import pytest
import torch


@pytest.fixture(autouse=True)
def keep_threads():
    """Puts the number of threads back, which some commands set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
