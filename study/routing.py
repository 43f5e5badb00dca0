"""From a run's configuration to what ``ltd_fx`` does in it: the schedule, the rewritten model, the learning rate."""

import math
from typing import Any

from config import Config
from torch import nn
from torch.optim import Optimizer

import ltd_fx


def transform(model: nn.Module, config: Config, tokens: int, protect: int, seed: int) -> ltd_fx.LTDScheduler | None:
    """Rewrite ``model`` as ``config`` says, in place.

    Args:
        tokens: of a whole sequence.
        protect: first tokens that are always kept (class tokens).

    Returns:
        the schedule of the reserved length; ``None`` for a dense run.
    """
    schedule = config.schedule
    if schedule is None:
        return None
    least = max(round(schedule.least * tokens), 1)
    scheduler = ltd_fx.LTDScheduler(
        least,
        tokens,
        1 if schedule.until is None else round(schedule.until * config.steps),
        kind="constant" if schedule.until is None else "linear",
        multiple_of=schedule.multiple_of,
        global_batch_size=config.batch,
    )
    options: dict[str, Any] = {}
    if schedule.routes is not None:  # which may begin and end at any layer
        options = {"routes": [(*route, None) for route in schedule.routes], "skip_first": 0, "skip_last": 0}
    ltd_fx.transform(model, scheduler, seed=seed, protect=protect or None, **options)
    return scheduler


class LearningRate:
    """Warm-up and a cosine: by steps, or by layer tokens (:class:`ltd_fx.LayerTokenLR`)."""

    def __init__(self, optimizer: Optimizer, config: Config, scheduler: ltd_fx.LTDScheduler | None) -> None:
        self.optimizer, self.config = optimizer, config
        self.base = [group["lr"] for group in optimizer.param_groups]
        self.by_layer_tokens = None
        if scheduler is not None and config.schedule is not None and config.schedule.lr_by == "layer tokens":
            total = scheduler.total_layer_tokens(config.steps)
            self.by_layer_tokens = ltd_fx.LayerTokenLR(
                optimizer,
                scheduler,
                total_layer_tokens=total,
                warmup_layer_tokens=round(config.warmup * total),
                min_ratio=config.last_lr,
            )
        self.set(0)

    def set(self, step: int) -> None:
        """Set the rates for ``step``, after the scheduler was set to it."""
        if self.by_layer_tokens is not None:
            if step > 0:
                self.by_layer_tokens.step()
            return
        warmup = self.config.warmup * self.config.steps
        if step < warmup:
            ratio = step / warmup
        else:
            progress = (step - warmup) / (self.config.steps - warmup)
            ratio = self.config.last_lr + (1 - self.config.last_lr) * (1 + math.cos(math.pi * progress)) / 2
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * ratio
