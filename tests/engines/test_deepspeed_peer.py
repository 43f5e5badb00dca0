"""DeepSpeed's own scheduler and wrapper, from its package, beside ours."""

import types
from typing import Any

import pytest
import torch
from test_deepspeed import DIM, SEQ, Layer, hidden_of, layer_of
from test_deepspeed_config import CONFIG, attached, read

from ltd_fx import LTDScheduler
from ltd_fx.deepspeed import RandomLayerTokenDrop, load_scheduler_state

basic_layer = pytest.importorskip("deepspeed.runtime.data_pipeline.data_routing.basic_layer")
their_config = pytest.importorskip("deepspeed.runtime.data_pipeline.config")
schedulers = pytest.importorskip("deepspeed.runtime.data_pipeline.data_routing.scheduler")


def theirs() -> Any:
    config = their_config.get_data_efficiency_config(CONFIG)["data_routing"]["random_ltd"]
    return schedulers.RandomLTDScheduler({**config, "global_batch_size": CONFIG["train_batch_size"]})


def test_its_scheduler_read_from_the_same_configuration() -> None:
    """Lengths and layer tokens of every step, and its state loaded into ours at each."""
    their, our = theirs(), attached()
    resumed = attached()
    for step in range(40):
        their.update_seq(step)
        their.update_seq(step)  # a second micro-batch
        assert our.reserved_length == their.get_current_seq()
        our.step()
        state = their.state_dict()
        assert our.consumed_layer_tokens == state["consumed_layer_tokens"]
        load_scheduler_state(resumed, state)
        assert resumed.reserved_length == our.reserved_length
        assert resumed.consumed_layer_tokens == our.consumed_layer_tokens
    assert our.reserved_length == read(CONFIG)[0].max_length


def test_its_wrapper_with_the_same_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients, torch in place of its CUDA kernels, the indices those that ours drew."""
    keep, mask = 4, torch.ones(SEQ, SEQ, dtype=torch.bool).tril()[None, None]
    config = {"hidden_state_order": "batch_seq_dim", "model_type": "decoder", "model_mask_name": "ltd_mask"}
    scheduler = LTDScheduler(keep, SEQ, 10, kind="constant")
    ours = RandomLayerTokenDrop(layer_of())
    ours.init_config(config, scheduler, 0)
    hidden = hidden_of()
    out = ours(hidden, ltd_mask=mask)
    rows = (out != hidden).any(-1).nonzero()[:, 1].view(1, len(hidden), keep)

    utils = basic_layer.GatherTokens.forward.__globals__
    index = lambda indices: indices.long()[..., None].expand(-1, -1, DIM)  # noqa: E731
    kernels = types.SimpleNamespace(
        token_gather=lambda hidden, indices, batch_first: hidden.gather(1, index(indices)),
        token_scatter_=lambda hidden, kept, indices, batch_first: hidden.scatter_(1, index(indices), kept),
    )
    monkeypatch.setitem(utils, "random_ltd_module", kernels)
    wrapper = basic_layer.RandomLayerTokenDrop(layer_of())
    assert isinstance(wrapper.random_ltd_layer, Layer)
    state = {"max_value": SEQ, "current_value": keep}
    their_scheduler = types.SimpleNamespace(state=state, random_ltd_layer_num=1, get_current_seq=lambda: keep)
    wrapper.init_config({**config, "micro_batch_size": len(hidden)}, their_scheduler, 0)
    wrapper.index_generator = lambda *args: (rows, mask[:, :, :keep, :keep])
    expected = wrapper(hidden, ltd_mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    each = [
        torch.autograd.grad(value.cos().sum(), (hidden, *module.parameters()))
        for value, module in ((out, ours), (expected, wrapper))
    ]
    torch.testing.assert_close(*each, rtol=1e-11, atol=1e-11)
