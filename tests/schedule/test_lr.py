"""The LayerToken learning rate against hand-computed rates, transformers' schedules, and itself resumed."""

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import ltd_fx
from ltd_fx import LayerTokenLR, LTDError, LTDScheduler

STEPS = 40


def attached(kind: str = "linear", batch: int | None = 2) -> LTDScheduler:
    """Of 4 layers, 2 of them routed, from 8 to 64 tokens."""
    scheduler = LTDScheduler(8, 64, 30, multiple_of=4, kind=kind, global_batch_size=batch)
    encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    ltd_fx.transform(nn.TransformerEncoder(encoder, 4, enable_nested_tensor=False), scheduler)
    return scheduler


def optimizer(*rates: float | torch.Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def rates(adam: torch.optim.Optimizer, scheduler: LTDScheduler, lr: Any, steps: int = STEPS) -> list[list[float]]:
    """The learning rates of each of the next steps."""
    found = []
    for _ in range(steps):
        found.append([float(group["lr"]) for group in adam.param_groups])
        adam.step()
        scheduler.step()
        lr.step()
    return found


def test_by_hand() -> None:
    """At 8 of 64 tokens in 2 of 4 layers, and 2 sequences: 2 * (8 * 2 + 64 * 2) = 288 layer tokens a step."""
    scheduler, adam = attached("constant"), optimizer(1.0, 0.5)
    options = {"total_layer_tokens": 288 * 10, "warmup_layer_tokens": 288 * 2, "min_ratio": 0.2}
    lr = LayerTokenLR(adam, scheduler, decay="linear", **options)
    expected = [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2, 0.2]
    assert rates(adam, scheduler, lr, 13) == [pytest.approx([r, r / 2], abs=1e-12) for r in expected]
    cosine = LayerTokenLR(optimizer(1.0), attached("constant"), **options)
    found = [cosine.ratio_at(288 * step) for step in (0, 1, 2, 6, 10, 50)]
    assert found == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])
    assert cosine.ratio_at(288 * 4) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_of_a_dense_run_it_is_the_schedule_by_steps(decay: str) -> None:
    transformers = pytest.importorskip("transformers")
    scheduler = LTDScheduler(64, 64, 1, global_batch_size=3)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 4, enable_nested_tensor=False)
    ltd_fx.transform(encoder, scheduler)
    ours, theirs = optimizer(0.1), optimizer(0.1)
    total, warmup = scheduler.total_layer_tokens(STEPS), scheduler.total_layer_tokens(7)
    lr = LayerTokenLR(ours, scheduler, total_layer_tokens=total, warmup_layer_tokens=warmup, decay=decay)
    by_steps = getattr(transformers, f"get_{decay}_schedule_with_warmup")(theirs, 7, STEPS)
    found = rates(ours, scheduler, lr)
    for step in range(STEPS):
        assert found[step] == pytest.approx([theirs.param_groups[0]["lr"]], rel=1e-12)
        theirs.step()
        by_steps.step()


def test_short_sequences_take_it_less_far() -> None:
    scheduler, adam = attached(), optimizer(1.0)
    lr = LayerTokenLR(adam, scheduler, total_layer_tokens=scheduler.total_layer_tokens(STEPS), decay="linear")
    found = [rate for (rate,) in rates(adam, scheduler, lr)]
    assert all(rate > 1 - step / STEPS for step, rate in enumerate(found) if step > 0)
    assert adam.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("split", [1, 5, 39])
@pytest.mark.parametrize("order", [("lr", "scheduler", "adam"), ("adam", "scheduler", "lr")])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_resumes_to_the_bit(split: int, order: tuple[str, ...], kind: Any) -> None:
    def build(rate: float = 0.1) -> dict[str, Any]:
        scheduler, adam = attached(), optimizer(kind(rate), 0.03)
        options = {"total_layer_tokens": 10_000, "warmup_layer_tokens": 900, "min_ratio": 0.1}
        return {"adam": adam, "scheduler": scheduler, "lr": LayerTokenLR(adam, scheduler, **options)}

    whole = rates(**build())
    first = build()
    found = rates(**first, steps=split)
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in first.items()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second = build(0.7)  # the base rates are the saved ones
    for name in order:
        second[name].load_state_dict(saved[name])
    assert found + rates(**second, steps=STEPS - split) == whole


def test_stepping_it_twice_changes_nothing() -> None:
    """As Accelerate does, once for each process."""
    scheduler, adam = attached(), optimizer(1.0)
    lr = LayerTokenLR(adam, scheduler, total_layer_tokens=10_000)
    adam.step()
    scheduler.step()
    lr.step()
    before = lr.get_last_lr()
    lr.step()
    assert lr.get_last_lr() == before


def test_before_the_schedulers_step_it_is_refused() -> None:
    scheduler, adam = attached(), optimizer(1.0)
    lr = LayerTokenLR(adam, scheduler, total_layer_tokens=10_000)
    adam.step()
    with pytest.raises(LTDError, match=r"call the LTDScheduler's step\(\) before"):
        lr.step()
    with pytest.raises(LTDError, match="takes no epoch"):
        lr.step(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_layer_tokens": 0}, "warmup_layer_tokens=0 leaves nothing of total_layer_tokens=0"),
        ({"total_layer_tokens": -5}, "total_layer_tokens must be an integer >= 0, got -5"),
        ({"total_layer_tokens": 1e9}, "total_layer_tokens must be an integer"),
        ({"total_layer_tokens": True}, "total_layer_tokens must be an integer"),
        ({"warmup_layer_tokens": -1}, "warmup_layer_tokens must be an integer"),
        ({"warmup_layer_tokens": 9}, "warmup_layer_tokens=9 leaves nothing of total_layer_tokens=9"),
        ({"decay": "exponential"}, "unknown decay 'exponential'; use one of cosine, linear"),
        ({"min_ratio": 1.0}, r"min_ratio must be in \[0, 1\), got 1.0"),
        ({"min_ratio": math.nan}, "min_ratio must be in"),
        ({"min_ratio": "0.1"}, "min_ratio must be in"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    adam = optimizer(1.0)
    with pytest.raises(LTDError, match=message):
        LayerTokenLR(adam, attached(), **{"total_layer_tokens": 9, **options})
    assert adam.param_groups[0]["lr"] == 1.0


def test_schedulers_that_cannot_count() -> None:
    with pytest.raises(LTDError, match=r"call ltd_fx\.transform first"):
        LayerTokenLR(optimizer(1.0), LTDScheduler(8, 64, 30, global_batch_size=2), total_layer_tokens=9)
    with pytest.raises(LTDError, match=r"LTDScheduler\(\.\.\., global_batch_size="):
        LayerTokenLR(optimizer(1.0), attached(batch=None), total_layer_tokens=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": "linear"}, "decay='linear', this schedule decay='cosine'"),
        ({"total_layer_tokens": 8}, "total_layer_tokens=8, this schedule total_layer_tokens=9000"),
        ({"more": 1}, "has the entries.*'more'"),
    ],
    ids=str,
)
def test_a_state_of_another_schedule_changes_nothing(change: dict[str, Any], message: str) -> None:
    lr = LayerTokenLR(optimizer(1.0), attached(), total_layer_tokens=9000)
    before = lr.state_dict()
    with pytest.raises(LTDError, match=message):
        lr.load_state_dict({**before, "last_epoch": 7, **change})
    assert lr.state_dict() == before
    step_lr = torch.optim.lr_scheduler.StepLR(optimizer(1.0), 3)
    with pytest.raises(LTDError, match="has the entries"):
        lr.load_state_dict(step_lr.state_dict())
