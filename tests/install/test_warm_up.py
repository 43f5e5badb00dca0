"""All graphs of a schedule ahead, and nothing else changed."""

import copy
import itertools
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

B, S, D = 2, 8, 4


class Layer(nn.Module):
    """With a state, and with chance."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        q = self.linear(hidden)[:, None]
        mixed = nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]
        return hidden + nn.functional.dropout(mixed, 0.1, self.training)


class Net(nn.Sequential):
    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self:
            hidden = layer(hidden)
        return hidden


def transformed(scheduler: LTDScheduler | None, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net(*(Layer() for _ in range(5))), torch.randn(B, S, D)
    return ltd_fx.transform(model, scheduler, **options), x


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def evaluate_and_train(step: nn.Module, scheduler: LTDScheduler, x: Tensor) -> None:
    """To the schedule's end, an evaluation first."""
    for _ in range(3):
        step.eval()
        with torch.no_grad():
            step(x)
        step.train()
        for _ in range(2):
            step(x).sum().backward()
            scheduler.step()
    assert scheduler.reserved_length == S


def test_no_step_compiles_later(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = LTDScheduler(2, S, 4)
    model, x = transformed(scheduler)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    with caplog.at_level(logging.INFO, "ltd_fx"):
        seconds = ltd_fx.warm_up(step, (x,))
    assert list(seconds) == ["some tokens", "all tokens", "evaluation"]
    assert all(f"{name} took" in caplog.text for name in seconds)
    assert counter.frame_count == 3
    evaluate_and_train(step, scheduler, x)
    assert counter.frame_count == 3


def test_an_evaluation_before_the_first_step_is_compiled_once() -> None:
    """Two graphs of training, and one of evaluation, though the layers are learnt between."""
    scheduler = LTDScheduler(2, S, 4)
    model, x = transformed(scheduler)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    evaluate_and_train(step, scheduler, x)
    assert counter.frame_count == 3


def steps(model: nn.Module, scheduler: LTDScheduler | None, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of some steps."""
    torch.manual_seed(1)
    found = []
    for _ in range(3):
        out = model(x)
        out.sum().backward()
        found += [out.detach(), *(p.grad.clone() for p in model.parameters())]
        if scheduler is not None:
            scheduler.step()
    return found


@pytest.mark.parametrize("step", [None, 0, 2], ids=["no scheduler", "at the start", "under way"])
def test_training_goes_on_as_if_it_had_not_been_called(step: int | None) -> None:
    found = []
    for warm in (False, True):
        scheduler = None if step is None else LTDScheduler(1, S, 6)
        model, x = transformed(scheduler)
        model(x).sum().backward()
        if scheduler is not None:
            scheduler.set_step(step)
        model(x).sum().backward()
        model[2].eval()  # A frozen layer.
        if warm:
            before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), [p.grad for p in model.parameters()]
            state = scheduler and scheduler.state_dict()
            ltd_fx.warm_up(model, (x,))
            assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
            assert torch.equal(torch.get_rng_state(), before[1])
            assert all(p.grad is grad for p, grad in zip(model.parameters(), before[2], strict=True))
            assert [layer.training for layer in model] == [True, True, False, True, True]
            assert (scheduler and scheduler.state_dict()) == state
        found.append(steps(model, scheduler, x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("scheduler", "options", "names"),
    [
        (None, {}, ["training"]),
        (LTDScheduler(4, S, 1, kind="constant"), {}, ["some tokens"]),
        (LTDScheduler(1, S, 6), {}, ["1 token", "some tokens", "all tokens"]),
        (LTDScheduler(S, S, 6), {}, ["all tokens"]),
        (LTDScheduler(1, S, 8), {"keep": {"1": 0.5}}, ["1 token, some tokens", "some tokens, some tokens"]),
    ],
)
def test_the_kinds_of_lengths(scheduler: LTDScheduler | None, options: Any, names: list[str]) -> None:
    model, x = transformed(scheduler, **options)
    found = list(ltd_fx.warm_up(model, (x,)))
    assert found[: len(names)] == names
    assert found[-1] == "evaluation"


@pytest.mark.parametrize(("first", "last", "pays"), [(0.5, 2.0, True), (2.0, 1.0, False)])
def test_the_summary_tells_whether_routing_pays(
    first: float, last: float, pays: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ticks = itertools.accumulate(itertools.cycle([0.0, first, 0.0, last]))
    clock = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(sys.modules["ltd_fx.install.warm_up"], "time", clock)
    model, x = transformed(LTDScheduler(2, S, 4))
    assert ltd_fx.summary(model).note == ""
    ltd_fx.warm_up(model, (x,))
    said = f"forward and backward on 2 tokens takes {first / last:.0%} of the time of one on {S}"
    assert said in str(ltd_fx.summary(model))
    assert ("does not pay" in ltd_fx.summary(model).note) == ("does not pay" in caplog.text) == (not pays)


def test_what_cannot_be_warmed_up() -> None:
    with pytest.raises(LTDError, match="not transformed"):
        ltd_fx.warm_up(nn.Linear(2, 2), (torch.zeros(2),))
    scheduler = LTDScheduler(2, S, 4)
    model, x = transformed(scheduler)
    model.requires_grad_(False)
    scheduler.set_step(1)
    with pytest.raises(LTDError, match="no tensor of the model's output needs a gradient"):
        ltd_fx.warm_up(model, (x,))
    assert scheduler.state_dict()["step"] == 1
    assert model.training
