"""The kernels as machine code for one architecture: NVRTC, and a folder of what it made.

NVRTC and its bindings come with torch's CUDA wheels, so a user needs neither nvcc nor a C++ compiler.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCES = tuple(Path(__file__).with_name(name) for name in ("kernels.cu", "align.cu"))
OPTIONS = ("--std=c++17",)


class CompileError(RuntimeError):
    """NVRTC refused the source; the message has its log."""


def read_source() -> bytes:
    """The files as one: each goes on from those before it."""
    return b"\n".join(path.read_bytes() for path in SOURCES)


def architecture(capability: tuple[int, int], supported: Sequence[int]) -> str:
    """What to compile for: the device's own architecture, or the nearest that runs on it.

    Machine code of ``sm_XY`` runs on every later ``Y`` of the same ``X``. For a device newer than NVRTC there is PTX
    (``compute_XY``), which the driver translates.

    Args:
        capability: the device's, such as ``(9, 0)``.
        supported: NVRTC's, such as ``[75, 80, 90]``.

    Raises:
        CompileError: the device is older than all of them.
    """
    device = 10 * capability[0] + capability[1]
    older = [number for number in supported if number <= device]
    if not older:
        raise CompileError(f"NVRTC compiles for sm_{min(supported)} and later, the device is sm_{device}")
    return f"{'sm' if max(older) // 10 == capability[0] else 'compute'}_{max(older)}"


def supported_architectures() -> list[int]:
    from cuda.bindings import nvrtc

    (numbers,) = _call(nvrtc.nvrtcGetSupportedArchs())
    return list(numbers)


def load_or_compile(arch: str) -> bytes:
    """The kernels for ``arch``, from the folder if they are there, else compiled and put there.

    The folder is ``$LTD_FX_CACHE``, or ``ltd_fx`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Entries are written whole and
    renamed, so that ranks that start together cannot read half of one, and carry a checksum, so that a damaged one
    counts as absent. A folder that cannot be written costs a second for each process, nothing else.
    """
    entry = _entry(arch)
    code = _checked(entry)
    if code is None:
        code, _ = compile_source(read_source(), arch)
        with contextlib.suppress(OSError):
            _write_whole(entry, hashlib.sha256(code).digest() + code)
    return code


def _entry(arch: str) -> Path:
    from cuda.bindings import nvrtc

    recipe = repr((read_source(), arch, OPTIONS, _call(nvrtc.nvrtcVersion())))
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("LTD_FX_CACHE") or os.path.join(caches, "ltd_fx")
    return Path(folder, f"{hashlib.sha256(recipe.encode()).hexdigest()}.bin")


def _checked(entry: Path) -> bytes | None:
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    return code if checksum == hashlib.sha256(code).digest() else None


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def compile_source(source: bytes, arch: str, options: Sequence[str] = ()) -> tuple[bytes, str]:
    """Machine code (for ``sm_XY``) or PTX (for ``compute_XY``), and the compiler's log.

    Raises:
        CompileError: the source does not compile.
    """
    from cuda.bindings import nvrtc

    program = _call(nvrtc.nvrtcCreateProgram(source, SOURCES[0].name.encode(), 0, [], []))[0]
    try:
        flags = [flag.encode() for flag in (f"--gpu-architecture={arch}", *OPTIONS, *options)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC, for {arch}: {log.rstrip(chr(0))}")
        if arch.startswith("sm_"):
            return _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
        return _read(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(program: Any, size_of: Any, read: Any) -> bytes:
    (size,) = _call(size_of(program))
    content = bytes(size)  # The bindings write into it.
    _call(read(program, content))
    return content


def _call(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of the bindings returned, without its status.

    Raises:
        CompileError: the status is an error.
    """
    status, *values = answer
    if status != type(status)(0):
        raise CompileError(f"NVRTC failed: {status.name}")
    return tuple(values)
