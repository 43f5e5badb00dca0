"""``env``: versions, kernels, and what is missing."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import warnings

import torch

from ltd_fx.cuda import kernels_on
from ltd_fx.version import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "transformers", "accelerate", "timm", "matplotlib", "deepspeed")
_SWITCHES = ("LTD_FX_CUDA", "LTD_FX_LOWERING", "LTD_FX_CACHE", "LTD_FX_PASSES")


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    rows = {
        "ltd_fx": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "C++ compiler (Inductor on the CPU)": _compiler(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "CUDA kernels": _kernels(),
        **{name: os.environ.get(name) for name in _SWITCHES},
    }
    if options.json:
        print(json.dumps(rows))
        return 0
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value or '-'}")
    return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _kernels() -> str:
    """Whether ltd_fx's own kernels run here, or why not."""
    if not torch.cuda.is_available():
        return "torch's: no CUDA device"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kernels_on(torch.device("cuda")) is not None:
            return "ours"
    return f"torch's: {caught[0].message if caught else 'LTD_FX_CUDA=0, or ROCm'}"
