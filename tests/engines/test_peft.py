"""LoRA through PEFT, put on before and after the rewrite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SEQ, decoder, text
from torch import nn

import ltd_fx
from ltd_fx import LTDScheduler

peft = pytest.importorskip("peft")


def plain() -> nn.Module:
    torch.manual_seed(0)
    return decoder("Llama")().train()


def with_lora(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))


def lora_last(scheduler: LTDScheduler) -> Any:
    return with_lora(ltd_fx.transform(plain(), scheduler))


def lora_first(scheduler: LTDScheduler) -> Any:
    return ltd_fx.transform(with_lora(plain()), scheduler)


@pytest.mark.compat("peft")
@pytest.mark.parametrize("build", [lora_last, lora_first])
def test_adapters_of_routed_layers(build: Any, tmp_path: Path) -> None:
    """They are trained on the kept tokens, proven right, and load into a model that was never transformed."""
    scheduler = LTDScheduler(8, SEQ, 12)
    model, inputs = build(scheduler).train(), text()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    drawn = []
    for length in (8, 12):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        kept = ltd_fx.sampled_indices(model)
        assert [indices.shape[1] for indices in kept.values()] == [length, length]
        drawn += [indices.tolist() for indices in kept.values()]
        adam.step()
        adam.zero_grad()
        scheduler.step()
    assert len({str(indices) for indices in drawn}) == 4
    assert ltd_fx.verify(model, inputs).ok
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert not torch.equal(loaded(**inputs).logits, plain().eval()(**inputs).logits)
    merged = ltd_fx.restore(model).merge_and_unload()
    assert {type(layer).__name__ for layer in merged.model.layers} == {"LlamaDecoderLayer"}
    torch.testing.assert_close(merged.eval()(**inputs).logits, loaded(**inputs).logits)
