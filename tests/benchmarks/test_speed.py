"""Time of a training step: dense, ideal, routed, and what a user would have instead, eager and compiled.

Beside the time saved stand the operations that ``python -m ltd_fx plan`` says are saved.

pytest tests/benchmarks/test_speed.py --benchmark-only -s
"""

from typing import Any

import pytest
import torch
from models import Setting, stepper
from peers import PEERS, peers_for, prepare
from results import results
from rounds import bootstrap, efficiency, interleave, rounds_wanted
from torch import nn

import ltd_fx
from ltd_fx.schedule.planner import Model, make_plan

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
    for name in peers_for(setting, compiled=compiled):
        steps[name] = stepper(prepare(name, setting.build(), setting, compiled=compiled), setting.inputs())
        steps[name]()
    times = interleave(steps, rounds_wanted(20))
    benchmark.pedantic(steps["routed"], rounds=1)
    how = "compiled" if compiled else "eager"
    print(f"\n{setting}, {how}: seconds of CPU (quartiles), then realised efficiency by CPU time, by wall time")
    for name, seconds in times.cpu.items():
        quartiles = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        row = {"setting": str(setting), "how": how, "variant": name, "rounds": len(seconds), "cpu_s": quartiles}
        if name != "dense":
            row["efficiency_cpu"] = efficiency(times.cpu, name)
            row["efficiency_wall"] = efficiency(times.wall, name)
            row["saved"] = bootstrap(lambda t, name=name: 1 - t[name] / t["dense"], times.cpu)
            row["planned"] = planned(setting)
        results().add("speed", row)
        low, median, high = quartiles
        efficiencies = "  ".join(str(row[key]) for key in ("efficiency_cpu", "efficiency_wall") if key in row)
        print(f"{name:>12}: {median:.3f} ({low:.3f} to {high:.3f})  {efficiencies}")


def planned(setting: Setting) -> float:
    """The share of operations saved while the setting's reserved length lasts."""
    sizes = Model(setting.depth, setting.width, setting.seq_len, causal=setting.family == "llama", dense_layers=0)
    scheduler = ltd_fx.LTDScheduler(setting.keep, setting.seq_len, 1, kind="constant")
    return make_plan(sizes, scheduler, 1).flops_saved


@pytest.mark.parametrize("setting", [Setting(), Setting("bert", padded=True), Setting("vit")], ids=str)
def test_static(benchmark: Any, setting: Setting) -> None:
    """What one graph for all lengths costs: a step of it, over one of a graph in which k is a constant."""
    torch._dynamo.reset()
    steps = {}
    for name, make in {"any length": PEERS["routed"], "one length": one_length}.items():
        model = setting.build()
        make(model, setting)
        steps[name] = stepper(torch.compile(model), setting.inputs())
        steps[name]()
    times = interleave(steps, rounds_wanted(20))
    ratios = [bootstrap(lambda t: t["any length"] / t["one length"], clock) for clock in (times.cpu, times.wall)]
    results().add("static", {"setting": str(setting), "how": "compiled", "cpu": ratios[0], "wall": ratios[1]})
    print(f"\n{setting}: any length over one length, by CPU time {ratios[0]}, by wall time {ratios[1]}")
    benchmark.pedantic(steps["any length"], rounds=1)


def one_length(model: nn.Module, setting: Setting) -> None:
    """Half of the tokens, always: for inputs of one shape that is a constant."""
    assert setting.share == 2
    ltd_fx.transform(model, skip_first=0, skip_last=0)
