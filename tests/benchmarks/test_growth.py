"""How the cost of routing itself grows: a routed layer that does nothing, beside a Llama layer on all tokens.

pytest tests/benchmarks/test_growth.py --benchmark-only -s
"""

from typing import Any

import numpy as np
import torch
from models import Setting, layers_of, stepper
from results import results
from rounds import interleave, rounds_wanted
from torch import Tensor, nn

import ltd_fx

# tokens, width, batch: one thing changed at a time from the first
SIZES = [
    (1024, 512, 2),
    *((tokens, 512, 2) for tokens in (512, 2048, 4096)),
    *((tokens, 512, 1) for tokens in (8192, 16384)),
    *((1024, width, 2) for width in (256, 768, 1024)),
    *((1024, 512, batch) for batch in (1, 4, 8)),
]


class Nothing(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Nothing()])

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def routing(tokens: int, width: int, batch: int) -> Any:
    """Forward and backward of the route alone, as one layer in a model: the gradient of its input is wanted."""
    ltd_fx.register_pattern(Nothing, ltd_fx.LayerPattern(output=None))
    model = ltd_fx.transform(Layers().train(), skip_first=0, skip_last=0)
    hidden = torch.randn(batch, tokens, width, requires_grad=True)
    grad = torch.randn(batch, tokens, width)
    return lambda: torch.autograd.grad(model(hidden), hidden, grad)


def test_growth(benchmark: Any) -> None:
    rows = []
    for tokens, width, batch in SIZES:
        setting = Setting("llama", width=width, tokens=tokens, batch=batch, depth=1)
        model = setting.build()
        assert len(layers_of(model)) == 1
        steps = {"route": routing(tokens, width, batch), "layer": stepper(model, setting.inputs())}
        cpu = interleave(steps, rounds_wanted(20) if tokens < 8192 else 3).cpu
        route, layer = (float(np.median(cpu[name])) for name in steps)
        rows.append((batch * tokens * width, route))
        row = {
            "setting": [tokens, width, batch],
            "route_ms": 1e3 * route,
            "layer_ms": 1e3 * layer,
            "share": route / layer,
        }
        results().add("growth", {**row, "how": "eager"})
        print(
            f"\nS={tokens:5} d={width:4} B={batch}: routing {1e3 * route:7.2f} ms, {route / layer:.2%} of a layer",
            end="",
        )
    sizes, seconds = np.array(rows).T
    slope, start = np.polyfit(sizes, seconds, 1)
    fitted = start + slope * sizes
    spread = float(np.abs(seconds / fitted - 1).max())
    results().add("growth_fit", {"ms": 1e3 * start, "ns_an_element": 1e9 * slope, "worst": spread})
    print(f"\nrouting: {1e3 * start:.2f} ms + {1e9 * slope:.2f} ns an element of B*S*d, at most {spread:.0%} off")
    benchmark.pedantic(routing(*SIZES[0]), rounds=5)
