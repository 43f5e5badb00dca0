"""What routing saved: its best case, timed; a table; a picture; and the numbers behind them."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from gpt import GPT, Block
from matplotlib.figure import Figure


class IdealTimer:
    """Times the routed layers with no routing: forward and backward on the first k tokens, nothing gathered.

    What this takes less than at full length is all that a step can save at reserved length k.

    Attributes:
        seconds: the measurements at each of a few lengths, the last of them the full one; the rest is interpolated.
    """

    def __init__(self, model: GPT, batch: int, lengths: Sequence[int]) -> None:
        self.model = model
        self.hidden = torch.randn(batch, max(lengths), model.config.width, device=model.cos.device)
        picks = np.linspace(0, len(lengths) - 1, 5).round().astype(int)
        self.seconds: dict[int, list[float]] = {lengths[i]: [] for i in picks}
        self._forward = torch.compile(Block.forward, fullgraph=True)

    def measure(self) -> None:
        """Add one measurement at each length."""
        for length, seconds in self.seconds.items():
            seconds.append(self._time(length))

    def clear(self) -> None:
        """Forget all measurements."""
        for seconds in self.seconds.values():
            seconds.clear()

    def saved(self, length: int) -> float:
        """Seconds per step that ``length`` tokens take less than all."""
        usual = [median(seconds) for seconds in self.seconds.values()]
        return usual[-1] - float(np.interp(length, list(self.seconds), usual))

    def _time(self, length: int) -> float:
        hidden = self.hidden[:, :length].clone().requires_grad_()
        rotary = self.model.rotary(length)
        for tensor in (hidden, *rotary):
            torch._dynamo.mark_dynamic(tensor, 1)  # one graph for all lengths, like the routed one
        start = time.perf_counter()
        out = hidden
        for block in self.model.blocks[1:-1]:
            out = self._forward(block, out, rotary)
        out.backward(torch.ones_like(out))
        hidden.grad[0, 0, 0].item()  # waits for the device
        elapsed = time.perf_counter() - start
        self.model.zero_grad()
        return elapsed


@dataclass(frozen=True)
class Result:
    """Of one training; the lists have an entry for each validation."""

    steps: list[int]
    validation_loss: list[float]
    seconds: list[float]
    layer_tokens: list[int]
    training_loss: list[float]  # of each step
    graphs: int


def table(dense: Result, routed: Result, ideal_seconds: float) -> str:
    """The comparison as text."""
    share = routed.layer_tokens[-1] / dense.layer_tokens[-1]
    rows = [
        ("", "dense", "routed", "ideal"),
        ("validation loss", f"{dense.validation_loss[-1]:.4f}", f"{routed.validation_loss[-1]:.4f}", ""),
        ("wall-clock (s)", f"{dense.seconds[-1]:.1f}", f"{routed.seconds[-1]:.1f}", f"{ideal_seconds:.1f}"),
        ("layer tokens", f"{dense.layer_tokens[-1]:,}", f"{routed.layer_tokens[-1]:,}", ""),
        ("  of dense", "100%", f"{share:.0%}", ""),
        ("graphs compiled", str(dense.graphs), str(routed.graphs), ""),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([line.rstrip() for line in lines] + [_NOTES])


_NOTES = """
wall-clock: training steps only, without compilation and validation.
ideal: dense, less what the routed layers take less on their first k tokens with no routing, measured while training."""


def plot(dense: Result, routed: Result, path: Path) -> None:
    """Validation loss against wall-clock and against layer tokens."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_time, by_tokens = figure.subplots(1, 2, sharey=True)
    for name, result in (("dense", dense), ("routed (random-LTD)", routed)):
        by_time.plot(result.seconds, result.validation_loss, marker="o", label=name)
        by_tokens.plot([tokens / 1e6 for tokens in result.layer_tokens], result.validation_loss, marker="o", label=name)
    by_time.set(xlabel="wall-clock without compilation (s)", ylabel="validation loss (nats per byte)")
    by_tokens.set(xlabel="layer tokens (millions)")
    for axes in (by_time, by_tokens):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def write_metrics(dense: Result, routed: Result, ideal: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """All numbers, as JSON."""
    metrics = {
        "settings": settings,
        "torch": torch.__version__,
        "dense": asdict(dense),
        "routed": asdict(routed),
        "ideal": ideal,
    }
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="ascii")
