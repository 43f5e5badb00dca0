"""transformers' ``Trainer``: the scheduler stepped, logged and resumed with it."""

import warnings
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ltd_fx.install import find_scheduler
from ltd_fx.schedule import LTDScheduler


class LTDCallback(TrainerCallback, ExportableState):
    """Steps the scheduler of the trainer's transformed model, logs what it saves, and resumes it.

    ``Trainer(model=ltd_fx.transform(model, scheduler), ..., callbacks=[LTDCallback()])``

    - The scheduler goes on by one step at each optimizer step, before the learning rate does (``LayerTokenLR``).
    - Each log of the training loss also has ``ltd_reserved_length``, ``ltd_layer_tokens`` and ``ltd_saved`` (see
      :meth:`ltd_fx.LTDScheduler.metrics`). The trainer calls its reporting callbacks (TensorBoard, W&B) before those in
      ``callbacks``: use :func:`add_callback` to have the numbers there as well.
    - Its state is in the checkpoints' ``trainer_state.json``. ``train(resume_from_checkpoint=...)`` goes on with the
      same lengths and the same draws; a checkpoint saved without this callback sets the scheduler to its step, with a
      warning. Any other ``train()`` goes on from the scheduler's current step.
    - Where ``auto_find_batch_size`` begins again with smaller batches, the scheduler and the draws go back to where
      ``train()`` began.

    Evaluation is dense, and what the trainer saves has the untransformed model's keys.

    Args:
        scheduler: of a model that is compiled with :func:`ltd_fx.backend`, and not transformed:
            ``model.compile(backend=ltd_fx.backend(scheduler))`` before the trainer is given it.

    Raises:
        LTDError: when training begins: the model is not transformed or has no scheduler, or the checkpoint is of
            another schedule or seed.
    """

    def __init__(self, scheduler: LTDScheduler | None = None) -> None:
        self._given = scheduler
        self._scheduler: LTDScheduler | None = None
        # while training: the trainer's batch size, and the scheduler's state at the start
        self._begun: tuple[int, dict[str, Any]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler = self._given or find_scheduler(kwargs["model"])[1]
        per_process = (args.auto_find_batch_size and state.train_batch_size) or args.train_batch_size
        batch = per_process * args.gradient_accumulation_steps * args.world_size
        if scheduler.global_batch_size not in (None, batch):
            warnings.warn(
                f"LTDCallback: a step of this trainer has {batch} sequences, but layer tokens are counted for "
                f"global_batch_size={scheduler.global_batch_size}",
                stacklevel=2,
            )
        self._scheduler = scheduler
        # the trainer expects an entry to write to, which the state of another run may lack
        entries: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # declared as the list it is made of
        saved = entries.setdefault(type(self).__name__, {})
        if state.global_step and saved:
            scheduler.load_state_dict(saved["attributes"]["saved"])
        elif state.global_step:
            warnings.warn(
                "LTDCallback: the checkpoint was saved without this callback; the schedule goes on from step "
                f"{state.global_step}",
                stacklevel=2,
            )
            scheduler.set_step(state.global_step)
        elif self._begun is not None and per_process < self._begun[0]:
            scheduler.load_state_dict(self._begun[1])
        self._begun = (per_process, scheduler.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begun = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._scheduler is not None
        self._scheduler.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs or self._scheduler is None:
            return
        found = self._scheduler.metrics()
        logs.update(found)
        state.log_history[-1].update(found)  # appended by the trainer before the callbacks are called

    def state(self) -> dict[str, Any]:
        """What the trainer writes into a checkpoint."""
        saved = None if self._scheduler is None else self._scheduler.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}


def add_callback(trainer: Trainer) -> LTDCallback:
    """Put an :class:`LTDCallback` before the trainer's other callbacks, so that those which report (TensorBoard, W&B)
    see what it adds to the logs.

    Returns:
        The callback.
    """
    callback = LTDCallback()
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
