"""A checkpoint that DeepSpeed's own engine wrote of a model that it converted, loaded into ours."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import gpt2
from ranks import on_ranks
from test_deepspeed_config import CONFIG, attached, read
from test_deepspeed_engine import deepspeed

import ltd_fx
from ltd_fx.deepspeed import load_scheduler_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="without the package deepspeed"),
]


@on_ranks(1)
def test_weights_and_schedule_of_its_checkpoint(tmp_path: Path) -> None:
    initialize = deepspeed().initialize
    from deepspeed.runtime.data_pipeline.data_routing.helper import convert_to_random_ltd

    theirs = gpt2(6)
    config = {**CONFIG, "zero_optimization": {"stage": 0}}
    engine, *_ = initialize(
        model=theirs, optimizer=torch.optim.AdamW(theirs.parameters()), config=config, dist_init_required=False
    )
    convert_to_random_ltd(engine, type(theirs.transformer.h[0]))
    assert any(".random_ltd_layer." in name for name in theirs.state_dict())
    for step in range(11):
        engine.random_ltd_scheduler.update_seq(step)
    engine.save_checkpoint(str(tmp_path), "tag")

    checkpoint = torch.load(tmp_path / "tag" / "mp_rank_00_model_states.pt", weights_only=True)
    scheduler, options = read(CONFIG)
    ours = ltd_fx.transform(gpt2(6), scheduler, **options)
    ours.load_state_dict(ltd_fx.clean_state_dict(checkpoint["module"]))
    load_scheduler_state(scheduler, checkpoint["random_ltd"])
    clean = ltd_fx.clean_state_dict(theirs)
    assert all(torch.equal(value, clean[name]) for name, value in ours.state_dict().items())
    assert scheduler.reserved_length == attached().length_at(11)
    assert scheduler.consumed_layer_tokens == scheduler.total_layer_tokens(11)
