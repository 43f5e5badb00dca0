"""Compile every graph that a schedule will need, before the first step."""

import logging
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.install.in_place import find_rewrite
from ltd_fx.learn import split_inputs
from ltd_fx.schedule import LTDScheduler
from ltd_fx.tree import leaves

logger = logging.getLogger(__name__)

_ROUNDS = 3  # Of which the fastest counts: what else the machine does only adds.


def warm_up(model: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any]) -> dict[str, float]:
    """Compile the graphs of the whole schedule now, so that no later step waits for one, and measure whether it pays.

    A forward and backward of ``model`` at each kind of length (one token, some, all; for each share of layers that
    have their own), then a forward in eval mode under ``torch.no_grad``. The optimizer takes no step, and afterwards
    gradients, buffers, modes, the random state, the schedule and its draws are as they were. Call it as training will
    call the model: compiled, under the same autocast, on the same device, on every rank. Three more passes on the first
    length of the schedule and three on all tokens show what routing saves, which :func:`summary` tells from then on; a
    warning is logged if it saves nothing, as with layers so small that starting their kernels takes longer.

    Args:
        model: transformed, with whatever is around it (``torch.compile``, DDP, ...).
        example_inputs: a tuple or dict for one forward, of the shapes that training has. If the output has a ``loss``,
            that is what the backward starts from, else from the sum of its floating-point tensors.

    Returns:
        Seconds that each pass took, by name; they are logged at level INFO as they come.

    Raises:
        LTDError: the model is not transformed, or nothing in its output needs a gradient; or as the first training
            forward would.
    """
    root, rewrite = find_rewrite(model)
    state, (args, kwargs) = rewrite.state, split_inputs(example_inputs)
    scheduler = state.scheduler
    seconds: dict[str, float] = {}

    def timed(name: str, run: Any) -> None:
        start = time.perf_counter()
        run(model, args, kwargs)
        seconds[name] = time.perf_counter() - start
        logger.info("ltd_fx.warm_up: %s took %.1f s", name, seconds[name])

    with _as_it_was(model):
        if not root.training:
            model.train()
        before = 0 if scheduler is None else scheduler._step
        with state.rehearsal():
            state.under_way = False
            try:
                for name, step in _kinds(scheduler, tuple(state.lengths)).items():
                    if scheduler is not None:
                        scheduler.set_step(step)
                    timed(name, _train)
                rewrite.note = _measure(model, args, kwargs, scheduler, state.device)
            finally:
                if scheduler is not None:
                    scheduler.set_step(before)
        model.eval()
        timed("evaluation", _evaluate)
    for site in rewrite.sites:
        site.begin_forward()  # What was drawn here is no forward of the user's.
    return seconds


def _measure(model: nn.Module, args: Any, kwargs: Any, scheduler: LTDScheduler | None, device: torch.device) -> str:
    """What a step on the schedule's first length takes of one on its last, in a sentence; empty if these are equal."""
    if scheduler is None or not scheduler.length_at(0) < scheduler.length_at(scheduler.total_steps):
        return ""
    steps = {0: float("inf"), scheduler.total_steps: float("inf")}
    for _ in range(_ROUNDS):
        for step in steps:
            scheduler.set_step(step)
            start = time.perf_counter()
            _train(model, args, kwargs)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            steps[step] = min(steps[step], time.perf_counter() - start)
    first, last = steps.values()
    few, many = (scheduler.length_at(step) for step in steps)
    of = f"{few} tokens takes {first / last:.0%} of the time of one on {many}"
    note = f"measured by warm_up: forward and backward on {of}"
    if first >= last:
        note += "; routing does not pay here: the layers, or the batch, are too small"
        logger.warning("ltd_fx: %s", note)
    return note


def _kinds(scheduler: LTDScheduler | None, shares: tuple[float | None, ...]) -> dict[str, int]:
    """The first step of each kind of lengths that a schedule has: those for which graphs differ."""
    if scheduler is None:
        return {"training": 0}
    steps = {0}
    for share in shares:  # A length of 1 has a graph of its own, and so have all tokens.
        steps |= {_first_step(scheduler, share, tokens) for tokens in (2, scheduler.max_length)}
    kinds: dict[str, int] = {}
    for step in sorted(step for step in steps if step <= scheduler.total_steps):
        lengths = [scheduler.length_at(step, share) for share in shares]
        named = ["all tokens" if n >= scheduler.max_length else "1 token" if n == 1 else "some tokens" for n in lengths]
        kinds.setdefault(", ".join(named), step)
    return kinds


def _first_step(scheduler: LTDScheduler, share: float | None, tokens: int) -> int:
    """The first with at least so many tokens; beyond ``total_steps`` if there is none."""
    steps = range(scheduler.total_steps + 1)
    return bisect_left(steps, tokens, key=lambda step: scheduler.length_at(step, share))


def _train(model: nn.Module, args: Any, kwargs: Any) -> None:
    output = model(*args, **kwargs)
    loss = getattr(output, "loss", None)
    outputs = leaves(output) if loss is None else iter([loss])
    sums = [leaf.sum() for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not sums:
        raise LTDError("ltd_fx.warm_up: no tensor of the model's output needs a gradient; does any parameter of it?")
    torch.stack([value.float() for value in sums]).sum().backward()


def _evaluate(model: nn.Module, args: Any, kwargs: Any) -> None:
    with torch.no_grad():
        model(*args, **kwargs)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers, modes and the random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for parameter, _ in grads:
        parameter.grad = None
    devices = {p.device for p, _ in grads if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    try:
        with torch.random.fork_rng([device.index for device in devices], device_type=kind):
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
