"""The package as others meet it: lean to import, pure Python to install."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_is_lean() -> None:
    """No optional package, no compiler, no CUDA context, and the random state and default dtype left alone."""
    code = """
import sys, torch
state = torch.random.get_rng_state()
before = set(sys.modules)
import ltd_fx
heavy = {"cuda.bindings.nvrtc", "transformers", "timm", "torchvision", "deepspeed", "matplotlib", "triton"}
heavy |= {"accelerate", "lightning", "torch._dynamo", "torch._inductor"}
print(sorted(heavy & (set(sys.modules) - before)), torch.cuda.is_initialized())
assert torch.equal(state, torch.random.get_rng_state())
"""
    assert run_python(code) == "[] False"


def test_public_names_exist_and_are_documented() -> None:
    code = """
import ltd_fx, ltd_fx.deepspeed
for name in ltd_fx.__all__:
    assert name == "__version__" or getattr(ltd_fx, name).__doc__, name
print(len(ltd_fx.__all__))
"""
    assert int(run_python(code)) >= 12


@pytest.mark.slow
def test_the_wheel_is_pure_python_and_installs_alone(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "-o", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.endswith((".py", "py.typed", ".cu")) or ".dist-info/" in name for name in names)
    assert {"ltd_fx/py.typed", "ltd_fx/cuda/kernels.cu", "ltd_fx/cuda/align.cu"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "examples"))]
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    code = f"import sys; sys.path.insert(0, {str(target)!r}); import ltd_fx; print(ltd_fx.__file__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert out.startswith(str(target))
