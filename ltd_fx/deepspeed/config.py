"""DeepSpeed's configuration file and scheduler state, read into an :class:`ltd_fx.LTDScheduler`."""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltd_fx.errors import LTDError
from ltd_fx.schedule import LTDScheduler

_REQUIRED = object()
# These keys of random_ltd describe the layers, which transform knows or learns, or are set by DeepSpeed's engine.
_LEARNT = ("model_mask_name", "model_type", "hidden_state_order")
_SET_BY_ENGINE = ("micro_batch_size", "global_batch_size")
_DEFAULT_SEED = 1234  # DeepSpeed's


class _Section:
    """One object of the JSON. Each key is read once; a key that nobody reads is refused."""

    def __init__(self, path: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise LTDError(f"ltd_fx.deepspeed: {path or 'the configuration'} must be an object, got {values!r}")
        self._path = path
        self._left = dict(values)

    def name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self._left.pop(key, default)
        if value is _REQUIRED:
            raise LTDError(f"ltd_fx.deepspeed: {self.name(key)} is missing")
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise LTDError(f"ltd_fx.deepspeed: {self.name(key)} must be of type {kind.__name__}, got {value!r}")
        return value

    def section(self, key: str, default: Any = _REQUIRED) -> "_Section":
        return _Section(self.name(key), self.take(key, dict, default))

    def enabled(self) -> None:
        if not self.take("enabled", bool, False):
            raise LTDError(
                f"ltd_fx.deepspeed: {self.name('enabled')} is not true; without it DeepSpeed drops no tokens"
            )

    def ignore(self, *keys: str) -> list[str]:
        return [self.name(key) for key in keys if self._left.pop(key, _REQUIRED) is not _REQUIRED]

    def close(self) -> None:
        if self._left:
            raise LTDError(f"ltd_fx.deepspeed: unknown key {self.name(min(self._left))}; correct or remove it")


def from_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[LTDScheduler, dict[str, Any]]:
    """Read ``data_efficiency.data_routing.random_ltd`` of a DeepSpeed configuration.

    ``scheduler, options = from_config("ds_config.json"); ltd_fx.transform(model, scheduler, **options)``

    The schedule is DeepSpeed's ``fixed_linear``, except that it is never below ``min_value`` (theirs rounds it down to
    a multiple of ``seq_per_step``). ``random_ltd_layer_id`` counts the layers of a stack from 0, in the model's order;
    a number that the model does not have is refused by ``transform``. Layer tokens are counted by the model's own
    layers, ``total_layer_num`` only bounds the numbers. Keys that are not needed are named in one warning.

    Args:
        config: DeepSpeed's configuration as a dict, or the path of its JSON file. ``train_batch_size``, if it is a
            number, becomes the scheduler's ``global_batch_size``; the other sections are not read.

    Returns:
        The scheduler, and keyword arguments for ``ltd_fx.transform``.

    Raises:
        LTDError: random-LTD is not enabled; a key is missing, unknown or of a wrong type; layer numbers do not fit; a
            schedule other than ``fixed_linear``; ``layer_token_lr_schedule`` is enabled (use ``LayerTokenLR``).
    """
    root = _Section("", _load(Path(config)) if isinstance(config, (str, os.PathLike)) else config)
    batch = root.take("train_batch_size", object, None)  # "auto" in files for transformers
    if batch is not None and batch != "auto" and (isinstance(batch, bool) or not isinstance(batch, int)):
        raise LTDError(f"ltd_fx.deepspeed: train_batch_size must be a number, got {batch!r}")
    efficiency = root.section("data_efficiency")
    routing = efficiency.section("data_routing")
    ltd = routing.section("random_ltd")
    for section in (efficiency, routing, ltd):
        section.enabled()
    seed = efficiency.take("seed", int, _DEFAULT_SEED)
    ids = _layer_ids(ltd)
    _refuse_lr_schedule(ltd.section("layer_token_lr_schedule", {}))
    scheduler = _schedule(ltd.section("random_ltd_schedule"), None if batch == "auto" else batch)
    ignored = [*efficiency.ignore("data_sampling"), *ltd.ignore(*_LEARNT, *_SET_BY_ENGINE)]
    for section in (efficiency, routing, ltd):
        section.close()
    if ignored:
        warnings.warn(
            f"ltd_fx.deepspeed: ignored, for transform learns the layers' arguments by itself: {', '.join(ignored)}",
            stacklevel=2,
        )
    return scheduler, {"skip_first": 0, "skip_last": 0, "routes": [(i, i, None) for i in ids], "seed": seed}


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LTDError(f"ltd_fx.deepspeed: {path} cannot be read as JSON: {error}") from error


def _layer_ids(ltd: _Section) -> list[int]:
    total, number = ltd.take("total_layer_num", int), ltd.take("random_ltd_layer_num", int)
    ids = ltd.take("random_ltd_layer_id", list)
    name = ltd.name("random_ltd_layer_id")
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < total:
            raise LTDError(f"ltd_fx.deepspeed: {name} has {i!r}, but the {total} layers are 0 to {total - 1}")
    if len(set(ids)) != len(ids) or len(ids) != number:
        raise LTDError(f"ltd_fx.deepspeed: {name} must have random_ltd_layer_num={number} different numbers, got {ids}")
    return sorted(ids)


def _schedule(section: _Section, batch: int | None) -> LTDScheduler:
    kind = section.take("schedule_type", str)
    if kind != "fixed_linear":
        raise LTDError(f"ltd_fx.deepspeed: unknown {section.name('schedule_type')} {kind!r}; it must be 'fixed_linear'")
    growth = section.section("schedule_config")
    steps, multiple = growth.take("require_steps", int), growth.take("seq_per_step", int)
    scheduler = LTDScheduler(
        section.take("min_value", int),
        section.take("max_value", int),
        steps,
        multiple_of=multiple,
        global_batch_size=batch,
    )
    growth.close()
    section.close()
    return scheduler


def _refuse_lr_schedule(section: _Section) -> None:
    if section.take("enabled", bool, False):
        raise LTDError(
            f"ltd_fx.deepspeed: {section.name('enabled')} is true, which DeepSpeed refuses to run; set it to false and "
            "build ltd_fx.LayerTokenLR(optimizer, scheduler, ...) with its total and warm-up layer tokens"
        )
    # A section that is disabled has no effect.
    section.ignore("total_layer_tokens", "warmup_type", "warmup_layer_tokens")
    section.close()


def load_scheduler_state(scheduler: LTDScheduler, state_dict: Mapping[str, Any]) -> None:
    """Resume from the state of DeepSpeed's ``RandomLTDScheduler``, which its checkpoints hold under ``"random_ltd"``.

    The draws start anew: DeepSpeed's are not kept in its checkpoints.

    Args:
        scheduler: of the same schedule (:func:`from_config`). If it is attached to a model and has a
            ``global_batch_size``, the consumed layer tokens are compared too.
        state_dict: ``consumed_layer_tokens``, ``current_steps``, ``current_value``, ``min_value`` and ``max_value``.

    Raises:
        LTDError: an entry is missing, unknown or no integer, or the state is of another schedule; nothing is changed.
    """
    section = _Section("random_ltd", state_dict)
    # DeepSpeed counts the step whose forward was last, and -1 before the first.
    last = section.take("current_steps", int)
    found = {name: section.take(name, int) for name in ("min_value", "max_value", "current_value")}
    consumed = section.take("consumed_layer_tokens", int)
    section.close()
    if last < -1:
        raise LTDError(f"ltd_fx.deepspeed: random_ltd.current_steps must be -1 or more, got {last}")
    expected = {
        "min_value": scheduler.min_length,
        "max_value": scheduler.max_length,
        "current_value": scheduler.length_at(max(last, 0)),
    }
    if scheduler.attached and scheduler.global_batch_size is not None:
        found["consumed_layer_tokens"] = consumed
        expected["consumed_layer_tokens"] = scheduler.total_layer_tokens(last + 1)
    for name, value in expected.items():
        if found[name] != value:
            raise LTDError(
                f"ltd_fx.deepspeed: the state has {name}={found[name]} after step {last}, this scheduler {value}: "
                f"another schedule, batch size or choice of layers. Correct it, or call scheduler.set_step({last + 1})"
            )
    scheduler.set_step(last + 1)
