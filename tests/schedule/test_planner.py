"""The planner against published runs, and operations counted by torch; and its command."""

import json
import re
from typing import Any

import pytest
import torch
from conftest import decoder
from torch.utils.flop_counter import FlopCounterMode

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.cli import main
from ltd_fx.schedule.planner import DEVICES, Model, make_plan

# random-LTD's and DeepSpeed's published runs: layers, width, schedule, steps, share of layer tokens saved
PUBLISHED = {
    "GPT-3 1.3B": (24, 2048, (128, 2048, 16, 200_000), 286_102, 0.303),
    "BERT-large": (24, 1024, (128, 512, 16, 20_000), 20_000, 0.358),
    "ViT": (12, 768, (32, 197, 8, 3910), 5474, 0.262),
}


def schedule(minimum: int, maximum: int, multiple: int, steps: int) -> LTDScheduler:
    return LTDScheduler(minimum, maximum, steps, multiple_of=multiple)


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_tokens_are_the_published_ones(name: str) -> None:
    layers, width, lengths, steps, saved = PUBLISHED[name]
    plan = make_plan(Model(layers, width, lengths[1]), schedule(*lengths), steps)
    assert plan.layer_tokens_saved == pytest.approx(saved, abs=5e-4)


def test_layer_tokens_are_the_schedulers() -> None:
    scheduler = schedule(8, 64, 4, 30)
    model = ltd_fx.transform(decoder("Llama")(), scheduler)
    plan = make_plan(Model(4, 32, 64), scheduler, 50)
    assert ltd_fx.is_transformed(model)
    assert plan.layer_tokens_saved == pytest.approx(1 - scheduler.total_layer_tokens(50) / (50 * 4 * 64))


def test_operations_are_those_that_torch_counts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 64, "n_layer": 4, "n_head": 2, "vocab_size": 100, "n_positions": 128}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2))
    scheduler = LTDScheduler(32, 128, 1, kind="constant")
    counts = []
    for routed in (False, True):
        if routed:
            ltd_fx.transform(model, scheduler)
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model.train()(torch.zeros(3, 128, dtype=torch.long)).logits.sum().backward()
        counts.append(counter.get_total_flops())
    # torch counts all scores of a causal layer
    plan = make_plan(Model(4, 64, 128, 100, causal=False), scheduler, 7, batch=3)
    assert plan.dense_flops == pytest.approx(7 * counts[0], rel=1e-9)
    assert plan.flops_saved == pytest.approx(1 - counts[1] / counts[0], rel=1e-9)


def test_time_counts_routing() -> None:
    scheduler = schedule(128, 2048, 16, 200)
    large, small = (make_plan(Model(24, d, 2048), scheduler, 300, batch=64, device=DEVICES["h100"]) for d in (4096, 64))
    assert large.flops_saved * 0.95 < large.time_saved < large.flops_saved
    assert not large.warnings
    assert any("too small" in warning for warning in small.warnings)
    assert large.routing_seconds is not None
    assert large.dense_seconds is not None
    sixteen = make_plan(Model(24, 4096, 2048), scheduler, 300, batch=64, device=DEVICES["h100"], devices=16)
    assert sixteen.dense_seconds == pytest.approx(large.dense_seconds / 16)


@pytest.mark.parametrize(
    ("steps", "lengths", "dense", "warning"),
    [
        (100, (128, 2048, 16, 200), 2, "ends before"),
        (300, (2000, 2048, 16, 100), 2, "under 5%"),
        (300, (128, 2048, 16, 200), 14, "half"),
    ],
)
def test_warnings(steps: int, lengths: Any, dense: int, warning: str) -> None:
    plan = make_plan(Model(24, 1024, 2048, dense_layers=dense), schedule(*lengths), steps)
    assert any(warning in text for text in plan.warnings)


@pytest.mark.parametrize("least", [1, 5, 40])
def test_cuda_graphs_are_counted(least: int) -> None:
    """As many as there are lengths when the schedule itself has the coarser multiple."""
    plan = make_plan(Model(4, 8, 96), LTDScheduler(least, 96, 200, multiple_of=2), 300)
    assert next(iter(plan.lengths)) == 2
    for multiple, count in plan.lengths.items():
        coarse = LTDScheduler(least, 96, 200, multiple_of=multiple)
        assert count == len({coarse.length_at(step) for step in range(300)} - {96})
    assert all(count > 16 for count in list(plan.lengths.values())[:-1])


SIZES = {"--layers": 24, "--hidden": 2048, "--seq": 2048, "--schedule": "128:2048:16:200000", "--steps": 286_102}
COMMAND = ["plan", *(str(word) for pair in SIZES.items() for word in pair)]


def test_command(capsys: Any) -> None:
    assert main([*COMMAND, "--gpu", "h100", "--gpus", "64", "--batch", "512"]) == 0
    text = capsys.readouterr().out
    assert "30.3%" in text
    assert "hours, routed" in text
    assert re.search(r"^CUDA graphs, multiple_of 128 +15$", text, re.MULTILINE)
    assert main([*COMMAND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layer_tokens_saved"] == pytest.approx(0.303, abs=5e-4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--schedule", "1:2:3"], "MIN:MAX:MULTIPLE:STEPS"),
        (["--seq", "1024"], "ends at 2048 tokens"),
        (["--dense-layers", "24"], "leave none of 24"),
        (["--utilisation", "2"], "utilisation in"),
        (["--kind", "square"], "unknown kind"),
    ],
)
def test_bad_arguments_exit_with_2(extra: list[str], message: str, capsys: Any) -> None:
    assert main([*COMMAND, *extra]) == 2
    assert message in capsys.readouterr().err


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(LTDError, match="hidden must be positive"):
        Model(24, 0, 2048)
