"""Token flow against random layers: none that is proven is wrong on a subset of the tokens."""

from collections import Counter

import pytest
from programs_drawn import OPERATORS, Drawn, Step, arguments, error_of, layer_of

from ltd_fx import LayerPattern
from ltd_fx.learn import Call, Sandbox
from ltd_fx.prove.token_flow import judge
from ltd_fx.prove.verdict import Verdict

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

PATTERN = LayerPattern(hidden="x", aligned={"mask": (2, 3)}, output=None)
STEPS = st.lists(
    st.builds(Step, st.sampled_from(list(OPERATORS)), st.integers(0, 3), st.integers(0, 5), st.integers(0, 2)),
    min_size=1,
    max_size=9,
)


def judged(layer: Drawn) -> Verdict:
    return judge(layer, PATTERN, Call("it", arguments(), {}, None), Sandbox(layer), shared=True)


@pytest.mark.parametrize("draws", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_layer_that_is_proven_is_wrong(draws: int) -> None:
    outcomes: Counter[tuple[str, bool]] = Counter()

    @settings(
        max_examples=draws,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(STEPS)
    def check(steps: list[Step]) -> None:
        layer = layer_of(steps)
        verdict, right = judged(layer), error_of(layer) < 1e-9
        word = "wrong" if verdict.mixes else "unknown" if verdict.unknown else "proven"
        outcomes[word, right] += 1
        assert right or word != "proven", layer.steps

    check()
    # Neither is it that all is proven, nor that nothing is.
    assert outcomes["proven", True] > draws / 10, outcomes
    assert outcomes["wrong", False] > draws / 10, outcomes


@pytest.mark.parametrize(
    "name", ["attention", "causal attention", "linear", "norm", "gelu", "flatten", "convolve points"]
)
def test_a_layer_of_what_is_right_is_right(name: str) -> None:
    """The reference itself: rows are the same with fewer tokens."""
    assert error_of(layer_of([Step(name, 0, 0, 0)] * 2)) < 1e-9


@pytest.mark.parametrize("name", ["sum", "cumulative sum", "roll", "convolve", "last", "batch norm", "rows of a table"])
def test_a_layer_of_what_is_wrong_is_wrong(name: str) -> None:
    """The reference itself: rows differ with fewer tokens."""
    assert error_of(layer_of([Step(name, 0, 0, 0)])) > 1e-3
