"""How long training waits for the compiler: a program that evaluates before its first step, with and without warm_up.

pytest tests/benchmarks/test_pause.py --benchmark-only -s
"""

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from results import results
from test_compiling import cold
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx

DEPTH, WIDTH, BATCH, TOKENS = 6, 64, 4, 128
STEPS, FULL_AT, EVALUATE_EVERY = 18, 12, 6


class Block(nn.Module):
    """Of a class that ltd_fx has to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """As nanoGPT is called: with targets, it returns the loss too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("variant", ["dense", "routed", "routed, warm_up"])
def test_pause(benchmark: Any, variant: str) -> None:
    torch.manual_seed(0)
    model, batch = GPT(), torch.randint(256, (2, BATCH, TOKENS))
    scheduler = ltd_fx.LTDScheduler(32, TOKENS, FULL_AT)
    if variant != "dense":
        ltd_fx.transform(model, scheduler)
    counter = CompileCounterWithBackend("inductor")
    waits: dict[str, list[float]] = {"warm_up": [], "first": [], "evaluations": [], "steps": []}

    def timed(kind: str, call: Any) -> None:
        start = time.perf_counter()
        call()
        waits[kind].append(time.perf_counter() - start)

    def step() -> None:
        model.train()
        compiled(*batch)[1].backward()

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            compiled(*batch)

    with cold():
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        if variant == "routed, warm_up":
            timed("warm_up", lambda: ltd_fx.warm_up(compiled, tuple(batch)))
        timed("first", evaluate)
        timed("first", step)
        for number in range(1, STEPS):
            if variant != "dense":
                scheduler.step()
            timed("steps", step)
            if number % EVALUATE_EVERY == 0:
                timed("evaluations", evaluate)
    row = {"setting": variant, "how": "inductor", "graphs": counter.frame_count}
    row |= {kind: max(seconds, default=0.0) for kind, seconds in waits.items()} | {"first": sum(waits["first"])}
    results().add("pause", row)
    print(f"\n{variant}: {row}")
    benchmark.pedantic(step, rounds=1)
