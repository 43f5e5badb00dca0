"""The LayerToken learning rate: warm-up and decay by the layer tokens consumed, not by the steps taken."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ltd_fx.errors import LTDError
from ltd_fx.schedule.scheduler import LTDScheduler
from ltd_fx.torch_private import LR_SCHEDULER_STATE

# Progress through the decay, in [0, 1], to the share of the way from the base rate down to the last one that is left.
_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
}
_CONFIG = ("total_layer_tokens", "warmup_layer_tokens", "decay", "min_ratio")
_STATE = (*_CONFIG, *LR_SCHEDULER_STATE)


class LayerTokenLR(LRScheduler):
    """A learning rate that warms up and decays with ``scheduler.consumed_layer_tokens`` (random-LTD, arXiv 2211.11586,
    the LayerToken learning rate schedule).

    A step on short sequences takes the learning rate less far than one on full sequences. With n layer tokens consumed,
    the base rate is multiplied by n / warmup_layer_tokens during warm-up, and after it by
    min_ratio + (1 - min_ratio) * f(p), p = (n - warmup) / (total - warmup): f(p) = (1 + cos(pi * p)) / 2 or 1 - p. From
    ``total_layer_tokens`` on it stays at ``min_ratio``.

    Call ``optimizer.step()``, ``scheduler.step()``, then this ``step()``; save the ``state_dict()`` of all three.

    Args:
        optimizer: its groups' ``lr`` are the base rates.
        scheduler: attached to a model (``ltd_fx.transform``), with a ``global_batch_size``.
        total_layer_tokens: at which the decay ends; ``scheduler.total_layer_tokens(steps)`` for a run of so many steps.
        warmup_layer_tokens: at which the warm-up ends; 0: none.
        decay: ``"cosine"`` or ``"linear"``.
        min_ratio: the share of the base rate that is left at the end.

    Raises:
        LTDError: the scheduler drives no model or counts per sequence, or a number is out of range; the optimizer is
            untouched. In ``step()``: ``scheduler.step()`` was not called before.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: LTDScheduler,
        *,
        total_layer_tokens: int,
        warmup_layer_tokens: int = 0,
        decay: str = "cosine",
        min_ratio: float = 0.0,
    ) -> None:
        for name, value in (("total", total_layer_tokens), ("warmup", warmup_layer_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise LTDError(f"LayerTokenLR: {name}_layer_tokens must be an integer >= 0, got {value!r}")
        if warmup_layer_tokens >= total_layer_tokens:
            raise LTDError(
                f"LayerTokenLR: warmup_layer_tokens={warmup_layer_tokens} leaves nothing of "
                f"total_layer_tokens={total_layer_tokens} to decay over; lower it"
            )
        if decay not in _DECAYS:
            raise LTDError(f"LayerTokenLR: unknown decay {decay!r}; use one of {', '.join(_DECAYS)}")
        if isinstance(min_ratio, bool) or not isinstance(min_ratio, (int, float)) or not 0 <= min_ratio < 1:
            raise LTDError(f"LayerTokenLR: min_ratio must be in [0, 1), got {min_ratio!r}")
        if not scheduler.attached:
            raise LTDError("LayerTokenLR: layer tokens need the layer counts; call ltd_fx.transform first")
        if scheduler.global_batch_size is None:
            raise LTDError(
                "LayerTokenLR: the scheduler counts the layer tokens of one sequence; build it with "
                "LTDScheduler(..., global_batch_size=sequences a step over all ranks)"
            )
        self._scheduler = scheduler
        self.total_layer_tokens = total_layer_tokens
        self.warmup_layer_tokens = warmup_layer_tokens
        self.decay = decay
        self.min_ratio = float(min_ratio)
        self._untouched: int | None = None  # The layer tokens at the start, until the first step finds more.
        super().__init__(optimizer)
        self._untouched = scheduler.consumed_layer_tokens

    def ratio_at(self, layer_tokens: int) -> float:
        """The share of the base rate after ``layer_tokens``, a number between 0 and 1. Pure."""
        if layer_tokens < self.warmup_layer_tokens:
            return layer_tokens / self.warmup_layer_tokens
        span = self.total_layer_tokens - self.warmup_layer_tokens
        left = _DECAYS[self.decay](min((layer_tokens - self.warmup_layer_tokens) / span, 1.0))
        return self.min_ratio + (1 - self.min_ratio) * left

    def get_lr(self) -> list[float | Tensor]:
        ratio = self.ratio_at(self._scheduler.consumed_layer_tokens)
        return [base * ratio for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Set the learning rates for the layer tokens consumed so far; after ``scheduler.step()``.

        Calling it again before the scheduler's next step changes nothing.
        """
        if epoch is not None:
            raise LTDError("LayerTokenLR: step() takes no epoch; it follows the LTDScheduler")
        if self._untouched == self._scheduler.consumed_layer_tokens:
            raise LTDError(
                "LayerTokenLR: no layer tokens were consumed; call the LTDScheduler's step() before this one"
            )
        self._untouched = None
        super().step()

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the layer tokens are in ``scheduler.state_dict()``."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from :meth:`state_dict`; load the optimizer's and the ``LTDScheduler``'s too.

        Raises:
            LTDError: the state is of another configuration, or none of this class; nothing is changed.
        """
        if not isinstance(state_dict, dict) or state_dict.keys() != set(_STATE):
            raise LTDError(f"LayerTokenLR: a state_dict has the entries {sorted(_STATE)}, got {state_dict!r}")
        for name in _CONFIG:
            theirs, ours = state_dict[name], getattr(self, name)
            if theirs != ours:
                raise LTDError(
                    f"LayerTokenLR: the state_dict has {name}={theirs!r}, this schedule {name}={ours!r}; build it with "
                    "the saved configuration"
                )
        super().load_state_dict(state_dict)
        self._untouched = None
