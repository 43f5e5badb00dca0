"""Tests that run on several processes: ``@on_ranks(2)`` above a test runs its body on each of two gloo ranks.

The processes are started once and serve all tests. A rank that fails fails the test at once, with its traceback; one
that is not done in time fails it too. Either way the processes are killed, and the next test gets new ones.
"""

import functools
import importlib
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, *, seconds: float = 120) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run the test's body on ``world`` ranks; its arguments must be picklable."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            if world not in _pools or not _pools[world].alive():
                _pools[world] = Pool(world)
            _pools[world].run(body.__module__, body.__qualname__, arguments, seconds)

        return test

    return decorate


class Pool:
    def __init__(self, world: int) -> None:
        context = mp.get_context("spawn")
        self.processes, self.pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def run(self, module: str, name: str, arguments: dict[str, Any], seconds: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes:
                pipe.send((module, name, arguments, f"file://{folder}/store"))
            deadline, waiting = time.monotonic() + seconds, {pipe: rank for rank, pipe in enumerate(self.pipes)}
            while waiting:
                ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    self.kill()
                    pytest.fail(f"ranks {list(waiting.values())} are not done after {seconds} seconds")
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    if error := _received(pipe):
                        self.kill()
                        pytest.fail(f"rank {rank}:\n{error}", pytrace=False)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_pools: dict[int, Pool] = {}


def _received(pipe: Any) -> str:
    try:
        return pipe.recv()
    except EOFError:
        return "the process died"


def _serve(rank: int, world: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            module, name, arguments, store = pipe.recv()
        except EOFError:  # the tests are over
            return
        error = ""
        try:
            dist.init_process_group("gloo", store, timedelta(seconds=60), world, rank)
            getattr(importlib.import_module(module), name).__wrapped__(**arguments)
            dist.barrier()
        except BaseException:
            error = traceback.format_exc()
        pipe.send(error)  # before the group is gone: its end may wait for the other ranks
        if not error:
            dist.destroy_process_group()
        torch._dynamo.reset()
