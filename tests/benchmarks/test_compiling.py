"""Graphs and seconds of compilation over a walk of lengths, and against depth.

pytest tests/benchmarks/test_compiling.py --benchmark-only -s
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from models import Setting, stepper
from peers import PEERS
from results import results
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

import ltd_fx

SMALL = Setting("bert", width=64, tokens=256, depth=2)


@contextmanager
def cold() -> Iterator[None]:
    """No cache, and compilers within this process or its children: their time is seen, and other processes' is not."""
    torch._dynamo.reset()
    with fresh_cache(), torch._inductor.config.patch(compile_threads=1):
        torch.compile(torch.neg)(torch.ones(64))  # the compiler's own preparations
        torch._dynamo.reset()
        yield


def compiling(
    step: Callable[[], Any], calls: int, before: Callable[[int], None] = lambda i: None
) -> tuple[float, float]:
    """CPU seconds of compilation in so many calls, of torch itself and of the C++ compilers that it starts.

    What the calls take beyond those that compile nothing.
    """

    def took(i: int) -> tuple[float, float]:
        before(i)
        start = os.times()
        step()
        spent = [end - begin for end, begin in zip(os.times(), start, strict=True)]
        return spent[0] + spent[1], spent[2] + spent[3]  # of this process and of its children, user and system

    seconds = [took(i) for i in range(calls)]
    usual = float(np.median([sum(took(calls - 1)) for _ in range(5)]))
    compiled = [each for each in seconds if sum(each) > 3 * usual]
    return sum(own - usual for own, _ in compiled), sum(children for _, children in compiled)


WALKS = {
    "12 lengths": ([*range(16, 256, 20)], "inductor", {}),
    "12 lengths, ints of modules dynamic": ([*range(16, 256, 20)], "inductor", {"allow_unspec_int_on_nn_module": True}),
    "121 lengths, no limit": ([*range(8, 249, 2)], "aot_eager", {"recompile_limit": 1000}),
}


@pytest.mark.parametrize("walk", WALKS)
def test_walk(benchmark: Any, walk: str) -> None:
    lengths, backend, options = WALKS[walk]
    print(f"\n{walk}, {backend}")
    for name in ("dense", "routed", "hand-written", "deepspeed"):
        if name == "deepspeed":
            pytest.importorskip("deepspeed")
        counter = CompileCounterWithBackend(backend)
        model = SMALL.build()
        set_length = PEERS[name](model, SMALL)
        step = stepper(torch.compile(model, backend=counter), SMALL.inputs())
        with cold(), torch._dynamo.config.patch(**options):
            took = sum(
                compiling(step, len(lengths), lambda i, set_length=set_length: set_length and set_length(lengths[i]))
            )
        eager = counter.frame_count == torch._dynamo.config.recompile_limit
        row = {"setting": walk, "how": backend, "variant": name, "graphs": counter.frame_count, "seconds": took}
        results().add("walk", {**row, "eager": eager})
        print(f"{name:>12}: {counter.frame_count} graphs, {took:.1f} s of CPU{', then eager' if eager else ''}")
    benchmark.pedantic(step, rounds=1)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layer by layer"])
def test_depth(benchmark: Any, whole: bool) -> None:
    how = "whole" if whole else "layer by layer"
    for depth in (4, 8, 16) if whole else (4, 8, 16, 32):
        took = {name: sum(_seconds(depth, whole, name)) for name in ("dense", "routed")}
        results().add("depth", {"setting": depth, "how": how, **took})
        print(f"\n{how}, {depth:2} layers, CPU: dense {took['dense']:.1f} s, routed {took['routed']:.1f} s", end="")
    benchmark.pedantic(lambda: None, rounds=1)


def test_parts(benchmark: Any) -> None:
    """Where the seconds of a whole model of 8 layers go: to torch, and to the compilers of its kernels."""
    for name in ("dense", "routed, k a constant", "routed"):
        own, compilers = _seconds(8, True, name)
        results().add("parts", {"setting": "8 layers", "how": name, "torch": own, "compilers": compilers})
        print(f"\n{name}: torch itself {own:.1f} s of CPU, compilers {compilers:.1f} s", end="")
    benchmark.pedantic(lambda: None, rounds=1)


def _seconds(depth: int, whole: bool, name: str) -> tuple[float, float]:
    setting = Setting("llama", width=64, tokens=128, depth=depth)
    model = setting.build()
    if name != "dense":
        ltd_fx.transform(model, ltd_fx.LTDScheduler(64, 128, 1, kind="constant") if name == "routed" else None)
    with cold():
        compiled = torch.compile(model) if whole else ltd_fx.compile_layers(model)
        return compiling(stepper(compiled, setting.inputs()), 1)
