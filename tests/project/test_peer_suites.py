"""What `make peers` makes of other libraries' tests, and where it transforms their models."""

from typing import Any

import pytest
from peer_suites.by_design import BY_DESIGN, Design
from peer_suites.construction import Outermost
from peer_suites.suites import Suite
from peer_suites.verdict import Verdict, page
from torch import nn

SUITE = Suite("a", "torch", "tests/test_a.py", "")


def run(**outcomes: str) -> dict[str, Any]:
    tests = {f"test_a.py::{name}": {"outcome": outcome, "why": f"{name}!"} for name, outcome in outcomes.items()}
    return {"tests": tests, "models": {"transformed": 2}, "untouched": {}}


@pytest.mark.parametrize("outcome", ["failed", "skipped", "absent"])
def test_what_passes_without_and_not_with_is_a_fault(outcome: str) -> None:
    without = run(good="passed", bad="passed", broken="failed", off="skipped")
    others = run(good="passed", bad=outcome, broken="failed", off="skipped")
    if outcome == "absent":
        del others["tests"]["test_a.py::bad"]
    verdict = Verdict(SUITE, "half", without, others)
    assert list(verdict.faults) == ["test_a.py::bad"]
    assert not verdict.refused
    assert "FAILS test_a.py::bad" in verdict.summary()


def test_refusals_and_what_differs_by_design_are_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "peer_suites.verdict.BY_DESIGN", [*BY_DESIGN, Design("torch", "half", "::drops$", "it counts tokens")]
    )
    without, others = run(drops="passed", no="passed"), run(drops="failed", no="refused")
    half, full = (Verdict(SUITE, mode, without, others) for mode in ("half", "full"))
    assert half.refused == {"test_a.py::no": "no!"}
    assert half.by_design == {"test_a.py::drops": "it counts tokens"}
    assert not half.faults
    assert list(full.faults) == ["test_a.py::drops"]  # at full length nothing may differ
    text = page([full, half])
    assert "a: `drops`: it counts tokens" in text
    assert "a: `no`: no!" in text


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()


class Outer(Inner):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.inner = Inner()
        if fails:
            raise ValueError


def test_only_the_outermost_model_is_transformed_when_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    outermost = Outermost(lambda model: built.append((model, hasattr(model, "inner"))))
    for cls in (Inner, Outer):
        monkeypatch.setattr(cls, "__init__", cls.__init__)  # to be restored
        outermost.constructor(cls)
    with pytest.raises(ValueError):  # noqa: PT011
        Outer(fails=True)
    assert not built
    outer = Outer()
    inner = Inner()
    made, _ = outermost.function(lambda: (Outer(), "information"))()
    assert built == [(outer, True), (inner, False), (made, True)]
