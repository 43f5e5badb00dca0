"""Built-in patterns are hints: on a release of transformers that has changed a layer, they give way to inference."""

import importlib
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import CASES, SEQ, decoder, text
from torch import nn
from toy import PATTERN, Block, Net

import ltd_fx
from ltd_fx import LayerPattern, LTDError, LTDScheduler
from ltd_fx.learn.patterns import align_attention_mask, find_pattern_maybe

transformers = pytest.importorskip("transformers")
LLAMA = "transformers.models.llama.modeling_llama"
NEW_NAME = {r"\bposition_embeddings\b": "rotary"}
NEW_TENSOR = {
    r"(class LlamaDecoderLayer.*?def forward\(\s*self,\s*hidden_states: torch\.Tensor,)": r"\1 gains=None,",
    r"(hidden_states = self\.input_layernorm\(hidden_states\))": r"\1 * gains",
    r"(decoder_layer\(\s*hidden_states,)": r"\1 gains=position_ids[..., None] / 7 + 1,",
}


def release(changes: dict[str, str]) -> ModuleType:
    """Llama's module as another release would have it: the installed one's source, with expressions replaced."""
    installed = importlib.import_module(LLAMA)
    source = Path(str(installed.__file__)).read_text()
    for old, new in changes.items():
        source, number = re.subn(old, new, source, flags=re.DOTALL)
        assert number, old
    other = ModuleType(LLAMA)  # its classes have the names of the installed ones
    other.__dict__.update(__file__=installed.__file__, __package__=installed.__package__)
    exec(compile(source, str(installed.__file__), "exec"), other.__dict__)
    return other


def build(module: ModuleType) -> nn.Module:
    config = decoder("Llama")().config
    torch.manual_seed(0)
    model: nn.Module = module.LlamaForCausalLM(config)
    return model.train()


def train(model: nn.Module, **options: Any) -> list[torch.Tensor]:
    """The logits of two steps, and those of an evaluation after them."""
    scheduler = LTDScheduler(8, SEQ, 4)
    ltd_fx.transform(model, scheduler, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = []
    for _ in range(2):
        output = model(**text(), labels=text()["input_ids"], use_cache=False)
        output.loss.backward()
        assert {kept.shape[1] for kept in ltd_fx.sampled_indices(model).values()} == {scheduler.reserved_length}
        sgd.step()
        sgd.zero_grad()
        scheduler.step()
        logits.append(output.logits.detach())
    return [*logits, model.eval()(**text()).logits.detach()]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "ltd_fx.learn.patterns"]


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False], ids=["example inputs", "first forward"])
def test_a_renamed_argument_is_learnt(given: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Two models of one class train as the installed release does with its pattern; the log has one line."""
    options = {"example_inputs": text()} if given else {}
    expected = train(CASES["llama"].model(), **options)
    assert not lines(caplog)
    other = release(NEW_NAME)
    for _ in range(2):
        for ours, theirs in zip(train(build(other), **options), expected, strict=True):
            assert torch.equal(ours, theirs)
    (line,) = lines(caplog)
    assert "LlamaDecoderLayer has a new argument 'rotary'" in line


@pytest.mark.parametrize(
    "given", [pytest.param(True, marks=pytest.mark.slow), False], ids=["example inputs", "first forward"]
)
def test_an_added_argument_is_learnt(given: bool, caplog: pytest.LogCaptureFixture) -> None:
    options = {"example_inputs": text()} if given else {}
    learnt = train(build(release(NEW_TENSOR)), **options)
    (line,) = lines(caplog)
    assert "LlamaDecoderLayer has a new argument 'gains'" in line
    other = release(NEW_TENSOR)
    ltd_fx.register_pattern(other.LlamaDecoderLayer, with_gains(1))
    for ours, theirs in zip(learnt, train(build(other)), strict=True):
        assert torch.equal(ours, theirs)
    assert lines(caplog) == [line]


def with_gains(dimension: int) -> LayerPattern:
    tables = {"position_ids": (1,), "position_embeddings": (1,), "gains": (dimension,)}
    return LayerPattern(aligned={"attention_mask": align_attention_mask, **tables, "cache_position": (0,)})


@pytest.mark.compat("transformers")
@pytest.mark.parametrize("renamed", [False, True], ids=["installed", "renamed"])
def test_the_cache_is_known_under_both_names(renamed: bool, caplog: pytest.LogCaptureFixture) -> None:
    installed = release({})
    now, then = "cache", "past_key_values"
    if now not in inspect.signature(installed.LlamaDecoderLayer.forward).parameters:
        now, then = then, now
    layer = r"(class LlamaDecoderLayer[^@]*?)(?:@deprecate_kwarg[^\n]*\n\s*)?(def forward.*?)"
    changes = {
        rf"{layer}\b{now}(: Cache.*?=){now}\b": rf"\1\2{then}\3{then}",
        rf"(decoder_layer\(.*?\b){now}=": rf"\1{then}=",
    }
    model = build(release(changes)) if renamed else build(installed)
    pattern = find_pattern_maybe(model.model.layers[1])
    assert pattern is not None
    assert pattern.cache == (then if renamed else now)
    assert not lines(caplog)
    prompt = {"input_ids": text()["input_ids"][:2, :12], "max_new_tokens": 4, "do_sample": False}
    expected = model.eval().generate(**prompt)
    ltd_fx.transform(model)
    assert torch.equal(model.generate(**prompt), expected)
    with pytest.raises(LTDError, match="key-value cache"):
        model.train().generate(**prompt)


def test_a_pattern_that_the_user_registered_raises() -> None:
    other = release(NEW_NAME)
    with pytest.raises(LTDError, match=r"has aligned argument 'gains', but its forward takes .*rotary"):
        ltd_fx.register_pattern(other.LlamaDecoderLayer, LayerPattern(aligned={"gains": align_attention_mask}))
    ltd_fx.register_pattern(other.LlamaDecoderLayer, lambda layer: LayerPattern(hidden="stream"))
    model = build(other)
    with pytest.raises(LTDError, match=r"has hidden argument 'stream'.*register_pattern\(LlamaDecoderLayer"):
        ltd_fx.transform(model, example_inputs=text())
    assert not ltd_fx.is_transformed(model)


class Inheriting(Block):
    """What a user adds without touching ``forward``."""


class Overriding(Block):
    """Has the arguments of its base, and another meaning of them."""

    def forward(self, stream: Any, scale: Any = None, *, shift: float = 0.0) -> Any:
        return super().forward(stream, None if scale is None else scale.cumsum(1), shift=shift)


def of_llama(module: ModuleType, overrides: bool) -> Callable[[], nn.Module]:
    base = module.LlamaDecoderLayer
    body = {"forward": lambda self, *args, **kwargs: base.forward(self, *args, **kwargs)} if overrides else {}
    subclass = type("Mine", (base,), body)
    return lambda: subclass(decoder("Llama")().config, 0)


def test_a_subclass_with_a_forward_of_its_own_inherits_no_pattern() -> None:
    ltd_fx.register_pattern(Block, PATTERN)
    assert find_pattern_maybe(Inheriting()) == PATTERN
    assert find_pattern_maybe(Overriding()) is None
    llama = release({})
    built_in = find_pattern_maybe(of_llama(llama, overrides=False)())
    assert built_in is not None
    assert built_in == find_pattern_maybe(build(llama).model.layers[0])
    assert find_pattern_maybe(of_llama(llama, overrides=True)()) is None


def test_an_overriding_subclass_is_learnt_or_refused_not_guessed() -> None:
    """``scale.cumsum`` over the kept tokens is not that over all tokens, so nothing can be right here."""
    ltd_fx.register_pattern(Block, PATTERN)
    net = Net()
    net.blocks = nn.ModuleList(Overriding() for _ in range(4))
    with pytest.raises(LTDError, match=r"blocks\.1 \(Overriding\) cannot be routed"):
        ltd_fx.transform(net, example_inputs=(torch.randn(3, 6, 8), torch.rand(3, 6)))


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ltd_fx.learn.patterns")
