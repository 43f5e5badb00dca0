"""The real bindings, on a driver made for the test: NVRTC, the folder, cuda.bindings and the launch, all but a GPU."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from emulate import build

from ltd_fx.cuda.driver import NAMES

pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings, which comes with torch's CUDA wheels, is missing")

PROGRAM = """
import contextlib, ctypes, sys, types
import torch
from ltd_fx.cuda import compile, ops

torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.current_device = lambda: 0
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=1000)
compile.load_or_compile("sm_90")  # now, for NVRTC looks into the driver too, and finds too little in ours
ctypes.CDLL(sys.argv[1])  # what is loaded under the name libcuda.so.1 is what the bindings find

hidden, key, site, right = torch.randn(3, 50, 24), torch.tensor(5), torch.tensor(1), torch.ops.ltd_fx
indices = ops.sample_tokens(key, site, hidden, 3, 50, 20)
kept = ops.gather_tokens(hidden, indices)
assert torch.equal(indices, right.sample_tokens(key, site, hidden, 3, 50, 20))
assert torch.equal(kept, right.gather_tokens(hidden, indices))
assert torch.equal(ops.scatter_tokens(hidden, indices, -kept), right.scatter_tokens(hidden, indices, -kept))
table = ops.gather_aligned([hidden, hidden[:1].bool()], indices, [1, 1])
assert all(map(torch.equal, table, right.gather_aligned([hidden, hidden[:1].bool()], indices, [1, 1])))
mask = torch.randn(3, 2, 50, 50)
assert torch.equal(ops.gather_mask(mask, indices), right.gather_mask(mask, indices))
"""


NVRTC = """
import ctypes, sys
from cuda.bindings import nvrtc
*_, program = nvrtc.nvrtcCreateProgram(b"__global__ void nothing() {}", b"nothing.cu", 0, [], [])
ctypes.CDLL(sys.argv[1])
nvrtc.nvrtcCompileProgram(program, 0, [])
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    return build("libcuda.cpp", library, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-ldl")


def run(program: str, driver: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning", "-c", program, str(driver)]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_operators_reach_the_driver(driver: Path, tmp_path: Path) -> None:
    done = run(PROGRAM, driver, LTD_FX_CACHE=str(tmp_path / "cache"), LTD_FX_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(NAMES)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_nvrtc_crashes_on_a_driver_with_too_few_functions(driver: Path) -> None:
    """So the program above compiles before it loads one. Once this fails, it need not: correct docs/internals.md."""
    assert run(NVRTC, driver).returncode == -signal.SIGSEGV
