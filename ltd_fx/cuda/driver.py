"""The kernels loaded on a device, by way of the CUDA driver, at the first call of an operator on it."""

import ctypes
import os
import threading
import warnings
from typing import Any, Protocol

import torch

from ltd_fx.cuda.compile import architecture, load_or_compile, supported_architectures
from ltd_fx.errors import LTDError

NAMES = ("sample_tokens", "gather_rows", "merge_rows", "gather_aligned", "gather_mask")
Dim3 = tuple[int, int, int]


class Kernels(Protocol):
    """What :mod:`ltd_fx.cuda.launch` needs of a device."""

    def launch(self, name: str, args: ctypes.Structure, grid: Dim3, block: Dim3) -> None:
        """Run ``name(args)`` on the current stream."""


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


class LoadedKernels:
    """The kernels on one device.

    Args:
        device: its number.

    Raises:
        ImportError: the bindings are missing.
        RuntimeError: the driver or NVRTC is missing or refuses.
    """

    def __init__(self, device: int) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self._device = device
        code = load_or_compile(architecture(torch.cuda.get_device_capability(device), supported_architectures()))
        self._call("cuInit", 0)
        # A thread that has called nothing of CUDA yet does not have torch's own context as its current one.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))
        with torch.cuda.device(device):
            self._call("cuCtxSetCurrent", self._context)
            module = self._call("cuModuleLoadData", code)
            self._functions = {name: self._call("cuModuleGetFunction", module, name.encode()) for name in NAMES}

    def launch(self, name: str, args: ctypes.Structure, grid: Dim3, block: Dim3) -> None:
        # The kernel has one parameter, which the driver copies.
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        with torch.cuda.device(self._device):
            self._call("cuCtxSetCurrent", self._context)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            function = self._functions[name]
            self._call("cuLaunchKernel", function, *grid, *block, 0, stream, ctypes.addressof(pointers), 0)

    def _call(self, name: str, *args: Any) -> Any:
        status, *values = getattr(self._driver, name)(*args)
        if status != type(status)(0):
            raise DriverError(f"{name}: {status.name}")
        return values[0] if values else None


_loaded: dict[int, LoadedKernels | None] = {}
_lock = threading.Lock()


def kernels_on(device: torch.device) -> Kernels | None:
    """The kernels of a CUDA device; ``None``: the operators run as torch's kernels.

    That is so with ``LTD_FX_CUDA=0``, on ROCm, and, with a warning, where the kernels cannot be had. It is also so for
    calls inside a CUDA graph capture before the kernels are loaded: loading them would break the capture.

    Raises:
        LTDError: ``LTD_FX_CUDA`` is neither 0 nor 1.
    """
    number = torch.cuda.current_device() if device.index is None else device.index
    if number not in _loaded:
        if torch.cuda.is_current_stream_capturing():
            return None
        with _lock:
            if number not in _loaded:
                _loaded[number] = _load(number)
    return _loaded[number]


def _load(device: int) -> LoadedKernels | None:
    switch = os.environ.get("LTD_FX_CUDA", "1")
    if switch not in ("0", "1"):
        raise LTDError(f"ltd_fx: LTD_FX_CUDA must be 0 or 1, got {switch!r}")
    if switch == "0" or torch.version.hip is not None:
        return None
    try:
        return LoadedKernels(device)
    except (ImportError, RuntimeError, OSError) as error:
        warnings.warn(
            f"ltd_fx: no CUDA kernels on cuda:{device}, the operators run as torch's instead ({error}). "
            "`pip install cuda-bindings nvidia-cuda-nvrtc` may help; LTD_FX_CUDA=0 turns this warning off.",
            stacklevel=2,
        )
        return None
