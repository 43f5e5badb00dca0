"""What eager routing costs in dispatch alone: models so small that only that is left, beside a hand-written wrapper.

pytest tests/benchmarks/test_dispatch.py --benchmark-only -s
"""

from typing import Any

import pytest
import torch
from models import Setting, stepper
from peers import HandWritten, prepare
from results import results
from rounds import bootstrap, interleave, rounds_wanted
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LayerPattern

DEPTH, TOKENS, WIDTH = 22, 16, 8
SMALL = [Setting(family, width=64, tokens=64, depth=DEPTH) for family in ("llama", "bert", "vit")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, position_embeddings: Any = None) -> Tensor:
        out: Tensor = hidden_states + self.linear(hidden_states)
        return out


class Net(nn.Module):
    """22 layers that are given a mask and two rotary tables, of which they make nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, hidden_states: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=(cos, sin))
        return (hidden_states,)


def toy(name: str) -> Any:
    torch.manual_seed(0)
    net, inputs = Net(), {"hidden_states": torch.randn(2, TOKENS, WIDTH, requires_grad=True)}
    inputs |= {"mask": torch.zeros(1, 1, TOKENS, TOKENS), "cos": torch.randn(1, TOKENS, 4)}
    inputs["sin"] = torch.randn(1, TOKENS, 4)
    if name == "hand-written":
        net.layers = nn.ModuleList(HandWritten(layer, TOKENS // 2) for layer in net.layers)
    if name == "routed":
        aligned = {"attention_mask": (2, 3), "position_embeddings": (1,)}
        ltd_fx.register_pattern(Block, LayerPattern(aligned=aligned))
        ltd_fx.transform(net, skip_first=0, skip_last=0, layers=Block)
    return stepper(net, inputs)


def small(setting: Setting, name: str) -> Any:
    return stepper(prepare(name, setting.build(), setting, compiled=False), setting.inputs())


@pytest.mark.filterwarnings("ignore:ltd_fx. the pattern registered for Block is trusted")
@pytest.mark.parametrize("setting", [None, *SMALL], ids=str)
def test_dispatch(benchmark: Any, setting: Setting | None) -> None:
    names = "dense", "routed", "hand-written"
    steps = {name: toy(name) if setting is None else small(setting, name) for name in names}
    for step in steps.values():
        step()
    seconds = interleave(steps, rounds_wanted(200)).cpu
    benchmark.pedantic(steps["routed"], rounds=1)
    what = f"{DEPTH} layers, d={WIDTH}, mask and tables" if setting is None else str(setting)
    row = {"setting": what, "how": "eager", "rounds": len(seconds["dense"])}
    for name in names:
        row[name] = bootstrap(lambda t, name=name: t[name] / DEPTH * 1e6, seconds)
    row["ratio"] = bootstrap(lambda t: t["routed"] / t["hand-written"], seconds)
    results().add("dispatch", row)
    print(f"\n{what}: microseconds a layer, forward and backward: " + ", ".join(f"{n} {row[n]}" for n in names))
    print(f"routed over hand-written: {row['ratio']}")
