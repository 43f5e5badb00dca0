"""``plan --measure``: layers timed on this machine."""

import json
import sys
from typing import Any

import pytest

from ltd_fx.cli import main
from ltd_fx.cli.measure import Measured

PLAN = ["plan", "--layers", "6", "--hidden", "8", "--seq", "16", "--steps", "100"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main([*PLAN, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_half_of_the_tokens_always(capsys: pytest.CaptureFixture[str]) -> None:
    """What is saved follows from the times: four of six layers keep 8 of 16 tokens."""
    code, out, _ = run(capsys, "--schedule", "8:16:1:100", "--kind", "step", "--measure", "--json")
    found: dict[str, Any] = json.loads(out)["measured"]
    assert code == 0
    assert found["device"] == "cpu"
    assert list(found["milliseconds"]) == ["8", "12", "16"]
    half, dense = found["milliseconds"]["8"], found["milliseconds"]["16"]
    assert min(half, dense) > 0
    assert found["time_saved"] == pytest.approx(4 / 6 * (1 - half / dense))


@pytest.mark.parametrize(("saved", "warned"), [(0.01, True), (0.6, False)])
def test_says_when_routing_cannot_pay(
    saved: float, warned: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def measure(*args: Any, **options: Any) -> Measured:
        given.append(options)
        return Measured("cuda", {8: 1.25, 16: 2.5}, saved)

    monkeypatch.setattr(sys.modules["ltd_fx.cli.plan"], "measure", measure)
    batch = "--batch", "12", "--gpus", "5", "--device", "cuda"
    _, out, _ = run(capsys, "--schedule", "8:16:1:100", "--kind", "step", "--measure", *batch)
    assert given == [{"batch": 3, "device": "cuda"}]
    assert "ms a layer, 8 tokens, cuda" in out
    assert "1.25" in out
    assert f"{saved:.1%}" in out
    assert ("layers of this size wait" in out) is warned


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--schedule", "8:16:1:100", "--measure", "--device", "nowhere")
    assert code == 2
    assert "--device nowhere" in err
