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
from models import Setting, layers_of, stepper
from peers import PEERS
from results import results
from torch import nn
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


def compiling(step: Callable[[], Any], calls: int, before: Callable[[int], None] = lambda i: None) -> float:
    """CPU seconds of compilation in so many calls: what they take beyond calls that compile nothing."""

    def took(i: int) -> float:
        before(i)
        start = os.times()
        step()
        return sum(os.times()[:4]) - sum(start[:4])  # of this process and its children, user and system

    seconds = [took(i) for i in range(calls)]
    usual = float(np.median([took(calls - 1) for _ in range(5)]))
    return sum(s - usual for s in seconds if s > 3 * usual)


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
            took = compiling(step, len(lengths), lambda i, set_length=set_length: set_length and set_length(lengths[i]))
        eager = counter.frame_count == torch._dynamo.config.recompile_limit
        row = {"setting": walk, "how": backend, "variant": name, "graphs": counter.frame_count, "seconds": took}
        results().add("walk", {**row, "eager": eager})
        print(f"{name:>12}: {counter.frame_count} graphs, {took:.1f} s of CPU{', then eager' if eager else ''}")
    benchmark.pedantic(step, rounds=1)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "layer by layer"])
def test_depth(benchmark: Any, whole: bool) -> None:
    how = "whole" if whole else "layer by layer"
    for depth in (4, 8, 16) if whole else (4, 8, 16, 32):
        took = {}
        for name in ("dense", "routed"):
            setting = Setting("llama", width=64, tokens=128, depth=depth)
            model = setting.build()
            if name == "routed":
                ltd_fx.transform(model, ltd_fx.LTDScheduler(64, 128, 1, kind="constant"))
            with cold():
                took[name] = compiling(stepper(_compiled(model, whole), setting.inputs()), 1)
        results().add("depth", {"setting": depth, "how": how, **took})
        print(f"\n{how}, {depth:2} layers, CPU: dense {took['dense']:.1f} s, routed {took['routed']:.1f} s", end="")
    benchmark.pedantic(lambda: None, rounds=1)


def _compiled(model: nn.Module, whole: bool) -> nn.Module:
    assert len(layers_of(model)) > 0
    return torch.compile(model) if whole else ltd_fx.compile_layers(model)
