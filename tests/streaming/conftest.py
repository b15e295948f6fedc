"""A fixture of the tests of streaming."""

import pytest

import fastdfa


@pytest.fixture(params=["each layer", "together"])
def workspace(request, monkeypatch):
    """Without room for two layers every point is fed alone; with it, small layers together."""
    if request.param == "each layer":
        monkeypatch.setattr(fastdfa.engine.stages, "WORKSPACE_BYTES", {"cpu": 0})
