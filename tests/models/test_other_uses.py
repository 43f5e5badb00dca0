"""What is not training step by step: generation with a cache, TorchScript, symbolic tracing. Refused, or right."""

import copy
from typing import Any

import pytest
import torch
from conftest import decoder, gpt2
from torch import Tensor, fx, nn
from toy import Encoder

import ltd_fx
from ltd_fx import LayerPattern, LTDError, LTDScheduler

IDS = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(0))
CACHE = "is given a key-value cache with tokens .*in training mode.*model.eval\\(\\) before generating"


def language(build: Any = None, **options: Any) -> tuple[Any, LTDScheduler]:
    torch.manual_seed(0)
    scheduler = LTDScheduler(4, 32, 10)
    return ltd_fx.transform((build or decoder("Llama"))().train(), scheduler, **options), scheduler


def generate(model: Any) -> Tensor:
    ids: Tensor = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    return ids


@pytest.mark.parametrize("skip_first", [0, 1])
@pytest.mark.parametrize("build", [decoder("Llama"), gpt2], ids=["llama", "gpt2"])
def test_generating_in_training_is_refused_before_any_layer_runs(build: Any, skip_first: int) -> None:
    model, _ = language(build, skip_first=skip_first)
    with pytest.raises(LTDError, match=f"{type(model).__name__} {CACHE}") as raised:
        generate(model)
    assert raised.value.__cause__ is raised.value.__context__ is None
    with pytest.raises(LTDError, match=f"{type(model).__name__} {CACHE}"):
        generate(torch.compile(model, backend="eager"))
    assert generate(model.eval()).shape == (2, 20)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("skip_first", [0, 1])
def test_a_cache_with_tokens_in_training_is_refused(grad: bool, skip_first: int) -> None:
    transformers = pytest.importorskip("transformers")
    model, _ = language(skip_first=skip_first)
    cache = transformers.DynamicCache(config=model.config)
    with torch.set_grad_enabled(grad):
        model(IDS, past_key_values=cache)  # an empty one, which the model makes for itself otherwise
        for kwargs in ({}, {"attention_mask": torch.ones(2, 32, dtype=torch.long)}):
            with pytest.raises(LTDError, match=CACHE):
                model(IDS, past_key_values=cache, **kwargs)


def test_a_layer_refuses_a_cache_that_the_model_was_not_given() -> None:
    transformers = pytest.importorskip("transformers")

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = decoder("Llama")()
            self.cache = transformers.DynamicCache(config=self.model.config)

        def forward(self, ids: Tensor) -> Any:
            return self.model(ids, past_key_values=self.cache)

    model = ltd_fx.transform(Holder())
    model(IDS)
    with pytest.raises(LTDError, match=rf"model\.model\.layers\.1 {CACHE}"):
        model(IDS)


def test_keys_and_values_in_a_tuple_are_a_cache() -> None:
    class Layer(nn.Module):
        def forward(self, hidden: Tensor, past: Any = None) -> Tensor:
            return hidden

    ltd_fx.register_pattern(Layer, LayerPattern(hidden="hidden", cache="past", output=None))
    model = ltd_fx.transform(nn.ModuleList(Layer() for _ in range(3)))
    hidden, keys = torch.randn(2, 8, 4), torch.randn(2, 1, 3, 4)
    model[1](hidden, (None, None))
    with pytest.raises(LTDError, match=f"1 {CACHE}"):
        model[1](hidden, (keys, keys))


def test_at_full_length_a_cache_in_training_is_right() -> None:
    model, scheduler = language()
    scheduler.set_step(10)
    expected = generate(copy.deepcopy(model).eval())
    assert torch.equal(generate(model), expected)


def encoder() -> nn.Module:
    return ltd_fx.transform(Encoder(4), LTDScheduler(4, 16, 10))


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_torchscript(training: bool) -> None:
    model, hidden = encoder().train(training), torch.randn(2, 8, 16)
    with pytest.raises(LTDError, match=r"torch\.jit\.script cannot compile a transformed model; call ltd_fx\.restore"):
        torch.jit.script(model)
    if training:
        with pytest.raises(LTDError, match=r"blocks\.1: exporting in training mode.* before.*torch\.jit\.trace"):
            torch.jit.trace(model, hidden)
    else:
        torch.testing.assert_close(torch.jit.trace(model, hidden, check_trace=False)(hidden), model(hidden))
    torch.jit.script(ltd_fx.restore(model))


def test_torchscript_of_layers_that_are_learnt_later() -> None:
    model = ltd_fx.transform(nn.Sequential(*(Unknown() for _ in range(3))).eval())
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(LTDError, match=r"torch\.jit\.script cannot compile a transformed model"):
            torch.jit.script(each)
        torch.jit.script(ltd_fx.restore(each))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Leaves(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.TransformerEncoderLayer)


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_tracing(training: bool) -> None:
    """Of a transformed model it is refused; traced before, as the message says, a model is routed."""
    with pytest.raises(LTDError, match=r"blocks\.1: torch\.fx\.symbolic_trace cannot.* trace the model first"):
        fx.Tracer(autowrap_functions=()).trace(Every(encoder().train(training)))
    plain = Encoder(4).train(training)
    model = ltd_fx.transform(fx.GraphModule(plain, Leaves().trace(plain)), LTDScheduler(4, 16, 10)).train()
    model(torch.randn(2, 8, 16))
    assert [rows.shape for rows in ltd_fx.sampled_indices(model).values()] == [(2, 4), (2, 4)]
    with pytest.raises(LTDError, match="cannot compile a transformed model"):
        torch.jit.script(model)
    with pytest.raises(LTDError, match="trace the model first"):
        Leaves().trace(model)


class Every(nn.Module):
    """The routed layers of a model, without the dense ones, which fx cannot trace."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = model.blocks[1:3]

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block.forward(hidden)
        return hidden
