"""The driver calls, on a stand-in for the driver that records them; and when the operators do without kernels."""

import contextlib
import ctypes
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import pytest
import torch
from emulate import ARGS, Emulated
from torch import Tensor

from ltd_fx import LTDError
from ltd_fx.cuda import driver, launch, ops
from ltd_fx.ops.sampling import sample

KEY, SITE = torch.tensor(5), torch.tensor(1)
HIDDEN = torch.arange(2 * 9 * 4.0).view(2, 9, 4)
INDICES = sample(KEY, SITE, 2, 9, 4)
MASK = torch.arange(2 * 3 * 81.0).view(2, 3, 9, 9)


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200


@dataclass
class Machine:
    """Two GPUs as the driver and torch describe them; ``calls`` is what happened."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    device: int = 0
    fails: str | None = None

    def driver(self) -> types.SimpleNamespace:
        answers = {
            "cuInit": lambda flags: (),
            "cuDeviceGet": lambda number: (f"device {number}",),
            "cuDevicePrimaryCtxRetain": lambda device: (f"context of {device}",),
            "cuCtxSetCurrent": lambda context: (),
            "cuModuleLoadData": lambda code: (f"module {code.decode()}",),
            "cuModuleGetFunction": lambda module, name: (f"{name.decode()} of {module}",),
            "cuLaunchKernel": self.launch,
        }

        def recorded(name: str) -> Any:
            def call(*args: Any) -> tuple[Any, ...]:
                self.calls.append((name, *args))
                if name == self.fails:
                    return (Status.CUDA_ERROR_INVALID_IMAGE, None)
                return (Status.CUDA_SUCCESS, *answers[name](*args))

            return call

        return types.SimpleNamespace(**{name: recorded(name) for name in answers})

    def launch(self, function: str, *rest: Any) -> tuple[()]:
        """Copies the arguments, as the driver does, and runs the kernel on the CPU."""
        *dims, shared, _stream, pointers, extra = rest
        assert (shared, extra) == (0, 0)
        name = function.split()[0]
        args = ARGS[name].from_buffer_copy(ARGS[name].from_address(ctypes.c_void_p.from_address(pointers).value))
        Emulated().launch(name, args, tuple(dims[:3]), tuple(dims[3:]))
        return ()

    @contextlib.contextmanager
    def on(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    bindings = pytest.importorskip("cuda.bindings")
    machine = Machine()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", machine.driver())
    monkeypatch.setattr(bindings, "driver", machine.driver(), raising=False)
    monkeypatch.setattr(driver, "_loaded", {})
    monkeypatch.setattr(driver, "load_or_compile", lambda arch: f"for {arch}".encode())
    monkeypatch.setattr(driver, "supported_architectures", lambda: [75, 80, 90])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (8, 6)][device])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", machine.on)
    stream = types.SimpleNamespace
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(cuda_stream=1000 + device))
    return machine


def test_loaded_once_for_a_device(machine: Machine) -> None:
    first, second = (driver.kernels_on(torch.device("cuda", number)) for number in (0, 1))
    assert driver.kernels_on(torch.device("cuda", 1)) is second
    assert driver.kernels_on(torch.device("cuda")) is first  # the current one
    expected = []
    for number, arch in enumerate(["sm_90", "sm_80"]):
        expected += [
            ("cuInit", 0),
            ("cuDeviceGet", number),
            ("cuDevicePrimaryCtxRetain", f"device {number}"),
            ("cuCtxSetCurrent", f"context of device {number}"),
            ("cuModuleLoadData", f"for {arch}".encode()),
            *(("cuModuleGetFunction", f"module for {arch}", name.encode()) for name in driver.NAMES),
        ]
    assert machine.calls == expected


def test_launched_on_the_tensors_device_and_its_current_stream(machine: Machine) -> None:
    kernels = driver.kernels_on(torch.device("cuda", 1))
    assert kernels is not None
    machine.calls.clear()
    kept = launch.gather_rows(kernels, HIDDEN, INDICES, True)
    context, launched = machine.calls
    assert context == ("cuCtxSetCurrent", "context of device 1")
    name, function, *dims, shared, stream, _, extra = launched
    assert (name, function) == ("cuLaunchKernel", "gather_rows of module for sm_80")
    assert (dims, shared, stream, extra) == ([1, 2, 1, 1, 256, 1], 0, 1001, 0)
    assert torch.equal(kept, torch.ops.ltd_fx.gather_tokens(HIDDEN, INDICES))
    assert machine.device == 0


def results() -> list[Tensor]:
    """The operators, as the dispatcher would call them for CUDA tensors."""
    kept = ops.gather_tokens(HIDDEN, INDICES)
    drawn = ops.sample_tokens(KEY, SITE, HIDDEN, 2, 9, 4)
    aligned = ops.gather_aligned([HIDDEN, HIDDEN[:1, ..., 0]], INDICES, [1, 1])
    return [drawn, kept, ops.scatter_tokens(HIDDEN, INDICES, -kept), *aligned, ops.gather_mask(MASK, INDICES)]


def expected() -> list[Tensor]:
    kept = torch.ops.ltd_fx.gather_tokens(HIDDEN, INDICES)
    aligned = [kept, HIDDEN[0, :, 0][INDICES]]
    mask = torch.stack([mask[..., row[:, None], row] for mask, row in zip(MASK, INDICES, strict=True)])
    return [INDICES, kept, torch.ops.ltd_fx.scatter_tokens(HIDDEN, INDICES, -kept), *aligned, mask]


def check_results() -> None:
    assert all(torch.equal(got, right) for got, right in zip(results(), expected(), strict=True))


def launches(machine: Machine) -> list[str]:
    return [call[1].split()[0] for call in machine.calls if call[0] == "cuLaunchKernel"]


def test_operators_call_the_kernels(machine: Machine) -> None:
    check_results()
    assert launches(machine) == ["gather_rows", "sample_tokens", "gather_aligned", "merge_rows", "gather_mask"]


def test_a_key_elsewhere_is_left_to_torch(machine: Machine) -> None:
    drawn = ops.sample_tokens(KEY, SITE, HIDDEN.to("meta"), 2, 9, 4)
    assert torch.equal(drawn, INDICES)
    assert machine.calls == []


def test_arguments_are_checked_before_a_launch(machine: Machine) -> None:
    for bad in (
        lambda: ops.gather_tokens(HIDDEN, INDICES.float()),
        lambda: ops.scatter_tokens(HIDDEN, INDICES, HIDDEN),
        lambda: ops.scatter_tokens(HIDDEN, INDICES, HIDDEN[:, :4].to("meta")),
        lambda: ops.sample_tokens(KEY, SITE, HIDDEN, 2, 9, 10),
        lambda: ops.gather_aligned([HIDDEN], INDICES, [3]),
        lambda: ops.gather_mask(MASK[..., :8], INDICES),
    ):
        with pytest.raises(LTDError):
            bad()
    assert machine.calls == []


# ---- without kernels


def test_switched_off(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTD_FX_CUDA", "0")
    check_results()
    assert machine.calls == []


def test_a_switch_that_means_nothing_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTD_FX_CUDA", "off")
    with pytest.raises(LTDError, match="LTD_FX_CUDA must be 0 or 1, got 'off'"):
        ops.gather_tokens(HIDDEN, INDICES)


def test_rocm_takes_torchs_kernels(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_results()
    assert machine.calls == []


@pytest.mark.parametrize("reason", ["bindings", "nvrtc", "driver", "old device"])
def test_one_warning_with_the_reason_then_torch(reason: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"bindings": "cuda", "nvrtc": "libnvrtc.so not found", "driver": "INVALID_IMAGE", "old device": "sm_61"}
    if reason == "bindings":
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    elif reason == "nvrtc":

        def absent() -> list[int]:
            raise RuntimeError("libnvrtc.so not found")

        monkeypatch.setattr(driver, "supported_architectures", absent)
    elif reason == "driver":
        machine.fails = "cuModuleLoadData"
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_results()
    (warning,) = caught
    assert words[reason] in str(warning.message)
    assert "LTD_FX_CUDA=0" in str(warning.message)
    assert launches(machine) == []


def test_a_launch_that_fails_raises(machine: Machine) -> None:
    machine.fails = "cuLaunchKernel"
    with pytest.raises(driver.DriverError, match="cuLaunchKernel: CUDA_ERROR_INVALID_IMAGE"):
        ops.gather_tokens(HIDDEN, INDICES)


def test_graph_capture_loads_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a module would break the capture, so a first call inside one is torch's; once warm they are ours."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_results()
    assert machine.calls == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check_results()
    machine.calls.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_results()
    assert len(launches(machine)) == 5
    assert {call[0] for call in machine.calls} == {"cuCtxSetCurrent", "cuLaunchKernel"}


def test_threads_that_start_together_load_once(machine: Machine) -> None:
    threads = [threading.Thread(target=driver.kernels_on, args=(torch.device("cuda", 0),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [call[0] for call in machine.calls].count("cuModuleLoadData") == 1
