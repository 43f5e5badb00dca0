"""The parts of ``make gpu``: each measures one thing and returns plain values; ``dry``: the same on the CPU, tiny."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import Setting, stepper
from peers import prepare
from rounds import bootstrap, interleave
from torch import Tensor, nn

import ltd_fx
from ltd_fx.ops.sampling import draw_key

TESTS = Path(__file__).parents[1]
ops = torch.ops.ltd_fx
_SANITISED = "rows or samples or aligned"


def _run(command: list[str], timeout: float) -> dict[str, Any]:
    """How a command ended, with its last lines."""
    start = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=TESTS.parent)
        code, out = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, out = None, str(error.stdout or "")
    lines = [line for line in out.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"code": code, "seconds": round(time.monotonic() - start, 1), "failed": failed, "tail": lines[-5:]}


def cuda_tests(dry: bool) -> dict[str, Any]:
    """``pytest -m cuda``; dry: they are collected."""
    how = ["--collect-only"] if dry else []
    return _run([sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/cuda/test_cuda.py", *how], 240)


def sanitizer(dry: bool) -> dict[str, Any]:
    """compute-sanitizer on the operators' tests, where it is installed."""
    found = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    if found is None or dry:
        return {"skipped": "compute-sanitizer is not installed" if found is None else "dry"}
    small = ["-m", "pytest", "-q", "-x", "-m", "cuda", "tests/cuda/test_cuda.py", "-k", _SANITISED]
    return {tool: _run([found, "--tool", tool, sys.executable, *small], 60) for tool in ("memcheck", "racecheck")}


def _seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Of a call, by the wall, a median over batches of ten calls."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(10):
            run()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append((time.perf_counter() - start) / 10)
    return median(times[1:])


def kernels(dry: bool) -> list[dict[str, Any]]:
    """Gather, merge and a layer's route, beside a copy of as many bytes and DeepSpeed's steps; microseconds."""
    device, repeats = ("cpu", 1) if dry else ("cuda", 20)
    shapes = {"small": (2, 16, 8, 8)} if dry else {"GPT-3 1.3B": (8, 2048, 2048, 1024), "ViT-L": (64, 197, 1024, 98)}
    rows = []
    for name, (batch, seq_len, dim, keep) in shapes.items():
        key, site = torch.tensor(draw_key(0, 0), device=device), torch.tensor(1, device=device)
        hidden = torch.randn(batch, seq_len, dim, device=device, dtype=torch.bfloat16)
        indices = ops.sample_tokens(key, site, key, batch, seq_len, keep)
        kept, target = ops.gather_tokens(hidden, indices), torch.empty_like(hidden)

        def route(key: Tensor = key, site: Tensor = site, hidden: Tensor = hidden, size: Any = None) -> Tensor:
            drawn = ops.sample_tokens(key, site, key, *size)
            merged: Tensor = ops.scatter_tokens(hidden, drawn, ops.gather_tokens(hidden, drawn))
            return merged

        def deepspeed(hidden: Tensor = hidden, size: Any = None) -> Tensor:
            drawn = torch.multinomial(torch.ones(size[:2], device=hidden.device), size[2]).sort(1).values
            rows = drawn[..., None].expand(-1, -1, hidden.shape[2])
            return hidden.clone().scatter_(1, rows, hidden.gather(1, rows))

        size = batch, seq_len, keep
        runs: dict[str, Callable[[], Any]] = {
            "copy": lambda hidden=hidden, target=target: target.copy_(hidden),
            "sample": lambda key=key, site=site, size=size: ops.sample_tokens(key, site, key, *size),
            "gather": lambda hidden=hidden, indices=indices: ops.gather_tokens(hidden, indices),
            "merge": lambda hidden=hidden, indices=indices, kept=kept: ops.scatter_tokens(hidden, indices, kept),
            "route": lambda route=route, size=size: route(size=size),
            "DeepSpeed's steps": lambda deepspeed=deepspeed, size=size: deepspeed(size=size),
        }
        rows.append({"shape": name} | {what: 1e6 * _seconds(run, device, repeats) for what, run in runs.items()})
    return rows


SETTINGS = {
    "llama": Setting("llama", width=2048, tokens=2048, batch=4, depth=8),
    "vit": Setting("vit", width=1024, tokens=192, batch=64, depth=12),
    "dit": Setting("dit", width=1152, tokens=256, batch=64, depth=12),
}
_EAGER = ("dense", "ideal", "routed", "route", "hand-written")
_COMPILED = ("dense", "ideal", "routed")


def _launches(step: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if "Mem" not in event.key)


def steps(family: str, compiled: bool, dry: bool) -> list[dict[str, Any]]:
    """Training steps in bfloat16: milliseconds, realised efficiency with its interval, peak memory, launches."""
    setting = Setting(family, width=64, tokens=32, batch=2, depth=3) if dry else SETTINGS[family]
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    torch._dynamo.reset()
    runs, rows = {}, []
    for name in _COMPILED if compiled else _EAGER:
        model: nn.Module = prepare(name, setting.build(), setting, compiled=False).to(device, dtype)
        if compiled:
            model = torch.compile(model, backend="eager" if dry else "inductor")
        inputs = {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in setting.inputs().items()}
        step = stepper(model, inputs)

        def run(step: Callable[[], Any] = step) -> None:
            step()
            if device != "cpu":
                torch.cuda.synchronize()

        for _ in range(2):
            run()
        runs[name], row = run, {"variant": name}
        if not dry:
            torch.cuda.reset_peak_memory_stats()
            run()
            row |= {"peak_mib": torch.cuda.max_memory_allocated() / 2**20, "launches": _launches(run)}
        rows.append(row)
    wall = interleave(runs, 2 if dry else 20).wall
    for row in rows:
        name = row["variant"]
        row["ms"] = bootstrap(lambda t, name=name: 1e3 * t[name], wall)
        if name != "dense":
            row["efficiency"] = bootstrap(lambda t, name=name: (t["dense"] - t[name]) / (t["dense"] - t["ideal"]), wall)
    return rows


def walk(dry: bool) -> dict[str, Any]:
    """CUDA graphs over a walk of lengths: seconds until each length was seen, milliseconds a step afterwards."""
    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    setting = Setting(width=64 if dry else 1024, tokens=32 if dry else 1024, batch=2 if dry else 8, depth=3)
    scheduler = ltd_fx.LTDScheduler(setting.tokens // 4, setting.tokens, 3, multiple_of=setting.tokens // 4)
    model = ltd_fx.transform(setting.build(), scheduler).to(device, dtype)
    torch._dynamo.reset()
    how: dict[str, Any] = {"backend": "eager"} if dry else {"mode": "reduce-overhead"}
    step = stepper(torch.compile(model, **how), {k: v.to(device) for k, v in setting.inputs().items()})
    found: dict[str, Any] = {"lengths": [scheduler.length_at(i) for i in range(4)]}
    for name in ("first", "then"):
        start = time.perf_counter()
        for i in range(4):
            scheduler.set_step(i)
            for _ in range(3):
                step()
        if not dry:
            torch.cuda.synchronize()
        found[name] = time.perf_counter() - start
    return found


def identity() -> dict[str, str]:
    """What the figures are of: the card, the driver, and the versions."""
    versions = {name: getattr(sys.modules.get(name), "__version__", "") for name in ("torch", "transformers")}
    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda or "", **versions}
    if not torch.cuda.is_available():
        return found | {"card": "none"}
    driver = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 20)["tail"][-1:]
    return found | {"card": torch.cuda.get_device_name(), "driver": re.sub(r"\s", "", "".join(driver))}
