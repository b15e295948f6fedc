"""The build backend: setuptools, plus PyTorch as a build requirement where none is installed.

Compiling needs PyTorch's headers and nothing else of it, and those of any version from 2.10 on
give the same binary (stable ABI). So the PyTorch that is installed already will do, and naming
"torch" in pyproject.toml would download gigabytes into each isolated build for nothing.
"""

from __future__ import annotations

import os
import platform
import re
import site
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks

OLDEST_TORCH = (2, 10)


def pure_python() -> bool:
    """Whether to install without compiling: on request, and where that is untried."""
    requested = os.environ.get("FASTDFA_PURE_PYTHON", "") not in ("", "0")
    return requested or platform.system() != "Linux"


def find_torch() -> Path | None:
    """Directory of an installed PyTorch that is new enough to build against.

    pip isolates a build by taking the site-packages off the path of the very interpreter that it
    installs for; PyTorch is still to be found there.
    """
    installed = site.getsitepackages([sys.prefix, sys.base_prefix])
    for spec in (find_spec("torch"), PathFinder.find_spec("torch", installed)):
        for location in (spec and spec.submodule_search_locations) or ():
            version = Path(location, "version.py")
            match = version.is_file() and re.search(
                r"__version__ = '(\d+)\.(\d+)", version.read_text()
            )
            if match and (int(match[1]), int(match[2])) >= OLDEST_TORCH:
                return Path(location)
    return None


def _torch_requirement() -> list[str]:
    needed = not pure_python() and find_torch() is None
    return [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"] if needed else []


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
