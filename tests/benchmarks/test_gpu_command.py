"""`make gpu` and what takes its results over, with stand-ins for the GPU."""

import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks.harness import collect, gpu
from benchmarks.harness.figures.memory import memory_table

FACTS = {
    "executable": "python3", "python": "3.12", "torch": "2.11", "cuda": "13.0", "missing": [],
    "gpu": "a GPU", "capability": [9, 0], "kernels": ["cpu", "cuda"], "why_not": None,
}  # fmt: skip


def python(code):
    return gpu.Command([sys.executable, "-c", code])


def alive(pid):
    """A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path):
    log, pid = tmp_path / "x.log", tmp_path / "pid"
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '100']); "
    begin = time.monotonic()
    code = gpu.run(python(f"{child}open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"), log, 2)
    assert code == gpu.TIMED_OUT and time.monotonic() - begin < 20
    assert "killed after 2 s" in log.read_text()
    deadline = time.monotonic() + 10
    while alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(pid.read_text()))


def run(monkeypatch, tmp_path, parts, commands, facts=FACTS):
    """main() with these commands in place of the parts' own; its return code."""
    monkeypatch.setattr(gpu, "probe", lambda: facts)
    monkeypatch.setattr(gpu, "commands", lambda part, *_: commands.get(part, [python("print(7)")]))
    return gpu.main([*parts, "--out", str(tmp_path), "--limit", "20"])


def states(tmp_path):
    parts = json.loads((tmp_path / "summary.json").read_text())["parts"]
    return {name: part["state"] for name, part in parts.items()}


def test_a_part_that_fails_stops_no_other(monkeypatch, tmp_path, capsys):
    commands = {"test": [python("print('word'); exit(3)"), python("print('after')")]}
    commands["sanitize"] = []
    assert run(monkeypatch, tmp_path, [], commands) == 1
    assert states(tmp_path) == {
        "build": "ok", "test": "failed", "sanitize": "skipped", "kernels": "ok", "step": "ok",
        "kinds": "ok", "memory": "ok",
    }  # fmt: skip
    assert "after" in (tmp_path / "test.log").read_text()
    printed = capsys.readouterr().out
    assert "word" in printed and "exit code 3, ok" in printed
    assert printed.rstrip().splitlines()[-1].startswith("memory")
    assert run(monkeypatch, tmp_path, ["test"], {}) == 0  # what the others left stays
    assert states(tmp_path)["test"] == "ok" and "kernels" in states(tmp_path)


def test_a_build_that_fails_ends_it(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, [], {"build": [python("exit(1)")]}) == 1
    assert states(tmp_path) == {"build": "failed"}


@pytest.mark.parametrize("facts, words", [
    (dict(missing=["pybind11 (with its CMake files: none)"]), ["missing", "pybind11", "CMake"]),
    (dict(gpu=None), ["finds no GPU", "13.0"]),
    (dict(error="a\nlast line"), ["last line"]),
])  # fmt: skip
def test_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path, capsys, facts, words):
    facts = {k: v for k, v in (FACTS | facts).items() if v is not None or k == "why_not"}
    assert run(monkeypatch, tmp_path, ["build"], {}, facts) == 1
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert all(word in last for word in words), last


def test_kernels_that_do_not_load_fail_the_build(monkeypatch, tmp_path, capsys):
    facts = FACTS | dict(kernels=["cpu"], why_not="no such symbol")
    assert run(monkeypatch, tmp_path, ["build"], {}, facts) == 1
    assert "no such symbol" in capsys.readouterr().out


def test_the_probe_knows_this_environment():
    facts = gpu.probe()
    assert "error" not in facts and facts["executable"] == sys.executable
    assert "torch" not in facts["missing"] and isinstance(facts["kernels"], list)


@pytest.mark.parametrize("part", ["kernels", "step", "kinds", "memory"])
def test_a_part_that_measures_runs_its_script_on_the_gpu(tmp_path, part):
    (command,) = gpu.commands(part, FACTS, tmp_path, 100.0)
    assert command.words[1:3] == ["-m", f"benchmarks.speed.{part}"]
    assert find_spec(command.words[2]) is not None
    rest = " ".join(command.words[3:])
    assert f"--device cuda --out {tmp_path} --budget 70" in rest


def test_the_sanitizer_runs_all_four_tools(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho --kernel-regex\n")
    tool.chmod(0o755)
    found = gpu.sanitizing(str(tool), ["pytest"])
    assert [command.words[2] for command in found] == [
        "memcheck", "racecheck", "synccheck", "initcheck"
    ]  # fmt: skip
    assert ["kns=fastdfa" in command.words for command in found] == [True, True, True, False]
    quiet = ["--report-api-errors" in command.words for command in found]
    assert quiet == [True, False, False, False]


def test_packages_that_the_caller_brings_are_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/there")
    assert gpu.environment()["PYTHONPATH"].split(os.pathsep) == [str(gpu.ROOT), "/there"]
    monkeypatch.delenv("PYTHONPATH")
    assert gpu.environment()["PYTHONPATH"] == str(gpu.ROOT)


def test_the_machine_is_on_record_from_the_first_part_on(monkeypatch, tmp_path, capsys):
    def stopped(*_):
        raise SystemExit(143)

    monkeypatch.setattr(gpu, "report", stopped)  # as by a signal, after the parts
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, ["test"], {})
    assert json.loads((tmp_path / "summary.json").read_text())["machine"]["gpu"] == "a GPU"
    assert "test      ok" in capsys.readouterr().out


# collect.py ------------------------------------------------------------------------------------


def spread(value):
    return {"median": value, "low": value, "high": value}


def result(**changes):
    sides = {"backprop": spread(2.0), "limit": spread(1.0), "fastdfa": spread(1.25)}
    row = {"case": "8x4096 / 4096", "milliseconds": sides, "to_backprop": sides}
    row |= {"to_limit": sides, "peak_mib": {"fastdfa": 1.0}, "failed": {"other": "no memory"}}
    machine = {"gpu": "a GPU", "kernels": ["cpu", "cuda"]}
    return {"machine": machine, "rows": [row]} | changes


def written(folder, content, name="step-cuda"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_results_are_taken_over(tmp_path):
    target = tmp_path / "results"
    target.mkdir()
    lines = collect.collect(written(tmp_path / "run", result()), target)
    assert "8x4096 / 4096, fastdfa: 1.2500 ms (new)" in lines
    assert "8x4096 / 4096, other: failed: no memory" in lines
    assert json.loads((target / "step-cuda.json").read_text()) == result()
    assert (target / "step-cuda.png").stat().st_size > 1000
    faster = result()
    faster["rows"][0]["milliseconds"]["fastdfa"] = spread(1.0)
    lines = collect.collect(written(tmp_path / "run", faster), target)
    assert "8x4096 / 4096, fastdfa: 1.0000 ms (-20%)" in lines


def test_results_of_every_kind_of_network_are_taken_over(tmp_path):
    content = result()
    content["rows"][0] |= {"case": "a network", "bound": 1.2}
    lines = collect.collect(written(tmp_path / "run", content, "kinds-cuda"), tmp_path)
    assert "a network, fastdfa: 1.2500 ms (new)" in lines
    del content["rows"][0]["bound"]
    with pytest.raises(ValueError, match="a network: no bound"):
        collect.collect(written(tmp_path / "run", content, "kinds-cuda"), tmp_path)


def test_results_of_memory_are_taken_over(tmp_path):
    """Also of a run in which a side failed; narrow layers are checked as the others are."""
    row = result()["rows"][0] | {"depth": 8, "width": 64, "batch": 16}
    deeper = row | {"case": "16x64", "depth": 16, "peak_mib": {"fastdfa": 1.0, "backprop": 2.0}}
    narrow = [row | {"case": "narrow"}]
    content = result(rows=[row, deeper], narrow=narrow)
    lines = collect.collect(written(tmp_path / "run", content, "memory-cuda"), tmp_path)
    assert "narrow, fastdfa: 1.2500 ms (new)" in lines
    assert (tmp_path / "memory-cuda.png").stat().st_size > 1000
    assert memory_table(content, "a GPU").count("| - |") > 0
    del narrow[0]["peak_mib"]
    content = result(rows=[row], narrow=narrow)
    with pytest.raises(ValueError, match="narrow: no peak_mib"):
        collect.collect(written(tmp_path / "run", content, "memory-cuda"), tmp_path)


@pytest.mark.parametrize("change, words", [
    (dict(rows=[]), "no rows"),
    (dict(machine={"gpu": "a GPU", "kernels": ["cpu"]}), "without the CUDA kernels"),
    (dict(machine={"kernels": ["cuda"]}), "names no GPU"),
    (dict(rows=[{"case": "a"}]), "no milliseconds"),
    (dict(rows=[result()["rows"][0] | {"peak_mib": {"fastdfa": float("nan")}}]), "is nan"),
])  # fmt: skip
def test_wrong_results_are_refused_and_nothing_is_written(tmp_path, change, words):
    target = tmp_path / "results"
    target.mkdir()
    with pytest.raises(ValueError, match=words):
        collect.collect(written(tmp_path / "run", result(**change)), target)
    assert os.listdir(target) == []


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of"):
        collect.collect(tmp_path, tmp_path)
