"""Shares of the tokens of one's own, beside the schedule; and routes and shares that do not fit."""

from typing import Any

import pytest
import torch
from toy import PATTERN, Block, Net

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


def test_shares_follow_the_schedule() -> None:
    torch.manual_seed(0)
    ltd_fx.register_pattern(Block, PATTERN)
    scheduler = LTDScheduler(10, 100, 9, global_batch_size=2)
    model = ltd_fx.transform(Net(5).train(), scheduler, keep={"blocks.2": 0.4})
    total = 0
    for step in range(11):
        model(torch.randn(2, 100, 8))
        kept = ltd_fx.sampled_indices(model)
        expected = [min(10 + 10 * step, 100), min(40 + 60 * step // 9, 100)]
        assert [kept["blocks.1"].shape[1], kept["blocks.2"].shape[1]] == expected
        assert expected == [scheduler.length_at(step), scheduler.length_at(step, 0.4)]
        assert scheduler.consumed_layer_tokens == total == scheduler.total_layer_tokens(step)
        total += 2 * (2 * expected[0] + expected[1] + 2 * 100)
        scheduler.step()
    resumed = LTDScheduler(10, 100, 9, global_batch_size=2)
    resumed.set_step(11)
    ltd_fx.transform(Net(5), resumed, keep={"blocks.2": 0.4})
    assert resumed.consumed_layer_tokens == total


def test_a_share_without_a_scheduler_is_of_the_sequence() -> None:
    ltd_fx.register_pattern(Block, PATTERN)
    model = ltd_fx.transform(Net(5).train(), keep={"blocks.2": 0.3})
    for seq_len in (10, 100, 2):
        model(torch.randn(2, seq_len, 8))
        kept = ltd_fx.sampled_indices(model)
        assert [kept[f"blocks.{i}"].shape[1] for i in (1, 2, 3)] == [
            seq_len // 2,
            max(3 * seq_len // 10, 1),
            seq_len // 2,
        ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routes": [(0, 2, 0.5)]}, "blocks.0, which skip_first=1 leaves dense"),
        ({"routes": [(2, -1, 0.5)]}, "blocks.5, which skip_last=1 leaves dense"),
        ({"routes": [(1, 3, 0.5), (3, 4, 0.5)]}, "blocks.3 lies on two routes"),
        ({"routes": [(3, 1, 0.5)]}, "first must not come after the last"),
        ({"routes": [(1, 6, 0.5)]}, "which has 6 layers"),
        ({"routes": [(1, 2)]}, "a route is"),
        ({"routes": [(1, 2, 1)]}, "between 0 and 1, got 1"),
        ({"routes": [(1, 2, 1.5)]}, "between 0 and 1"),
        ({"routes": []}, "no layer to route"),
        ({"keep": {"blocks.0": 0.5}}, "'blocks.0', which is no routed layer"),
        ({"keep": {"block.2": 0.5}}, "did you mean 'blocks.2'"),
        ({"keep": {"blocks.2": True}}, "between 0 and 1"),
        ({"routes": [(1, 2, None)], "keep": {"blocks.2": 0.5}}, "blocks.2, which lies on a route"),
        ({"routes": [(1, 2, 0.1)], "protect": 5, "scheduler": LTDScheduler(8, 40, 9)}, "keep=0.1, which starts at 4"),
    ],
)
def test_bad_routes_are_refused(options: dict[str, Any], message: str) -> None:
    ltd_fx.register_pattern(Block, PATTERN)
    with pytest.raises(LTDError, match=message):
        ltd_fx.transform(Net(6), **options)


@pytest.mark.parametrize("kind", ["root", "cosine", "step", lambda step: 197 if step >= 300 else 32])
@pytest.mark.parametrize("share", [None, 0.3])
def test_a_maximum_that_is_no_multiple_is_reached(kind: Any, share: float | None) -> None:
    scheduler = LTDScheduler(32, 197, 300, multiple_of=8, kind=kind)
    assert scheduler.length_at(299, share) < scheduler.length_at(300, share) == 197
