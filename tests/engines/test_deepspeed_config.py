"""DeepSpeed's configuration and its scheduler's state."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from conftest import SEQ, decoder, text

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.deepspeed import from_config, load_scheduler_state

LAYERS = [1, 3, 4]
CONFIG: dict[str, Any] = {
    "train_batch_size": 16,
    "zero_optimization": {"stage": 1},
    "data_efficiency": {
        "enabled": True,
        "seed": 42,
        "data_routing": {
            "enabled": True,
            "random_ltd": {
                "enabled": True,
                "total_layer_num": 6,
                "random_ltd_layer_num": 3,
                "random_ltd_layer_id": LAYERS,
                "model_mask_name": "attention_mask",
                "model_type": "decoder",
                "hidden_state_order": "batch_seq_dim",
                "random_ltd_schedule": {
                    "min_value": 18,
                    "max_value": SEQ,
                    "schedule_type": "fixed_linear",
                    "schedule_config": {"require_steps": 23, "seq_per_step": 6},
                },
            },
        },
    },
}
ROUTING = ("data_efficiency", "data_routing", "random_ltd")
_REMOVE = "(removed)"


def config_with(*path: str, value: Any = _REMOVE) -> dict[str, Any]:
    """A copy of ``CONFIG`` with another value at ``path``."""
    config = copy.deepcopy(CONFIG)
    section = config
    for key in path[:-1]:
        section = section[key]
    if value is _REMOVE:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    return config


def read(config: Any) -> tuple[LTDScheduler, dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return from_config(config)


@pytest.mark.parametrize("as_file", [False, True])
def test_every_key_is_honoured_or_named(as_file: bool, tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(CONFIG))
    before = copy.deepcopy(CONFIG)
    with pytest.warns(UserWarning, match="ignored") as caught:
        scheduler, options = from_config(path if as_file else CONFIG)
    (warning,) = caught
    named = str(warning.message).split(": ")[-1].split(", ")
    prefix = "data_efficiency.data_routing.random_ltd."
    assert named == [prefix + key for key in ("model_mask_name", "model_type", "hidden_state_order")]
    assert scheduler.state_dict()["config"] == {
        "kind": "linear",
        "min_length": 18,
        "max_length": SEQ,
        "total_steps": 23,
        "multiple_of": 6,
        "degree": 2,
        "global_batch_size": 16,
        "relative": False,
    }
    assert options["seed"] == 42
    assert before == CONFIG

    model = ltd_fx.transform(decoder("Llama", num_hidden_layers=6)(), scheduler, **options)
    assert [site.routed for site in ltd_fx.summary(model).sites] == [i in LAYERS for i in range(6)]
    model.train()(**text())
    assert {name: kept.shape[1] for name, kept in ltd_fx.sampled_indices(model).items()} == {
        f"model.layers.{i}": 18 for i in LAYERS
    }
    scheduler.step()
    assert scheduler.consumed_layer_tokens == 16 * (3 * 18 + 3 * SEQ)


@pytest.mark.parametrize("batch", ["auto", _REMOVE])
def test_without_a_batch_size(batch: Any) -> None:
    assert read(config_with("train_batch_size", value=batch))[0].global_batch_size is None


def test_layers_that_the_model_lacks() -> None:
    scheduler, options = read(CONFIG)
    model = decoder("Llama", num_hidden_layers=4)()
    with pytest.raises(LTDError, match=r"route \(4, 4, None\) does not fit model.layers, which has 4 layers"):
        ltd_fx.transform(model, scheduler, **options)
    assert not ltd_fx.is_transformed(model)


SCHEDULE = (*ROUTING, "random_ltd_schedule")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data_efficiency",), _REMOVE, "data_efficiency is missing"),
        (("data_efficiency",), [], "data_efficiency must be of type dict"),
        (("data_efficiency", "enabled"), False, "data_efficiency.enabled is not true"),
        (("data_efficiency", "seed"), "1", "data_efficiency.seed must be of type int, got '1'"),
        (("data_efficiency", "data_routing", "enabled"), _REMOVE, "data_routing.enabled is not true"),
        ((*ROUTING, "enabled"), 1, "random_ltd.enabled must be of type bool, got 1"),
        ((*ROUTING, "max_tokens"), 3, "unknown key data_efficiency.data_routing.random_ltd.max_tokens"),
        ((*ROUTING, "total_layer_num"), _REMOVE, "total_layer_num is missing"),
        ((*ROUTING, "total_layer_num"), 4, "random_ltd_layer_id has 4, but the 4 layers are 0 to 3"),
        ((*ROUTING, "random_ltd_layer_num"), 2, "random_ltd_layer_num=2 different numbers"),
        ((*ROUTING, "random_ltd_layer_id"), [1, 1, 3], "random_ltd_layer_num=3 different numbers"),
        ((*ROUTING, "random_ltd_layer_id"), [1, 2, -1], "random_ltd_layer_id has -1"),
        ((*ROUTING, "random_ltd_layer_id"), [1, 2, "3"], "random_ltd_layer_id has '3'"),
        ((*ROUTING, "random_ltd_layer_id"), 3, "random_ltd_layer_id must be of type list"),
        ((*ROUTING, "layer_token_lr_schedule"), {"enabled": True}, r"ltd_fx\.LayerTokenLR\(optimizer, scheduler"),
        ((*ROUTING, "layer_token_lr_schedule"), {"enable": True}, "unknown key .*layer_token_lr_schedule.enable;"),
        ((*SCHEDULE, "schedule_type"), "fixed_root", "unknown .*schedule_type 'fixed_root'; it must be 'fixed_linear'"),
        ((*SCHEDULE, "min_value"), 16.0, "min_value must be of type int, got 16.0"),
        ((*SCHEDULE, "min_value"), 65, "min_length=65 is above max_length=64"),
        ((*SCHEDULE, "step"), 16, "unknown key .*random_ltd_schedule.step;"),
        ((*SCHEDULE, "schedule_config", "require_steps"), True, "require_steps must be of type int, got True"),
        ((*SCHEDULE, "schedule_config", "root_degree"), 2, "unknown key .*schedule_config.root_degree;"),
        (("train_batch_size",), "16", "train_batch_size must be a number, got '16'"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(LTDError, match=message):
        read(config_with(*path, value=value))


def test_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('{"data_efficiency": {')
    for name in ("cut.json", "missing.json"):
        with pytest.raises(LTDError, match=f"{name} cannot be read as JSON"):
            from_config(tmp_path / name)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(LTDError, match="the configuration must be an object"):
        from_config(tmp_path / "list.json")


# ---- the scheduler's state


def attached() -> LTDScheduler:
    scheduler, options = read(CONFIG)
    ltd_fx.transform(decoder("Llama", num_hidden_layers=6)(), scheduler, **options)
    return scheduler


# After the forward of step 10: 18 + floor(10 / 23 * 46) = 38 tokens, rounded down to 36.
STATE = {"consumed_layer_tokens": 47616, "current_steps": 10, "current_value": 36, "min_value": 18, "max_value": SEQ}


def test_state() -> None:
    """Lengths of steps 0 to 10: 18, 18, 18, 24, 24, 24, 30, 30, 30, 36, 36 (of 20, 22, 24, ... 38)."""
    scheduler = attached()
    lengths = [scheduler.length_at(step) for step in range(11)]
    assert lengths == [18, 18, 18, 24, 24, 24, 30, 30, 30, 36, 36]
    assert 16 * (3 * sum(lengths) + 3 * 11 * SEQ) == STATE["consumed_layer_tokens"]
    load_scheduler_state(scheduler, STATE)
    assert scheduler.reserved_length == 36
    assert scheduler.consumed_layer_tokens == STATE["consumed_layer_tokens"]
    load_scheduler_state(scheduler, {**STATE, "current_steps": -1, "current_value": 18, "consumed_layer_tokens": 0})
    assert scheduler.consumed_layer_tokens == 0
    alone, _ = read(CONFIG)  # without a model there is nothing to compare the layer tokens with
    load_scheduler_state(alone, {**STATE, "consumed_layer_tokens": 1})
    assert alone.reserved_length == 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"current_value": 42}, "current_value=42 after step 10, this scheduler 36"),
        ({"max_value": 512}, "max_value=512 after step 10, this scheduler 64"),
        ({"min_value": 16}, "min_value=16"),
        ({"consumed_layer_tokens": 1}, r"consumed_layer_tokens=1 .* or call scheduler.set_step\(11\)"),
        ({"current_steps": -2}, "current_steps must be -1 or more"),
        ({"current_steps": "10"}, "current_steps must be of type int"),
        ({"current_steps": _REMOVE}, "current_steps is missing"),
        ({"more": 1}, "unknown key random_ltd.more"),
    ],
    ids=str,
)
def test_states_that_are_refused(change: dict[str, Any], message: str) -> None:
    scheduler = attached()
    before = scheduler.state_dict()
    state = {key: value for key, value in {**STATE, **change}.items() if value is not _REMOVE}
    with pytest.raises(LTDError, match=message):
        load_scheduler_state(scheduler, state)
    assert scheduler.state_dict() == before
