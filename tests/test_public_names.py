"""The names that a user imports: they are there, of their types, and hide no module."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

import fastdfa

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(fastdfa.__path__, "fastdfa.")
    if not name.startswith("fastdfa._")  # what is compiled, where it is
]
WITH_ALL = [
    name for name in ["fastdfa", *MODULES] if hasattr(importlib.import_module(name), "__all__")
]


def test_the_result_types_can_be_imported():
    from fastdfa.conversion import Conversion
    from fastdfa.diagnostics import (
        Alignment,
        AlignmentMonitor,
        Inspection,
        PointAlignment,
        Row,
    )

    kinds = (Alignment, AlignmentMonitor, Conversion, Inspection, PointAlignment, Row)
    assert all(isinstance(kind, type) for kind in kinds)
    assert AlignmentMonitor is fastdfa.AlignmentMonitor


@pytest.mark.parametrize("name", WITH_ALL)
def test_all_names_what_there_is_once(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []


def test_all_of_the_package_is_its_public_names():
    public = {name for name in vars(fastdfa) if not name.startswith("_")}
    modules = {name.split(".")[1] for name in MODULES}
    assert set(fastdfa.__all__) - {"__version__"} == public - (modules - set(fastdfa.__all__))


@pytest.mark.parametrize("name", MODULES)
def test_no_name_of_a_package_hides_one_of_its_modules(name):
    package, _, inside = name.rpartition(".")
    module = importlib.import_module(name)
    assert getattr(importlib.import_module(package), inside) is module


USER = """
from torch import Tensor, nn
import fastdfa
from fastdfa.conversion import Conversion
from fastdfa.diagnostics import Alignment, Inspection

def train(network: nn.Module, x: Tensor, y: Tensor) -> None:
    model = fastdfa.convert(network)
    root: fastdfa.DFA = model.fastdfa
    other: nn.Module = fastdfa.convert(network, rule="fa")
    change: Conversion = model.conversion
    measured: Alignment = fastdfa.alignment(model, nn.functional.mse_loss, x, y)
    found: Inspection = fastdfa.inspect(other, x)
    B: list[nn.Parameter] = model.learn_feedback()
    mean: float = measured["0"].mean
    source: str = found["0.weight"].source
    fastdfa.Feedback(scale=[1.0])  # the one error
"""


@pytest.mark.slow
def test_a_strict_type_checker_sees_the_types(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    script = tmp_path / "user.py"
    script.write_text(USER)
    monkeypatch.setenv("MYPYPATH", str(Path(fastdfa.__path__[0]).parent))
    monkeypatch.chdir(tmp_path)
    out, errors, _ = api.run(["--strict", str(script)])
    assert errors == ""
    wrong = [line for line in out.splitlines() if "error:" in line]
    assert len(wrong) == 1 and "scale" in wrong[0], out
