"""Every family that is known without examples: in a program as a user writes it, each with and without them."""

from typing import Any

import pytest
import torch
from conftest import BATCH, CASES, DECODERS, SEQ, Case, loss_of, text
from torch import nn

import ltd_fx
from ltd_fx import LTDScheduler
from ltd_fx.learn.patterns import _BUILT_IN


def mpt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": SEQ, "vocab_size": 64}
    return transformers.MptForCausalLM(transformers.MptConfig(**sizes))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def stream() -> dict[str, Any]:
    padding = torch.zeros(BATCH, SEQ).masked_fill(text()["attention_mask"] == 0, -torch.inf)
    src = torch.randn(BATCH, SEQ, 32, generator=torch.Generator().manual_seed(1))
    return {"src": src, "src_key_padding_mask": padding}


FAMILIES = {
    **CASES,
    **DECODERS,
    "mpt": Case(mpt, text, "transformer.blocks", SEQ),
    "encoder": Case(encoder, stream, "layers", SEQ),
}
PACKAGES = {"timm_vit": "timm", "encoder": "torch"}
NAMES = [pytest.param(name, marks=pytest.mark.compat(PACKAGES.get(name, "transformers"))) for name in FAMILIES]


@pytest.mark.parametrize(
    "given", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["example inputs", "first forward"]
)
@pytest.mark.parametrize("name", NAMES)
def test_trains_two_steps_and_evaluates_as_the_plain_model(name: str, given: bool) -> None:
    case = FAMILIES[name]
    plain, model, inputs = case.model(), case.model(), case.inputs()
    scheduler = LTDScheduler(8, case.seq_len, 4)
    how = "shared" if name == "mpt" else "per_sample"  # its position bias is one for all sequences
    ltd_fx.transform(model, scheduler, sampling=how, example_inputs=inputs if given else None)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        loss_of(model(**inputs)).backward()
        adam.step()
        adam.zero_grad()
        lengths = [kept.shape[1] for kept in ltd_fx.sampled_indices(model).values()]
        assert lengths == [scheduler.reserved_length] * 2
        scheduler.step()
    assert [site.routed for site in ltd_fx.summary(model).sites] == [False, True, True, False]
    assert not any(torch.equal(p, before) for p, before in zip(model.parameters(), plain.parameters(), strict=True))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(loss_of(model.eval()(**inputs)), loss_of(plain.eval()(**inputs)))


def test_no_built_in_pattern_is_left_out() -> None:
    classes = [type(module) for case in FAMILIES.values() for module in case.model().modules()]
    assert {(c.__module__, c.__qualname__) for c in classes} >= set(_BUILT_IN)
