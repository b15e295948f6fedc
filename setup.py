"""Drives the build that CMakeLists.txt defines. Environment variables:

FASTDFA_PURE_PYTHON=1   install without compiling: plain PyTorch runs instead of the kernels
FASTDFA_CUDA=1 or 0     build the CUDA library, or leave it out (default: build it where nvcc is
                        found and the installed PyTorch is a CUDA build)
CUDACXX, CUDA_HOME      which nvcc (default: the one on the PATH, then /usr/local/cuda)
TORCH_CUDA_ARCH_LIST    the GPU architectures, such as "8.0 9.0+PTX"
FASTDFA_LOCAL_VERSION   a local version for wheels: cu13 makes fastdfa-0.1.0+cu13-...
CXX                     the C++ compiler
CMAKE_ARGS              further options for CMake, such as -DFASTDFA_WERROR=ON
MAX_JOBS                how many compilers run at once (default: one for each processor)
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

from build_backend import find_torch, pure_python

ROOT = Path(__file__).resolve().parent
READ_BY_CMAKE = ("CUDACXX", "CUDA_HOME", "CUDAHOSTCXX", "TORCH_CUDA_ARCH_LIST")
INSTEAD = "or set FASTDFA_PURE_PYTHON=1 to install without compiled kernels"
CXX20 = "#include <bit>\n#include <concepts>\n#include <span>\nstatic_assert(std::integral<int>);"


class CMakeBuild(build_ext):
    def run(self):
        if find_spec("pybind11") is None:
            raise missing("pybind11")
        settings = [
            tool("cmake"),
            *("-S", str(ROOT), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"),
            f"-DCMAKE_CXX_COMPILER={';'.join(compiler())}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTDFA_TORCH={torch()}",
            f"-DFASTDFA_CUDA={os.environ.get('FASTDFA_CUDA') or 'auto'}",
            "-DBUILD_TESTING=OFF",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        package = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
        cmake_build(ROOT / "build" / "cmake", settings, package)


def cmake_build(build: Path, settings: list[str], package: Path) -> None:
    """Configures and compiles in `build`, anew where settings changed; installs to `package`."""
    record = build / "settings.txt"
    environment = [f"{name}={os.environ.get(name, '')}" for name in READ_BY_CMAKE]
    wanted = "\n".join(settings + environment)
    if not record.exists() or record.read_text() != wanted:
        shutil.rmtree(build, ignore_errors=True)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    cmake, *options = settings
    run(cmake, *options, "-B", build, "--log-level=NOTICE")
    record.write_text(wanted)
    run(cmake, "--build", build, "--parallel", jobs)
    for library in package.glob("_C_*.so"):  # one that is no longer built must not be loaded
        library.unlink()
    run(cmake, "--install", build, "--prefix", package)


def run(*command) -> None:
    try:
        subprocess.run(command, check=True)
    except subprocess.CalledProcessError:
        raise ExecError(f"fastdfa: the build failed, see above; fix it {INSTEAD}") from None


def tool(name: str) -> str:
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    path = shutil.which(name, path=scripts)
    if path is None:
        raise missing(name)
    return path


def missing(requirement: str) -> ExecError:
    return ExecError(f"fastdfa: no {requirement} found; `pip install {requirement}`, {INSTEAD}")


def compiler() -> list[str]:
    """The command of the C++ compiler, tried on a few lines of C++20."""
    name = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    command = shlex.split(name)
    check = [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    try:
        subprocess.run(check, input=CXX20, text=True, capture_output=True, check=True)
    except OSError:
        problem = f"no C++ compiler found ({name})"
    except subprocess.CalledProcessError:
        problem = f"{name} cannot compile C++20"
    else:
        return command
    raise ExecError(f"fastdfa: {problem}; install g++ 11 or later, set CXX, {INSTEAD}")


def torch() -> Path:
    path = find_torch()
    if path is None:
        raise ExecError(f"fastdfa: no PyTorch 2.10 or later found; install it first, {INSTEAD}")
    return path


if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit("error: fastdfa: setuptools 77 or later is needed; `pip install -U setuptools`")
if pure_python():
    setup()
else:
    local = os.environ.get("FASTDFA_LOCAL_VERSION")
    setup(
        ext_modules=[Extension("fastdfa._ext", [])],
        cmdclass={"build_ext": CMakeBuild},
        options={"egg_info": {"tag_build": f"+{local}"}} if local else {},
    )
