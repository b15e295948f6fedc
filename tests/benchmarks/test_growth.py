"""The benchmark of growth: in each sweep one thing changes, and all of it is written."""

import json

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.harness.figures import steps
from benchmarks.speed import growth
from benchmarks.speed.mlp import Case


@pytest.mark.parametrize("sweep", growth.SWEEPS)
def test_one_thing_changes(sweep):
    cases = growth.SWEEPS[sweep]
    fixed = {tuple(v for k, v in case._asdict().items() if k != sweep) for case in cases}
    values = [getattr(case, sweep) for case in cases]
    assert len(fixed) == 1 and values == sorted(set(values)) and len(values) > 4


def test_growth_is_written_as_it_is_measured(tmp_path, monkeypatch):
    small = Case(2, 16, 4)
    changed = {"width": 8, "depth": 3, "batch": 2, "classes": 5}
    quick = {name: [small, small._replace(**{name: n})] for name, n in changed.items()}
    monkeypatch.setattr(growth, "QUICK", quick)
    options = ["--quick", "--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path)]
    growth.main(options)
    rows = json.loads((tmp_path / "growth-quick.json").read_text())["rows"]
    assert [row["sweep"] for row in rows] == [name for name in changed for _ in range(2)]
    for row in rows[1::2]:
        assert row[row["sweep"]] == changed[row["sweep"]]
        assert row["to_backprop"].keys() == set(growth.SIDES) and not row["failed"]
    assert (tmp_path / "growth-quick.png").stat().st_size > 1000


def test_where_the_readme_says_that_backprop_is_faster(monkeypatch):
    def row(sweep, value, time):
        return {"sweep": sweep, sweep: value, "to_backprop": {"fastdfa": {"median": time}}}

    rows = [row("depth", 1, 1.25), row("depth", 2, 0.5), row("classes", 50_000, 0.8)]
    machine = dict.fromkeys(["processor", "threads", "cpu_capability", "torch", "date"], "")
    monkeypatch.setattr(steps, "measured", lambda name: True)
    monkeypatch.setattr(steps, "read", lambda name: {"rows": rows, "machine": machine})
    depth, classes = steps.growth().splitlines()[-2:]
    assert depth == "| depth | 1: 0.80x, 2: 2.00x | 1 |"
    assert classes == "| classes | 50,000: 1.25x | nowhere |"
