"""States of schedules that a callable gives."""

import functools
from collections.abc import Callable

import pytest

from ltd_fx import LTDError, LTDScheduler

Kind = Callable[[int], int]


def scheduler_of(kind: Kind) -> LTDScheduler:
    return LTDScheduler(2, 64, 10, multiple_of=2, kind=kind)


def growing(by: int) -> Kind:
    def kind(step: int) -> int:
        return 2 + by * step

    return kind


def grow(by: int, step: int) -> int:
    return 2 + by * step


LINEAR: Kind = lambda step: 2 + 4 * step  # noqa: E731 (its name is that of any other)


class Growing:
    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, step: int) -> int:
        return 2 + self.by * step


@pytest.mark.parametrize(
    ("ours", "other"),
    [
        (lambda step: 2 + 4 * step, lambda step: 2 + 6 * step),
        (growing(4), growing(6)),
        (functools.partial(grow, 4), functools.partial(grow, 6)),
        (Growing(4), Growing(6)),
        (lambda step: 2 + 4 * step, lambda step: 2 + 4 * step + 2 * (step == 9)),
        ([2, 4, 6, 8].__getitem__, [2, 4, 6].__getitem__),
    ],
    ids=["lambda", "local", "partial", "object", "last step", "table"],
)
def test_callables_of_one_name_are_told_apart_by_their_lengths(ours: Kind, other: Kind) -> None:
    saved = scheduler_of(ours)
    saved.step()
    loaded = scheduler_of(ours)
    loaded.load_state_dict(saved.state_dict())
    assert (loaded.state_dict(), loaded.reserved_length) == (saved.state_dict(), ours(1))
    loaded = scheduler_of(other)
    before = loaded.state_dict()
    with pytest.raises(LTDError, match=r"kind gave other lengths than this scheduler's kind, .*the saved callable"):
        loaded.load_state_dict(saved.state_dict())
    assert loaded.state_dict() == before


def test_what_a_callable_is_made_of_does_not_matter() -> None:
    saved, loaded = scheduler_of(lambda step: 2 + 4 * step), scheduler_of(lambda step: step * 4 + 2)
    saved.set_step(3)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.reserved_length == 14
    again = scheduler_of(functools.partial(grow, 4))  # as a new process would make it
    again.load_state_dict(scheduler_of(functools.partial(grow, 4)).state_dict())


def test_a_state_of_the_release_before_is_loaded() -> None:
    config = {"min_length": 2, "max_length": 64, "total_steps": 10, "multiple_of": 2, "degree": 2}
    old = {"config": {**config, "kind": "<lambda>", "global_batch_size": None, "relative": False}, "step": 3}
    scheduler = scheduler_of(LINEAR)
    scheduler.load_state_dict({**old, "draws": None})
    assert scheduler.reserved_length == 14
    with pytest.raises(LTDError, match="state_dict has kind='grow', this scheduler kind='<lambda>'"):
        scheduler.load_state_dict({**old, "config": {**old["config"], "kind": "grow"}, "draws": None})  # type: ignore[dict-item]


def test_a_named_kind_has_no_lengths_to_compare() -> None:
    assert "lengths" not in LTDScheduler(2, 64, 10).state_dict()["config"]
    with pytest.raises(LTDError, match="state_dict has kind="):
        LTDScheduler(2, 64, 10, multiple_of=2).load_state_dict(scheduler_of(growing(4)).state_dict())


def test_a_state_is_saved_whatever_the_callable_does_later() -> None:
    table = [2, 4, 6]
    scheduler = scheduler_of(table.__getitem__)
    scheduler.step()
    loaded = scheduler_of([*table].__getitem__)
    loaded.load_state_dict(scheduler.state_dict())
    assert loaded.reserved_length == 4
