"""What was built, read back from the files.

python cmake/built.py wheel DIST         what is inside the newest wheel of the folder DIST
python cmake/built.py registers BUILD    what each CUDA kernel uses; fails where a hot one spills
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

# A fat binary (one for each object file): magic number, version 1, 16 bytes of header, the size of
# what follows; then entries: kind, version, size of the header, of the data, ..., processor, ...,
# flags. NVIDIA publishes no description; these fields are the same in CUDA 12 and 13.
FAT_BINARY = struct.Struct("<IHHQ")
ENTRY = struct.Struct("<HHIQ12xI8xQ")
MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, FAT_BINARY.size)
PTX = 1  # kind; 2 is machine code
SUFFIXES = {1 << 20: "a", 1 << 21: "f"}  # flags


def architectures(library: Path) -> list[str]:
    """What every part of a CUDA library is compiled for, spelled like TORCH_CUDA_ARCH_LIST."""
    common = set.intersection(*map(set, fat_binaries(library.read_bytes())))
    return sorted(common, key=lambda name: float(name.rstrip("+PTXaf")))


def fat_binaries(data: bytes) -> Iterator[list[str]]:
    position = data.find(MAGIC)
    while position >= 0:
        size = FAT_BINARY.unpack_from(data, position)[-1]
        position += FAT_BINARY.size
        end = position + size
        machine_code, ptx = [], []
        while position < end:
            kind, _, header, size, number, flags = ENTRY.unpack_from(data, position)
            suffix = "".join(text for bit, text in SUFFIXES.items() if flags & bit)
            (ptx if kind == PTX else machine_code).append(f"{number / 10}{suffix}")
            position += header + size
        yield [name + "+PTX" * (name in ptx) for name in machine_code]
        position = data.find(MAGIC, end)


class Kernel(NamedTuple):
    """What ptxas reports of a kernel. Bytes, except for the registers of a thread."""

    source: str
    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def hot(self) -> bool:
        """Whether it runs over the activations of a network in every step."""
        return self.source in ("project_gate", "gate", "batch_norm", "layer_norm")


def kernels(build: Path) -> list[Kernel]:
    """Every kernel of the CUDA library in a build folder, for each architecture."""
    found = []
    for report in build.glob("CMakeFiles/_C_cuda.dir/**/*.ptxas"):
        source = report.name.partition(".")[0]
        for text in report.read_text().split("Compiling entry function ")[1:]:
            symbol, architecture = re.match(r"'(\w+)' for 'sm_(\w+)'", text).groups()
            units = ("registers", "bytes smem", "bytes stack frame", "bytes spill")
            numbers = (sum(map(int, re.findall(rf"(\d+) {unit}", text))) for unit in units)
            found.append(Kernel(source, symbol, architecture, *numbers))
    names = demangle([kernel.name for kernel in found])
    return sorted(kernel._replace(name=name) for kernel, name in zip(found, names, strict=True))


def demangle(symbols: list[str]) -> list[str]:
    """Their names without namespaces and parameters; as they are where c++filt is missing."""
    if shutil.which("c++filt") is None:
        return symbols
    command = ["c++filt", "--no-params"]
    result = subprocess.run(command, input="\n".join(symbols), text=True, capture_output=True)
    outer = r"^void |fastdfa::(cuda::)?|\(anonymous namespace\)::"
    return [re.sub(outer, "", line) for line in result.stdout.splitlines()]


def print_registers(build: Path) -> bool:
    """One table of all kernels. Whether no hot one spills."""
    found = kernels(build)
    if not found:
        print(f"No CUDA library in {build}: no registers to report")
        return True
    heading = ("source", "kernel", "sm", "registers", "shared", "stack", "spills")
    rows = [[str(cell) for cell in row] for row in (heading, *found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    bad = [kernel for kernel in found if kernel.hot and kernel.spills]
    for kernel in bad:
        print(f"error: {kernel.name} spills {kernel.spills} bytes for sm_{kernel.architecture}")
    return not bad


def print_wheel(dist: Path) -> None:
    wheel = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    print(f"{wheel}  {wheel.stat().st_size / 2**20:.1f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        package = Path(folder, "fastdfa")
        if not list(package.glob("_ext*")):
            print("  plain Python: no kernels")
            return
        sys.path.insert(0, str(package))  # importing fastdfa itself would take PyTorch
        facts = import_module("_ext").build_facts()
        cuda = package / "_C_cuda.so"
        inside = ", ".join(architectures(cuda)) if cuda.exists() else facts["cuda_skipped"]
    print(f"  CPU      {', '.join(facts['cpu_capabilities'])}")
    print(f"  CUDA     {facts['cuda'] or 'none'}: {inside}")
    print(f"  PyTorch  {facts['torch_target']} and later")


if __name__ == "__main__":
    try:
        action, argument = sys.argv[1:]
        act = {"wheel": print_wheel, "registers": print_registers}[action]
    except (KeyError, ValueError):
        sys.exit(__doc__)
    sys.exit(act(Path(argument)) is False)
