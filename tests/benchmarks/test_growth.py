"""How the cost of routing itself grows: routed layers that do nothing, beside Llama layers on all tokens.

And beside copies of the hidden states, the roof that memory sets: with k = S/2 eager routing reads and writes as much
as four of them in each layer, two forward and two backward.

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

# tokens, width, batch, depth: one thing changed at a time from the first
SIZES = [
    (1024, 512, 2, 1),
    *((tokens, 512, 2, 1) for tokens in (512, 2048, 4096)),
    *((tokens, 512, 1, 1) for tokens in (8192, 16384)),
    *((1024, width, 2, 1) for width in (256, 768, 1024)),
    *((1024, 512, batch, 1) for batch in (1, 4, 8)),
    *((1024, 512, 2, depth) for depth in (2, 4, 8)),
]


class Nothing(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Layers(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Nothing() for _ in range(depth))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def routing(tokens: int, width: int, batch: int, depth: int) -> Any:
    """Forward and backward of the routes alone, as layers in a model: the gradient of their input is wanted."""
    ltd_fx.register_pattern(Nothing, ltd_fx.LayerPattern(output=None))
    model = ltd_fx.transform(Layers(depth).train(), skip_first=0, skip_last=0)
    hidden = torch.randn(batch, tokens, width, requires_grad=True)
    grad = torch.randn(batch, tokens, width)
    return lambda: torch.autograd.grad(model(hidden), hidden, grad)


def copies(tokens: int, width: int, batch: int, depth: int) -> Any:
    hidden = torch.randn(batch, tokens, width)
    return lambda: [hidden.clone() for _ in range(4 * depth)]


def test_growth(benchmark: Any) -> None:
    rows = []
    for tokens, width, batch, depth in SIZES:
        setting = Setting("llama", width=width, tokens=tokens, batch=batch, depth=depth)
        model = setting.build()
        assert len(layers_of(model)) == depth
        steps = {
            "route": routing(tokens, width, batch, depth),
            "copies": copies(tokens, width, batch, depth),
            "layer": stepper(model, setting.inputs()),
        }
        cpu = interleave(steps, rounds_wanted(20) if tokens < 8192 else 3).cpu
        route, copied, layer = (float(np.median(cpu[name])) for name in steps)
        rows.append((batch * tokens * width * depth, route))
        row = {
            "setting": [tokens, width, batch, depth],
            "route_ms": 1e3 * route,
            "copies_ms": 1e3 * copied,
            "layer_ms": 1e3 * layer,
            "share": route / layer,
        }
        results().add("growth", {**row, "how": "eager"})
        size = f"S={tokens:5} d={width:4} B={batch} L={depth}"
        print(f"\n{size}: routing {row['route_ms']:7.2f} ms, {row['share']:.2%} of the layers", end="")
    sizes, seconds = np.array(rows).T
    slope, start = np.polyfit(sizes, seconds, 1)
    fitted = start + slope * sizes
    spread = float(np.abs(seconds / fitted - 1).max())
    results().add("growth_fit", {"ms": 1e3 * start, "ns_an_element": 1e9 * slope, "worst": spread})
    print(f"\nrouting: {1e3 * start:.2f} ms + {1e9 * slope:.2f} ns an element of B*S*d*L, at most {spread:.0%} off")
    benchmark.pedantic(routing(*SIZES[0]), rounds=5)
