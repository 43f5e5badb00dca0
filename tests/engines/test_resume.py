"""A run killed at random and resumed is the uninterrupted one, bit for bit: loss, weights, draws and learning rate."""

import random
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import programs
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# each with its number of processes
PROGRAMS = {
    "plain": (programs.plain, 1),
    "fsdp": (programs.fsdp, 2),
    "trainer": (programs.trainer, 1),
    "trainer_compiled": (programs.trainer_compiled, 1),
    "trainer_ddp": (programs.trainer_ddp, 2),
    "saving": (programs.saving, 1),
}
SECONDS = 240


class Kill(NamedTuple):
    """All ranks, one after another in ``order``: ``seconds`` after the first of them reports ``step``."""

    step: int
    seconds: float
    order: tuple[int, ...]


Seen = list[dict[int, dict[str, Any]]]  # by rank, by step, by name


def run(name: str, folder: Path, kill: Kill | None = None) -> Seen:
    """What each rank of a program reports until it ends, or is killed."""
    program, world = PROGRAMS[name]
    context = mp.get_context("forkserver")  # whose processes need not import everything again
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint"])
    folder.mkdir(exist_ok=True)
    seen: Seen = [{} for _ in range(world)]
    with tempfile.TemporaryDirectory() as store:
        processes, pipes = [], {}
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (program, folder, theirs, rank, world, f"file://{store}/store")
            processes.append(context.Process(target=_run, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes[ours] = rank
        try:
            _listen(pipes, seen, processes, kill)
        finally:
            for process in processes:
                process.kill()
                process.join()
    return seen


def _listen(pipes: dict[Any, int], seen: Seen, processes: list[Any], kill: Kill | None) -> None:
    deadline = time.monotonic() + SECONDS
    while pipes:
        ready = wait(list(pipes), max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {list(pipes.values())} are not done after {SECONDS} seconds"
        for pipe in ready:
            try:
                step, values, error = pipe.recv()
            except (EOFError, OSError):  # it ended, or was killed
                del pipes[pipe]
                continue
            if error:  # of a rank whose peer was killed
                assert kill is not None, error
                continue
            seen[pipes[pipe]].setdefault(step, {}).update(values)
            if kill is not None and step == kill.step:
                time.sleep(kill.seconds)
                for rank in kill.order:
                    processes[rank].kill()
                    processes[rank].join()


def _run(program: Callable[..., None], folder: Path, pipe: Connection, rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group("gloo", store, timedelta(seconds=60), world, rank)
        program(folder, lambda step, **values: pipe.send((step, values, "")))
    except BaseException:
        pipe.send((-1, {}, traceback.format_exc()))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    found: dict[str, Seen] = {}

    def of(name: str) -> Seen:
        if name not in found:
            found[name] = run(name, tmp_path_factory.mktemp(name))
        return found[name]

    return of


SLOW = [
    *(pytest.param("plain", seed, 5, marks=pytest.mark.slow) for seed in range(1, 6)),
    *(pytest.param("fsdp", seed, 3, marks=pytest.mark.slow) for seed in range(6)),
    *(pytest.param("trainer", seed, 2, marks=pytest.mark.slow) for seed in range(1, 4)),
    *(pytest.param(f"trainer_{kind}", 0, 1, marks=pytest.mark.slow) for kind in ("compiled", "ddp")),
]


@pytest.mark.parametrize(("name", "seed", "kills"), [("plain", 0, 2), *SLOW])
def test_killed_and_resumed(name: str, seed: int, kills: int, uninterrupted: Any, tmp_path: Path) -> None:
    """Killed at a random moment of a random step, in the middle of saving too, as often as ``kills`` says."""
    if name.startswith("trainer"):
        pytest.importorskip("transformers")
    expected, draw, first = uninterrupted(name), random.Random(seed), 0
    world = len(expected)
    merged: Seen = [{} for _ in range(world)]
    for left in range(kills, -1, -1):
        step = draw.randrange(first, max(programs.STEPS - left, first + 1))
        kill = Kill(step, draw.uniform(0, 0.1), tuple(draw.sample(range(world), world)))
        print("killed:" if left else "left alone:", kill)  # of a failure
        for rank, steps in enumerate(run(name, tmp_path, kill if left else None)):
            assert min(steps, default=first) >= first, "it began anew"
            for number, values in steps.items():
                assert values.items() <= expected[rank][number].items()
                merged[rank].setdefault(number, {}).update(values)
        first = min(max(steps, default=0) for steps in merged)
    assert merged == expected


def test_killed_while_saving_weights(tmp_path: Path) -> None:
    """The file is always that of one whole save, and what a kill left unfinished is in nobody's way."""
    assert run("saving", tmp_path) == [{0: {".pt": "survived", ".safetensors": "survived"}}]
