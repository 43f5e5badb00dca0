"""Whether a saved configuration is that of a schedule."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from ltd_fx.errors import LTDError

# What a callable gives: callables of one name, as lambdas are, differ in nothing else. States of 0.1 lack it.
DIGEST = "lengths"


def digest(length_at: Callable[[int], int], steps: int) -> str:
    """Tells schedules apart by their lengths at steps 0 to ``steps`` - 1, or to the first that has none."""
    lengths = hashlib.sha256()
    try:
        for step in range(steps):
            lengths.update(b"%d " % length_at(step))
    except Exception:  # The user's function raises it again where that step is taken.
        lengths.update(b"end")
    return lengths.hexdigest()[:16]


def refuse_other(ours: Mapping[str, Any], theirs: Mapping[Any, Any]) -> None:
    """Raise :class:`LTDError` unless the saved configuration ``theirs`` is ``ours``."""
    for field in sorted(ours.keys() | theirs.keys(), key=str):
        if field not in theirs and field == DIGEST:
            continue
        if field not in ours or field not in theirs:
            what = f"has the unknown field {field!r}" if field in theirs else f"lacks the field {field!r}"
            raise LTDError(f"LTDScheduler: the state_dict's config {what}; it is of another version, or damaged")
        if ours[field] == theirs[field]:
            continue
        if field == DIGEST:
            raise LTDError(
                f"LTDScheduler: the state_dict's kind gave other lengths than this scheduler's kind, {ours['kind']!r}; "
                "build it with the saved callable"
            )
        raise LTDError(
            f"LTDScheduler: the state_dict has {field}={theirs[field]!r}, this scheduler {field}={ours[field]!r}; "
            "build it with the saved configuration"
        )


def refuse_position(position: Any, seed: int) -> None:
    """Raise :class:`LTDError` unless ``position`` says where a model's draws are, and they are of this ``seed``."""
    fields = position if isinstance(position, Mapping) else {}
    if fields.keys() != {"seed", "forward"} or not all(isinstance(value, int) for value in fields.values()):
        raise LTDError(f"LTDScheduler: the state_dict's draws must hold the integers seed and forward: {position!r}")
    if position["seed"] != seed:
        raise LTDError(
            f"LTDScheduler: the state_dict was drawn with seed={position['seed']}, the model was transformed with "
            f"seed={seed}; pass the same seed to ltd_fx.transform"
        )
