"""Time of a training step: dense, ideal, routed, and what a user would have instead, eager and compiled.

pytest tests/benchmarks/test_speed.py --benchmark-only -s
"""

from typing import Any

import pytest
import torch
from models import Setting, stepper
from peers import PEERS, peers_for
from results import results
from rounds import efficiency, interleave, rounds_wanted

# one thing changed at a time from the first
SETTINGS = [
    Setting(),
    Setting(share=4),
    Setting(share=8),
    Setting(width=256),
    Setting(width=768),
    Setting(tokens=512),
    Setting(tokens=2048, batch=1),
    Setting(padded=True),
    Setting(width=768, padded=True),
    Setting("bert"),
    Setting("bert", padded=True),
    Setting("bert", width=768, padded=True),
    Setting("vit"),
    Setting("vit", width=768),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_speed(benchmark: Any, setting: Setting, compiled: bool) -> None:
    torch._dynamo.reset()
    steps = {}
    for name in peers_for(setting):
        model = setting.build()
        PEERS[name](model, setting)
        steps[name] = stepper(torch.compile(model) if compiled else model, setting.inputs())
        steps[name]()
    times = interleave(steps, rounds_wanted(20))
    benchmark.pedantic(steps["routed"], rounds=1)
    how = "compiled" if compiled else "eager"
    print(f"\n{setting}, {how}: seconds of CPU (quartiles), then realised efficiency by CPU time, by wall time")
    for name, seconds in times.cpu.items():
        quartiles = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        row = {"setting": str(setting), "how": how, "variant": name, "cpu_s": quartiles}
        if name != "dense":
            for clock, measured in (("cpu", times.cpu), ("wall", times.wall)):
                estimate = efficiency(measured, name)
                row[f"efficiency_{clock}"] = [estimate.value, estimate.low, estimate.high]
                row[f"text_{clock}"] = str(estimate)
        results().add("speed", row)
        low, median, high = quartiles
        print(
            f"{name:>12}: {median:.3f} ({low:.3f} to {high:.3f})  {row.get('text_cpu', '')}  {row.get('text_wall', '')}"
        )
