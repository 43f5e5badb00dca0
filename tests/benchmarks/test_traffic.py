"""What routing moves: elements a layer and direction beyond the ideal's, in units of B * k * D, and kernels.

pytest tests/benchmarks/test_traffic.py --benchmark-only -s
"""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import traffic
from models import Setting, stepper
from peers import PEERS, peers_for
from results import results

SETTINGS = [Setting("llama", width=256, tokens=256), Setting("bert", width=256, tokens=256, padded=True)]


@cache
def per_layer(setting: Setting, name: str, how: str) -> tuple[list[float], list[float]]:
    """(elements, kernels) of one layer, forward and backward: what one between the first and the last adds."""
    found = []
    for depth in (2, 3):
        deep = replace(setting, depth=depth)
        model = deep.build()
        PEERS[name](model, deep)
        if how == "compiled":
            found.append(traffic.compiled(stepper(torch.compile(model), deep.inputs())))
        else:
            step = stepper(model, deep.inputs())
            step()
            found.append(traffic.eager(step))
    few, more = found
    return [b - a for a, b in zip(few.elements, more.elements, strict=True)], [
        b - a for a, b in zip(few.kernels, more.kernels, strict=True)
    ]


def beyond_ideal(setting: Setting, name: str, how: str) -> tuple[list[float], list[float]]:
    unit = setting.batch * setting.keep * setting.width
    (base, base_kernels), (elements, kernels) = per_layer(setting, "ideal", how), per_layer(setting, name, how)
    return [(a - b) / unit for a, b in zip(elements, base, strict=True)], [
        a - b for a, b in zip(kernels, base_kernels, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_at_most_four(setting: Setting) -> None:
    """Compiled: gather and scatter, tables and masks."""
    assert max(beyond_ideal(setting, "routed", "compiled")[0]) <= 4


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_traffic(benchmark: Any, setting: Setting, how: str) -> None:
    print(f"\n{setting}, {how}: beyond the ideal, a layer; elements in B*k*D, then kernels")
    for name in (*peers_for(setting), "shared"):
        if name in ("ideal", "dense"):
            continue
        beyond, more = beyond_ideal(setting, name, how)
        row = {"setting": str(setting), "how": how, "variant": name, "elements": beyond, "kernels": more}
        results().add("traffic", row)
        print(f"{name:>12}: {beyond[0]:+.2f} forward, {beyond[1]:+.2f} backward; {more[0]:+}, {more[1]:+} kernels")
    benchmark.pedantic(lambda: None, rounds=1)
