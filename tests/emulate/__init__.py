"""The kernels on the CPU: built by g++ behind ``emulate.h``, driven by the same arguments as on a GPU."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ltd_fx.cuda import launch
from ltd_fx.cuda.compile import read_source
from ltd_fx.cuda.driver import NAMES, Dim3

ARGS = {
    "sample_tokens": launch.SampleArgs,
    "gather_rows": launch.GatherArgs,
    "merge_rows": launch.MergeArgs,
    "gather_aligned": launch.AlignedArgs,
    "gather_mask": launch.MaskArgs,
}
HERE = Path(__file__).parent


def build(main: str, out: Path, *flags: str, kernels: str | None = None) -> Path:
    """Compile ``main`` (of this folder) with the kernels in it, or with others."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    command = ["g++", "-std=c++20", "-O1", "-g", "-pthread", "-Wall", "-Wno-unknown-pragmas", *flags]
    source = out.with_suffix(".cu")
    source.write_text(read_source().decode() if kernels is None else kernels)
    subprocess.run([*command, f'-DKERNELS="{source}"', str(HERE / main), "-o", str(out)], check=True)
    return out


@cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(build("library.cpp", Path(folder, "kernels.so"), "-shared", "-fPIC")))


class Emulated:
    """In place of :class:`ltd_fx.cuda.driver.LoadedKernels`, for tensors on the CPU; ``launches`` keeps the record."""

    def __init__(self, run: bool = True) -> None:
        self.launches: list[tuple[str, Any, Dim3, Dim3]] = []
        self.library = library() if run else None

    def launch(self, name: str, args: ctypes.Structure, grid: Dim3, block: Dim3) -> None:
        assert name in NAMES
        self.launches.append((name, args, grid, block))
        if self.library is not None:
            dims = ctypes.c_uint * 3
            getattr(self.library, f"run_{name}")(ctypes.byref(args), dims(*grid), dims(*block))
