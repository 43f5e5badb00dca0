"""NVRTC on the kernels, for every architecture, with no GPU; and the folder of compiled code."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ltd_fx.cuda import compile
from ltd_fx.cuda.driver import NAMES

pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings, which comes with torch's CUDA wheels, is missing")

ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
Record = Callable[[str, object], None]


def check_report(log: str, record: Record) -> None:
    """ptxas's report: every kernel there, nothing spilled, and registers for enough threads of an SM's 64 Ki."""
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    assert {name for name, *_ in found} == set(NAMES)
    for name, *spilled, registers in found:
        record(f"{name} registers", registers)
        assert spilled == ["0"] * 3, name
        assert int(registers) * 1024 <= 65536, (name, registers)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills(arch: str, record_property: Record) -> None:
    if int(arch[3:]) not in compile.supported_architectures():
        pytest.skip(f"this NVRTC does not know {arch}")
    code, log = compile.compile_source(compile.read_source(), arch, ["--ptxas-options=-v"])
    assert code.startswith(b"\x7fELF")
    assert "warning" not in log
    check_report(log, record_property)


def ptx_of(name: str) -> str:
    code, _ = compile.compile_source(compile.read_source(), "compute_75")
    bodies = re.split(r"\.entry (\w+)", code.decode())
    return dict(zip(bodies[1::2], bodies[2::2], strict=True))[name]


@pytest.mark.parametrize("name", ["gather_rows", "merge_rows", "gather_aligned"])
def test_rows_move_in_vectors(name: str) -> None:
    accesses = re.findall(r"(ld|st)\.global(?:\.nc)?\.(v4\.u32|v2\.u32|u32|u16|u8)\b", ptx_of(name))
    for kind in ("ld", "st"):
        assert {width for k, width in accesses if k == kind} == {"v4.u32", "v2.u32", "u32", "u16", "u8"}
    order = [kind for kind, width in accesses if width == "v4.u32"]
    assert "ldldldldstststst" in "".join(order)  # four loads under way at a time


def test_mask_columns_are_stored_in_vectors() -> None:
    stores = re.findall(r"st\.global\.(\S+)", ptx_of("gather_mask"))
    # complex128, then many and one at a time of 8, 4, 2 and 1 bytes; eight of 2 bytes are one store too
    wide = ["v4.u32", "v2.u64", "v4.u32", "v4.u32", "v4.u16"]
    assert sorted(stores) == sorted([*wide, "u64", "u32", "u16", "u8"])


def test_nvcc_agrees(tmp_path: Path, record_property: Record) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [nvcc, "-cubin", "-arch=sm_90", "-std=c++17", "-Xptxas=-v", "-Werror=all-warnings"]
    source = tmp_path / "kernels.cu"
    source.write_bytes(compile.read_source())
    done = subprocess.run([*command, source, "-o", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_report(done.stderr, record_property)


def test_an_error_has_the_compilers_words() -> None:
    with pytest.raises(compile.CompileError, match=r"(?s)for sm_90: .*no_such_thing"):
        compile.compile_source(b"no_such_thing x;", "sm_90")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), "sm_90"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 3), "sm_90"), ((12, 1), "compute_100")],
)
def test_architecture(capability: tuple[int, int], expected: str) -> None:
    assert compile.architecture(capability, [75, 80, 86, 90, 100]) == expected


def test_a_device_too_old_is_named() -> None:
    with pytest.raises(compile.CompileError, match="sm_75 and later, the device is sm_61"):
        compile.architecture((6, 1), [75, 80])


# ---- the folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was compiled, by a stand-in for NVRTC, with an empty folder."""
    archs: list[str] = []

    def stand_in(source: bytes, arch: str) -> tuple[bytes, str]:
        archs.append(arch)
        return f"code for {arch} of {len(source)} bytes".encode(), ""

    monkeypatch.setattr(compile, "compile_source", stand_in)
    monkeypatch.setenv("LTD_FX_CACHE", str(tmp_path / "cache"))
    return archs


def entries() -> list[Path]:
    return list(Path(os.environ["LTD_FX_CACHE"]).iterdir())


def test_compiled_once_for_an_architecture_and_a_source(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = compile.load_or_compile("sm_90")
    assert compile.load_or_compile("sm_90") == first
    assert compiled == ["sm_90"]
    assert compile.load_or_compile("sm_80") != first
    other = tmp_path / "other.cu"
    other.write_text("// another source")
    monkeypatch.setattr(compile, "SOURCES", (other,))
    assert compile.load_or_compile("sm_90") != first
    assert compiled == ["sm_90", "sm_80", "sm_90"]
    assert len(entries()) == 3


def test_another_nvrtc_compiles_again(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    compile.load_or_compile("sm_90")
    success = nvrtc.nvrtcVersion()[0]
    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (success, 99, 9))
    compile.load_or_compile("sm_90")
    assert compiled == ["sm_90"] * 2


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 500, "truncated", "flipped"])
def test_a_damaged_entry_is_compiled_again(damage: bytes | str, compiled: list[str]) -> None:
    code = compile.load_or_compile("sm_90")
    (entry,) = entries()
    content = entry.read_bytes()
    if isinstance(damage, str):
        damage = content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1])
    entry.write_bytes(damage)
    assert compile.load_or_compile("sm_90") == code
    assert compile.load_or_compile("sm_90") == code
    assert compiled == ["sm_90"] * 2


@pytest.mark.parametrize("obstacle", ["a file", "read-only", "too long"])
def test_a_folder_that_cannot_be_used_is_not_fatal(
    obstacle: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if obstacle == "a file":
        (tmp_path / "cache").write_text("")
    elif obstacle == "read-only":
        monkeypatch.setenv("LTD_FX_CACHE", "/proc/ltd_fx")
    else:
        monkeypatch.setenv("LTD_FX_CACHE", "x" * 5000)
    assert compile.load_or_compile("sm_90") == compile.load_or_compile("sm_90")
    assert compiled == ["sm_90"] * 2


def test_ranks_that_start_together_write_whole_entries(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(8)
    stand_in = compile.compile_source
    monkeypatch.setattr(compile, "compile_source", lambda *args: (together.wait(), stand_in(*args))[1])
    codes: list[bytes] = []
    threads = [threading.Thread(target=lambda: codes.append(compile.load_or_compile("sm_90"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 8
    assert len(set(codes)) == 1
    assert len(entries()) == 1  # and no temporary file
    assert compile.load_or_compile("sm_90") == codes[0]
    assert len(compiled) == 8


def test_the_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LTD_FX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile._entry("sm_90").parent == tmp_path / "ltd_fx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile._entry("sm_90").parent == tmp_path / ".cache" / "ltd_fx"
