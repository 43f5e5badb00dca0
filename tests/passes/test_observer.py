"""``LTD_FX_PASSES``: the passes timed, dumped and switched off."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, loss_of
from toy import Encoder

import ltd_fx
from ltd_fx import LTDError
from ltd_fx.passes import routed_layer

PASSES = ["locate", "align", "route", "check", "span"]


@pytest.fixture(autouse=True)
def no_classes_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_layer, "_classes", {})


def transformed(last: int = 3) -> Any:
    torch.manual_seed(0)
    return ltd_fx.transform(Encoder(5).train(), routes=[(1, last, None)], example_inputs=(torch.zeros(2, 12, 16),))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    loss_of(model(torch.linspace(-1, 1, 384).view(2, 12, 16))).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_each_pass_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    transformed()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(routed_layer, "_classes", {})
    monkeypatch.setenv("LTD_FX_PASSES", "time")
    transformed()
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if line.startswith("ltd_fx:")]
    assert [line[1] for line in lines[:5]] == PASSES
    assert {line[-1] for line in lines} == {"ms"}
    assert len(lines) % 5 == 0


def test_the_graph_is_dumped_before_and_after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LTD_FX_PASSES", f"dump={tmp_path / 'graphs'}")
    transformed()
    files = sorted((tmp_path / "graphs").iterdir())
    first = [file for file in files if file.name.split("-")[0] == files[0].name.split("-")[0]]
    assert [file.stem.split("-", 1)[1] for file in first] == [f"{i}-{n}" for i, n in enumerate(["before", *PASSES])]
    has_merge = ["merge_output" in file.read_text() for file in first]
    assert has_merge == [False, False, False, True, True, True]


def test_without_span_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformed()
    assert "take_over" in str(ltd_fx.summary(model).sites[2].graph)
    expected = gradients(model)
    monkeypatch.setenv("LTD_FX_PASSES", "-span, -check")
    model = transformed()
    assert "take_over" not in str(ltd_fx.summary(model).sites[2].graph)
    assert_same([gradients(model)], [expected])


def test_no_route_is_rewritten_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    transformed(last=2)  # Its layers have the classes of a longer route's ends.
    monkeypatch.setenv("LTD_FX_PASSES", "-span")
    model = transformed()
    assert not any("over" in str(site.graph) for site in ltd_fx.summary(model).sites if site.routed)
    gradients(model)


def test_a_rewrite_without_check_checks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []

    def check(graph: Any, **_: Any) -> int:
        checked.append(graph)
        return 0

    monkeypatch.setattr(import_module("ltd_fx.passes.rewrite"), "check", check)
    transformed()
    assert checked
    checked.clear()
    monkeypatch.setenv("LTD_FX_PASSES", "-check")
    transformed()
    assert not checked


@pytest.mark.parametrize("words", ["-align", "-route", "tune", "dump=", "span"])
def test_an_unknown_word_is_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTD_FX_PASSES", f"time,{words}")
    model = Encoder(5)
    with pytest.raises(LTDError, match=f"has the word '{words}'; it knows time, dump=FOLDER, -check, -span"):
        ltd_fx.transform(model)
    assert not ltd_fx.is_transformed(model)
