"""Lightning's ``Trainer``: the scheduler stepped, logged and resumed with it."""

import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.install import find_rewrite_maybe, find_scheduler
from ltd_fx.schedule import LayerTokenLR, LTDScheduler


class LTDCallback(Callback):
    """Steps the scheduler of the transformed model within the LightningModule, logs what it saves, and resumes it.

    ``module.model = ltd_fx.transform(model, scheduler)``, then ``Trainer(..., callbacks=[LTDCallback()])``

    - The scheduler goes on by one step at each step of the optimizer that holds parameters of the transformed model (of
      the first in ``configure_optimizers``, if several do). It does so in ``on_before_optimizer_step``, when the
      gradients are complete: batches that only accumulate do not count, manual optimization does, and a learning rate
      scheduler (``LayerTokenLR``, with ``"interval": "step"``) finds the step taken.
    - It logs through the module (``self.log``, in float32) ``ltd_reserved_length``, ``ltd_layer_tokens`` and
      ``ltd_saved`` (see :meth:`ltd_fx.LTDScheduler.metrics`).
    - Its state is in the checkpoints. ``fit(ckpt_path=...)`` goes on with the same lengths and the same draws; a
      checkpoint saved without this callback sets the scheduler to its ``global_step``, with a warning. Any other
      ``fit()`` goes on from the scheduler's current step.
    - The tuner's trial runs (``scale_batch_size``, ``lr_find``) leave the schedule and the draws where they were. They
      call no callbacks, so take no step of the schedule: have no ``LayerTokenLR`` in ``scale_batch_size``.

    Validation is dense, and the checkpoints have the untransformed model's keys.

    Raises:
        LTDError: when training begins: the model is not transformed or has no scheduler, no optimizer holds its
            parameters, a ``LayerTokenLR`` would be stepped by epochs, or the checkpoint is of another schedule or seed,
            or was saved without this callback while several optimizers counted its ``global_step``.
    """

    def __init__(self) -> None:
        self._module: LightningModule | None = None
        self._scheduler: LTDScheduler | None = None
        self._optimizer: Any = None
        self._loaded: dict[str, Any] | None = None  # until training begins: the model may not be transformed yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._module, self._loaded = pl_module, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        root, scheduler = find_scheduler(pl_module)
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LayerTokenLR) and config.interval != "step":
                raise LTDError(
                    f"LTDCallback: LayerTokenLR changes at every step, but has the interval {config.interval!r}; "
                    'return it as {"scheduler": ..., "interval": "step"} from configure_optimizers'
                )
        optimizer = _optimizer_of(root, trainer.optimizers)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            scheduler.load_state_dict(loaded)
        elif trainer.ckpt_path is not None:
            _resume_without_state(scheduler, trainer)
        self._scheduler, self._optimizer = scheduler, optimizer

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if optimizer is self._optimizer:
            assert self._scheduler is not None
            self._scheduler.step()
            pl_module.log_dict(self._scheduler.metrics())

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into a checkpoint: the scheduler's state, once the model is transformed."""
        scheduler = self._find_maybe()
        return {} if scheduler is None else scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of a checkpoint: now, and again when training begins, if the model is not transformed yet."""
        self._loaded = state_dict
        scheduler = self._find_maybe()
        if scheduler is not None:
            scheduler.load_state_dict(state_dict)

    def _find_maybe(self) -> LTDScheduler | None:
        found = None if self._module is None else find_rewrite_maybe(self._module)
        return None if found is None else found[1].state.scheduler


def _optimizer_of(root: nn.Module, optimizers: Sequence[Any]) -> Any:
    """The optimizer whose steps are the schedule's."""
    if len(optimizers) == 1:  # it may hold other objects than the parameters (sharded, flattened)
        return optimizers[0]
    parameters = set(root.parameters())
    for optimizer in optimizers:
        if any(p in parameters for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    raise LTDError("LTDCallback: no optimizer holds parameters of the transformed model, so no step would be counted")


def _resume_without_state(scheduler: LTDScheduler, trainer: Trainer) -> None:
    step = trainer.global_step
    if len(trainer.optimizers) > 1:
        raise LTDError(
            "LTDCallback: the checkpoint was saved without this callback, and its global_step counts "
            f"{len(trainer.optimizers)} optimizers; load its weights yourself, call scheduler.set_step, and fit "
            "without ckpt_path"
        )
    warnings.warn(
        f"LTDCallback: the checkpoint was saved without this callback; the schedule goes on from step {step}",
        stacklevel=2,
    )
    scheduler.set_step(step)
