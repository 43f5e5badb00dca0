"""The kernels under AddressSanitizer, UBSan and ThreadSanitizer; and broken kernels, which these must catch."""

import os
import signal
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from emulate import build

from ltd_fx.cuda.compile import read_source

KERNELS = read_source().decode()
MEMORY = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
RACES = ("-O0", "-g1", "-fsanitize=thread")


@cache
def runs(flags: tuple[str, ...]) -> bool:
    """Whether this machine has the sanitizer's runtime, and it starts."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program")
        command = ["g++", "-x", "c++", "-", "-pthread", "-o", str(program), *flags]
        built = subprocess.run(command, input=b"int main() {}", capture_output=True)
        return built.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


def check(flags: tuple[str, ...], folder: Path, *args: str, kernels: str = KERNELS) -> tuple[int, str]:
    if not runs(flags):
        pytest.skip(f"g++ {' '.join(flags)} does not work here")
    program = build("check.cpp", folder / "check", *flags, kernels=kernels)
    env = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program, *args], capture_output=True, text=True, timeout=300, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("flags", [MEMORY, RACES], ids=["memory", "races"])
@pytest.mark.slow
@pytest.mark.parametrize("cases", ["few", "all"])
def test_sanitizers_find_nothing(flags: tuple[str, ...], cases: str, tmp_path: Path) -> None:
    assert check(flags, tmp_path, cases) == (0, "all right\n")


def test_an_index_out_of_range_is_not_read(tmp_path: Path) -> None:
    status, output = check(("-O0",), tmp_path, "beyond")
    assert (status, output) == (-signal.SIGABRT, "trap\n")


# what is done wrong: the text, what it becomes, and what must be seen
WRONG = {
    "gathers one row too many": ("if (j >= a.indices.keep)", "if (j > a.indices.keep)", "heap-buffer-overflow"),
    "loads unaligned vectors": ("case 8: return copy_as<uint2>", "case 8: return copy_as<uint4>", "misaligned"),
    "copies one vector too many": ("i + 3 * step < count", "i + 3 * step <= count", "heap-buffer-overflow"),
    "keeps one token too few": ("(order(strip + i) <= last)", "(order(strip + i) < last)", "wrong: sample"),
    "takes the wrong bin": ("wanted <= before + first + second", "wanted < before + first + second", "sample"),
    "searches past the token": ("low += (before - 1) * step + 1", "low += before * step", "wrong: merge"),
    "gathers one aligned row too many": ("if (j >= keep)", "if (j > keep)", "heap-buffer-overflow"),
    "skips a row of the outer dimension": ("from += p.outer_stride", "from += p.row_stride", "wrong: aligned"),
    "stores one column too many": ("if (first >= keep)", "if (first > keep)", "heap-buffer-overflow"),
    "stores unaligned columns": ("const bool many = a.count > 1;", "const bool many = true;", "misaligned"),
    "forgets a head": ("from += a.head_stride,", "from += 0,", "wrong: mask"),
    "merges into the next row": ("source[token] = j", "source[token] = j + 1", "heap-buffer-overflow"),
}
BARRIER = "__syncthreads();"
BARRIERS = KERNELS.count(BARRIER)
# in the ordinary run
QUICK = {"gathers one row too many", "loads unaligned vectors", 5}


def mutants(names: list[str] | list[int]) -> list[object]:
    assert set(names) & QUICK
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", mutants(list(WRONG)))
def test_a_wrong_kernel_is_caught(name: str, tmp_path: Path) -> None:
    right, wrong, seen = WRONG[name]
    assert KERNELS.count(right) == 1
    status, output = check(MEMORY, tmp_path, "few", kernels=KERNELS.replace(right, wrong))
    assert status != 0
    assert seen in output


@pytest.mark.parametrize("which", mutants(list(range(BARRIERS))))
def test_a_missing_barrier_is_caught(which: int, tmp_path: Path) -> None:
    parts = KERNELS.split(BARRIER)
    kernels = BARRIER.join(parts[: which + 1]) + BARRIER.join(parts[which + 1 :])
    status, output = check(RACES, tmp_path, "few", kernels=kernels)
    assert status != 0
    assert "data race" in output or "wrong:" in output
