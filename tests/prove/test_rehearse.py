"""The model is run once with its layers routed, before it is accepted, and nothing of that run stays."""

import types
from typing import Any

import pytest
import torch
from conftest import decoder, text
from toy import STREAM, Looped, snapshot

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


def tensors(holder: Any) -> list[torch.Tensor]:
    return [value for value in vars(holder).values() if isinstance(value, torch.Tensor)]


def test_no_fake_tensor_stays_in_the_sites() -> None:
    """The layers are called several times: each call has a number of its own, made in the rehearsal too."""
    scheduler = LTDScheduler(4, 12, 100)
    model = ltd_fx.transform(Looped().train(), scheduler, example_inputs=(STREAM,))
    state = model._ltd_rewrite.state
    held = [*tensors(state), *(tensor for site in state.sites for tensor in tensors(site))]
    assert len(held) >= 3
    assert {type(tensor) for tensor in held} == {torch.Tensor}
    assert not any(site.drawn for site in state.sites)
    with pytest.raises(LTDError, match="no training forward"):
        ltd_fx.sampled_indices(model)
    fresh = ltd_fx.transform(Looped().train(), LTDScheduler(4, 12, 100))
    for each in (model, fresh):
        each(STREAM)
    assert str(ltd_fx.sampled_indices(model)) == str(ltd_fx.sampled_indices(fresh))


@pytest.mark.parametrize("lazy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_loss_over_what_is_inside_the_layers(lazy: bool) -> None:
    """Router logits have the kept tokens only; under a padding mask, transformers' loss wants them all.

    A forward that somebody put on the instance is not replaced with one that knows.
    """
    model = decoder("Mixtral", **MOE)().train()
    model.forward = types.MethodType(type(model).forward, model)
    inputs = {**text(), "output_router_logits": True, "use_cache": False}
    run = ltd_fx.transform(model) if lazy else lambda **inputs: ltd_fx.transform(model, example_inputs=inputs)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(LTDError, match=r"does not with its layers dense.*output_router_logits"):
            run(**inputs)
        assert snapshot(model) == before
    del inputs["attention_mask"]
    if not lazy:
        run(**inputs)
    model(**inputs).aux_loss.backward()
