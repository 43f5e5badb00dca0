"""``schedule``: the lengths of a schedule, as a table or drawn."""

import argparse
import json
from typing import Any

from ltd_fx.errors import LTDError
from ltd_fx.schedule import LTDScheduler

_ROWS = 20


def add_schedule(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """The arguments of a schedule, for :func:`scheduler_of`."""
    metavar = "MIN:MAX:MULTIPLE:STEPS"
    parser.add_argument(name, metavar=metavar, help="lengths in tokens, as in 128:2048:16:200000", **options)
    parser.add_argument("--kind", default="linear", help="linear, root, cosine, step or constant (default: linear)")


def scheduler_of(options: argparse.Namespace) -> LTDScheduler:
    """The scheduler that the arguments ask for.

    Raises:
        LTDError: they make no schedule.
    """
    try:
        minimum, maximum, multiple, steps = map(int, options.schedule.split(":"))
    except ValueError:
        raise LTDError(f"ltd_fx: a schedule is MIN:MAX:MULTIPLE:STEPS, got {options.schedule!r}") from None
    return LTDScheduler(minimum, maximum, steps, multiple_of=multiple, kind=options.kind)


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_run)
    add_schedule(parser, "schedule")
    parser.add_argument("--steps", type=int, help="of the whole run (default: until the length stays)")
    parser.add_argument("--plot", metavar="FILE", help="draw it, as .png, .svg or .pdf")


def _run(options: argparse.Namespace) -> int:
    scheduler = scheduler_of(options)
    steps = _end(scheduler) + 1 if options.steps is None else options.steps
    if steps < 1:
        raise LTDError(f"ltd_fx schedule: --steps must be positive, got {steps}")
    changes = _changes(scheduler, steps)
    if options.plot:
        _plot(changes, steps, options.plot)
    if options.json:
        print(json.dumps({"steps": steps, "changes": changes}))
        return 0
    print("    step  length")
    shown = changes if len(changes) <= _ROWS else [*changes[:: -(-len(changes) // (_ROWS - 1))], changes[-1]]
    for step, length in shown:
        print(f"{step:8}  {length:6}")
    print(f"{len(changes)} lengths over {steps} steps")
    return 0


def _end(scheduler: LTDScheduler) -> int:
    """The first step from which on the length stays."""
    if scheduler.kind == "constant":
        return 0
    end = scheduler.total_steps
    while scheduler.length_at(end) < scheduler.max_length:  # "linear" goes on past total_steps, by a multiple at most
        end += 1
    while end and scheduler.length_at(end - 1) == scheduler.max_length:
        end -= 1
    return end


def _changes(scheduler: LTDScheduler, steps: int) -> list[tuple[int, int]]:
    """(step, length) wherever the length changes."""
    changes = [(0, scheduler.length_at(0))]
    for step in range(1, steps):
        length = scheduler.length_at(step)
        if length != changes[-1][1]:
            changes.append((step, length))
    return changes


def _plot(changes: list[tuple[int, int]], steps: int, path: str) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise LTDError("ltd_fx schedule: --plot needs matplotlib; pip install matplotlib") from None
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    at, lengths = zip(*changes, (steps, changes[-1][1]), strict=True)
    axes.step(at, lengths, where="post")
    axes.set_xlabel("step")
    axes.set_ylabel("reserved length, tokens")
    axes.set_ylim(0)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise LTDError(f"ltd_fx schedule: {path} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
