"""The build: what the libraries need and leave undefined, what build_info says, how it fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdfa
from fastdfa.ops import loading as build

PACKAGE = Path(fastdfa.__file__).parent
ROOT = PACKAGE.parent
LIBRARIES = {"_C_cpu.so": "libtorch_cpu.so", "_C_cuda.so": "libtorch_cuda.so"}


@pytest.fixture
def ext():
    return pytest.importorskip("fastdfa._ext", reason="the extension is not built")


@pytest.fixture(params=LIBRARIES)
def library(request) -> Path:
    path = PACKAGE / request.param
    if not path.exists():
        pytest.skip(f"{path.name} is not built")
    return path


def inspect(tool: str, *arguments: object) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool} (binutils)")
    command = [tool, *map(str, arguments)]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def python(*arguments: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, text=True, capture_output=True
    )


def test_library_needs_its_torch_by_name_and_no_path(library):
    dynamic = inspect("readelf", "--dynamic", "--wide", library)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert LIBRARIES[library.name] in needed
    # c10, torch_python and the umbrella libtorch have no stable ABI.
    assert {name for name in needed if "torch" in name or "c10" in name} <= set(LIBRARIES.values())
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_library_uses_the_stable_abi_alone(library):
    undefined = inspect("nm", "--dynamic", "--undefined-only", library)
    # The symbols of libc and libstdc++ carry a version after an @; the rest must be torch's C ABI.
    names = [line.split()[-1] for line in undefined.splitlines() if " U " in line]
    unversioned = [name for name in names if "@" not in name]
    assert unversioned
    assert not [name for name in unversioned if not re.match(r"(aoti_)?torch_", name)]


def test_library_names_no_path_of_this_machine(library):
    content = library.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent):
        assert str(folder).encode() not in content


def test_library_exports_nothing(library):
    exported = inspect("nm", "--dynamic", "--defined-only", "--demangle", library)
    assert "fastdfa" not in exported


@pytest.fixture
def built(monkeypatch):
    """cmake/built.py, which reads back what was built."""
    monkeypatch.syspath_prepend(ROOT / "cmake")
    return pytest.importorskip("built", reason="fastdfa is not imported from its checkout")


def test_cuda_library_has_the_architectures_asked_for(ext, built):
    asked = ext.build_facts()["cuda_architectures"]
    if asked is None:
        pytest.skip(f"no CUDA library: {ext.build_facts()['cuda_skipped']}")
    assert built.architectures(PACKAGE / "_C_cuda.so") == asked.split()


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7fastdfa4cuda1kIfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN7fastdfa4cuda1kIfEEvPT_
    80 bytes stack frame, {stores} bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 80 bytes cumulative stack size, 1024 bytes smem
"""


@pytest.mark.parametrize(("source", "fails"), [("gate", True), ("fill_feedback", False)])
def test_a_hot_kernel_that_spills_is_an_error(built, tmp_path, capsys, source, fails):
    folder = tmp_path / "CMakeFiles" / "_C_cuda.dir" / "csrc"
    folder.mkdir(parents=True)
    (folder / f"{source}.cu.o.ptxas").write_text(PTXAS.format(stores=8))
    (kernel,) = built.kernels(tmp_path)
    assert kernel[2:] == ("90a", 40, 1024, 80, 12)
    assert built.print_registers(tmp_path) != fails
    assert ("spills 12 bytes for sm_90a" in capsys.readouterr().out) == fails


def test_kernels_for_one_processor_share_no_symbol_with_others():
    """The linker keeps one of equal weak symbols, which may then hold AVX-512 code for everyone."""
    objects = [*ROOT.glob("build/cmake/CMakeFiles/kernels_avx*.dir/**/*.o")]
    if not objects:
        pytest.skip("the object files of the kernels are not here")
    weak = re.findall(r"^\S* [WVu] (.+)$", inspect("nm", "--demangle", *objects), re.MULTILINE)
    assert not [name for name in weak if not re.search(r"fastdfa::avx(2|512|512_bf16)::", name)]


def test_build_info_names_versions_and_reasons():
    info = fastdfa.build_info()
    assert info["fastdfa"] == fastdfa.__version__
    for device_type in ("cpu", "cuda"):
        assert build.available(device_type) == (device_type in info["kernels"])
        assert build.available(device_type) != bool(info["fallback"].get(device_type))


def test_build_info_has_the_facts_of_the_build(ext):
    facts = ext.build_facts()
    assert facts["torch_target"] == "2.10"
    assert re.fullmatch(r"(GNU|Clang|AppleClang|IntelLLVM) [\d.]+", facts["compiler"])
    assert facts["cpu_capability"] in facts["cpu_capabilities"]
    everything = " ".join([facts["flags"], *facts["cpu_capabilities"].values()])
    assert "-ffast-math" not in everything and "-march=native" not in everything
    if build.available("cpu"):
        assert facts.items() <= fastdfa.build_info().items()


def test_capability_can_be_lowered(ext):
    code = "import fastdfa._ext as e; print(e.build_facts()['cpu_capability'])"
    assert python("-c", code, FASTDFA_CPU_CAPABILITY="baseline").stdout.strip() == "baseline"


@pytest.mark.parametrize("value", ["1", "0"])
def test_extension_can_be_disabled(value):
    code = "import fastdfa; print(fastdfa.build_info()['fallback'].get('cpu'))"
    result = python("-c", code, FASTDFA_DISABLE_EXTENSION=value)
    assert ("FASTDFA_DISABLE_EXTENSION is set" in result.stdout) == (value == "1"), result.stderr


# Known answers of Random123 (Salmon et al., SC 2011), kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def test_philox_known_answers(ext):
    counter, key, expected = (
        np.array([words(answer[i]) for answer in KNOWN_ANSWERS], np.uint32) for i in range(3)
    )
    np.testing.assert_array_equal(ext.philox(counter, key), expected)
    np.testing.assert_array_equal(ext.philox(counter[2:], key[2:]), expected[2:])
    repeated = ext.philox(np.repeat(counter[:1], 5, axis=0), key[:1])  # one key for all
    np.testing.assert_array_equal(repeated, np.repeat(expected[:1], 5, axis=0))
    assert repeated.dtype == np.uint32


@pytest.mark.parametrize("shapes", [((4,), (1, 2)), ((3, 3), (1, 2)), ((3, 4), (2, 2))])
def test_philox_refuses_wrong_shapes(ext, shapes):
    counter, key = (np.zeros(shape, np.uint32) for shape in shapes)
    with pytest.raises(ValueError, match="must have shape"):
        ext.philox(counter, key)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what setup.py reads."""
    pytest.importorskip("setuptools", minversion="77")
    for requirement in ("cmake", "ninja", "pybind11"):
        pytest.importorskip(requirement)
    if not (ROOT / "setup.py").exists():
        pytest.skip("fastdfa is not imported from its checkout")
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "CMakeLists.txt", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "LICENSE").touch()
    for name in ("cmake", "csrc", "fastdfa"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"CXX": "/nonexistent/c++"}, r"no C\+\+ compiler found \(/nonexistent/c\+\+\)"),
        ({"CXX": "false"}, r"false cannot compile C\+\+20"),
        ({"PATH": ""}, r"no C\+\+ compiler found"),
    ],
)
def test_missing_compiler_is_one_sentence(checkout, environment, sentence):
    environment = {"FASTDFA_PURE_PYTHON": "0", "CXX": "", **environment}
    result = python("setup.py", "--quiet", "build_ext", "--inplace", cwd=checkout, **environment)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and re.search(sentence, lines[0]), result.stderr
    assert "FASTDFA_PURE_PYTHON=1" in lines[0]
    assert not list(checkout.glob("build/cmake"))


@pytest.mark.slow
def test_missing_torch_is_one_sentence(checkout):
    code = (
        "import runpy, sys, build_backend; build_backend.find_torch = lambda: None;"
        "sys.argv = ['setup.py', '--quiet', 'build_ext', '--inplace'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = python("-c", code, cwd=checkout, FASTDFA_PURE_PYTHON="0")
    assert result.returncode == 1
    assert re.search(r"error: fastdfa: no PyTorch 2\.10 or later found", result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


@pytest.fixture
def configure(tmp_path):
    """Runs CMake with a pretended nvcc: its exit status and messages."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    cmake, ninja = (shutil.which(name, path=path) for name in ("cmake", "ninja"))
    if not (cmake and ninja and (ROOT / "CMakeLists.txt").exists()):
        pytest.skip("needs cmake, ninja and a checkout")
    nvcc = tmp_path / "nvcc"

    def run(cuda: str, release: str = "12.1", **environment: str) -> tuple[int, str]:
        nvcc.write_text(f"#!/bin/sh\necho release {release}\necho compute_80\necho compute_90\n")
        nvcc.chmod(0o755)
        command = [cmake, "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
        command += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-DFASTDFA_CUDA={cuda}", "-DBUILD_TESTING=OFF", "--log-level=NOTICE"]
        environment = {"CUDACXX": str(nvcc), "TORCH_CUDA_ARCH_LIST": "", **environment}
        result = subprocess.run(
            command, env=os.environ | environment, text=True, capture_output=True
        )
        return result.returncode, " ".join(result.stderr.split())

    return run


NO_NVCC = {"CUDACXX": "/nonexistent/nvcc"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (NO_NVCC, "FASTDFA_CUDA is 1, but no nvcc found"),
        ({"release": "12.0"}, "FASTDFA_CUDA is 1, but CUDA 12.1 or later is needed"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 Hopper"}, 'or semicolons; got "Hopper"'),
        ({"TORCH_CUDA_ARCH_LIST": "9.0;8"}, 'got "8"'),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, 'from 8.0 on that nvcc 12.1 knows; got "7.5"'),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 10.0a+PTX"}, 'knows; got "10.0a+PTX"'),
    ],
)
def test_what_cuda_cannot_be_built_with_is_named(configure, settings, sentence):
    status, messages = configure("1", **settings)
    assert status != 0
    assert sentence in messages


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuda", "settings", "reason"),
    [
        ("auto", NO_NVCC, "no nvcc found"),
        ("auto", {"release": "11.8"}, "CUDA 12.1 or later is needed"),
        ("auto", {}, "this PyTorch is built without CUDA"),
        ("0", {}, "FASTDFA_CUDA is 0"),
    ],
)
def test_why_cuda_is_left_out_is_said(configure, cuda, settings, reason):
    if "PyTorch" in reason and torch.version.cuda:
        pytest.skip("this PyTorch has CUDA")
    status, messages = configure(cuda, **settings)
    assert status == 0, messages
    assert f"no CUDA kernels: {reason}" in messages


@pytest.mark.slow
def test_pure_python_build_compiles_nothing(checkout):
    arguments = ("setup.py", "--quiet", "build_ext", "--inplace")
    result = python(*arguments, cwd=checkout, FASTDFA_PURE_PYTHON="1", CXX="/nonexistent")
    assert result.returncode == 0, result.stderr
    assert not list(checkout.glob("fastdfa/*.so"))


def test_torch_is_a_build_requirement_only_where_none_is_installed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    backend = pytest.importorskip("build_backend")
    monkeypatch.setenv("FASTDFA_PURE_PYTHON", "0")
    assert backend._torch_requirement() == []
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend._torch_requirement() == ["torch>=2.10"]
    monkeypatch.setenv("FASTDFA_PURE_PYTHON", "1")
    assert backend._torch_requirement() == []
