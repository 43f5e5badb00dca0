"""``ltd_fx.backend``: what Dynamo captures is routed as ``transform`` routes the module, which stays as it is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import LENGTH, Net, words
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def step(run: Callable[..., Any], model: nn.Module, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = run(words(length)).pow(2).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def function(model: nn.Module, backend: Any) -> Any:
    return torch.compile(lambda ids: model(ids), backend=backend, fullgraph=True)


class Step:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, ids: Tensor) -> Tensor:
        return self.model(ids)


def method(model: nn.Module, backend: Any) -> Any:
    return torch.compile(Step(model).run, backend=backend, fullgraph=True)


def layers(model: nn.Module, backend: Any) -> Any:
    return ltd_fx.compile_layers(model, backend=backend, fullgraph=True)


def in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


WAYS: dict[str, Any] = {"whole": whole, "in place": in_place, "function": function, "method": method, "layers": layers}


def both(**options: Any) -> tuple[nn.Module, nn.Module, list[LTDScheduler]]:
    """The same model twice, the second transformed."""
    torch.manual_seed(0)
    model = Net().train()
    twin, schedulers = copy.deepcopy(model), [LTDScheduler(5, LENGTH, 4) for _ in range(2)]
    ltd_fx.transform(twin, schedulers[1], example_inputs=(words(LENGTH),), **options)
    return model, twin, schedulers


def assert_trains_alike(run: Any, model: nn.Module, twin: nn.Module, backend: Any, schedulers: Any) -> None:
    """Losses, gradients and draws, over lengths (the width among them), to the end of the schedule."""
    for length in (LENGTH, 16, 9, LENGTH, LENGTH, LENGTH):
        torch.testing.assert_close(step(run, model, length), step(twin, twin, length), rtol=1e-5, atol=1e-7)
        drawn = ltd_fx.sampled_indices(backend), ltd_fx.sampled_indices(twin)
        torch.testing.assert_close(*drawn, rtol=0, atol=0)
        for scheduler in schedulers:
            scheduler.step()
    assert schedulers[0].consumed_layer_tokens == schedulers[1].consumed_layer_tokens


@pytest.mark.parametrize("way", [way if way == "whole" else slow(way) for way in WAYS])
def test_it_trains_as_the_transformed_model_does(way: str) -> None:
    model, twin, schedulers = both()
    counter = CompileCounterWithBackend("aot_eager")
    backend = ltd_fx.backend(schedulers[0], inner=counter)
    run = WAYS[way](model, backend)  # torch.compile itself may leave attributes
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    assert_trains_alike(run, model, twin, backend, schedulers)
    for module, (cls, attributes) in zip(model.modules(), before, strict=True):
        assert type(module) is cls
        assert list(module.__dict__) == list(attributes)
        assert all(module.__dict__[name] is value for name, value in attributes.items())
    assert [site.status for site in ltd_fx.summary(backend).sites if site.routed] == ["proven", "proven"]
    assert "proven" in str(ltd_fx.summary(backend))
    assert counter.frame_count == (2 if way != "layers" else counter.frame_count)


@pytest.mark.parametrize(
    "options",
    [
        slow({"seed": 3}),
        slow({"sampling": "shared"}),
        slow({"skip_first": 0, "skip_last": 2}),
        slow({"protect": 4}),
        slow({"protect": lambda positions: positions % 5 == 0}),
        slow({"routes": [(1, 2, 0.5)]}),
        slow({"keep": {"layers.1": 0.25}}),
        slow({"layers": r"layers\.[123]"}),
    ],
    ids=["seed", "shared", "skipped", "protect", "protect by function", "routes", "keep", "layers"],
)
def test_settings_mean_what_they_mean_for_transform(options: dict[str, Any]) -> None:
    model, twin, schedulers = both(**options)
    backend = ltd_fx.backend(schedulers[0], inner="aot_eager", **options)
    assert_trains_alike(whole(model, backend), model, twin, backend, schedulers)


def test_a_whole_schedule_is_two_graphs_of_any_size() -> None:
    model, twin, _ = both()
    scheduler, counter = LTDScheduler(4, LENGTH, 40), CompileCounterWithBackend("aot_eager")
    ltd_fx.restore(twin)
    run = whole(model, ltd_fx.backend(scheduler, inner=counter))
    for number in range(41):
        scheduler.set_step(number)
        ids = torch.randint(0, 32, (2 + number % 3, LENGTH - number % 4))
        loss = run(ids).pow(2).mean()
        loss.backward()
        if scheduler.reserved_length >= ids.shape[1]:
            torch.testing.assert_close(loss, twin(ids).pow(2).mean())
    assert counter.frame_count == 2


@pytest.mark.slow
def test_eval_is_the_models_own_even_where_it_never_asks_for_the_mode() -> None:
    model, twin, schedulers = both()
    run = whole(model, ltd_fx.backend(schedulers[0], inner="aot_eager"))
    routed = step(run, model, LENGTH)[0]
    plain = Net()
    plain.load_state_dict(model.state_dict())
    dense = plain(words(LENGTH)).pow(2).mean()
    model.eval()
    torch.testing.assert_close(step(run, model, LENGTH)[0], dense)
    assert (routed - dense).abs() > 1e-3
    model.train()
    twin.train()
    step(twin, twin, LENGTH)  # its first forward, too
    torch.testing.assert_close(step(run, model, LENGTH), step(twin, twin, LENGTH))


@pytest.mark.slow
def test_a_model_that_is_seen_in_eval_first_is_routed_later() -> None:
    model, twin, schedulers = both()
    model.eval()
    backend = ltd_fx.backend(schedulers[0], inner="aot_eager")
    run = whole(model, backend)
    run(words(LENGTH))
    model.train()
    assert_trains_alike(run, model, twin, backend, schedulers)


@pytest.mark.slow
def test_frozen_layers_are_dense() -> None:
    model, twin, schedulers = both()
    backend = ltd_fx.backend(schedulers[0], inner="aot_eager")
    run = whole(model, backend)
    for each in (model, twin):
        each.layers[1].eval()
    torch.testing.assert_close(step(run, model, LENGTH), step(twin, twin, LENGTH))
    for each in (model, twin):
        each.layers[1].train()
    torch.testing.assert_close(step(run, model, LENGTH), step(twin, twin, LENGTH))


@pytest.mark.slow
def test_weights_may_be_replaced() -> None:
    model, twin, schedulers = both()
    run = whole(model, ltd_fx.backend(schedulers[0], inner="aot_eager"))
    step(run, model, LENGTH)
    for each in (model, twin):
        torch.manual_seed(1)
        each.layers[1].o.weight = nn.Parameter(torch.randn_like(each.layers[1].o.weight))
    step(twin, twin, LENGTH)
    torch.testing.assert_close(step(run, model, LENGTH), step(twin, twin, LENGTH))


@pytest.mark.slow
def test_it_resumes_before_its_first_forward() -> None:
    model, twin, schedulers = both()
    for _ in range(2):
        step(twin, twin, LENGTH)
    schedulers[1].step()
    step(twin, twin, LENGTH)
    backend = ltd_fx.backend(schedulers[0], inner="aot_eager")
    schedulers[0].load_state_dict(schedulers[1].state_dict())
    torch.testing.assert_close(step(whole(model, backend), model, LENGTH), step(twin, twin, LENGTH))


def test_a_scheduler_of_another_seed_is_refused_at_the_first_forward() -> None:
    model, _, schedulers = both()
    run = whole(model, ltd_fx.backend(schedulers[0], inner="aot_eager", seed=5))
    schedulers[0].load_state_dict(schedulers[1].state_dict())
    with pytest.raises(LTDError, match="seed"):
        step(run, model, LENGTH)


class Masked(Net):
    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(ids) * (1 if attention_mask is None else attention_mask[..., None])


@pytest.mark.slow
@pytest.mark.parametrize("keyword", [True, False])
def test_padding_is_dropped_first(keyword: bool) -> None:
    torch.manual_seed(0)
    model = Masked().train()
    twin, schedulers = copy.deepcopy(model), [LTDScheduler(9, LENGTH, 4) for _ in range(2)]
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, 12:] = 0
    ltd_fx.transform(twin, schedulers[1], protect="attention_mask", example_inputs=(words(LENGTH), mask))
    backend = ltd_fx.backend(schedulers[0], inner="aot_eager", protect="attention_mask")
    run, drawn = whole(model, backend), []
    for forward, source in ((run, backend), (twin, twin)):
        forward(words(LENGTH), attention_mask=mask) if keyword else forward(words(LENGTH), mask)
        drawn.append(ltd_fx.sampled_indices(source))
    torch.testing.assert_close(*drawn, rtol=0, atol=0)
    assert int(drawn[0]["layers.1"][0].max()) < 12
