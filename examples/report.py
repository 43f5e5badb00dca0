"""What the two runs cost and reached: a table and a picture."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

Metrics = Mapping[str, Any]


def ideal_share(layers: int, width: int, vocabulary: int, full: int, length: int) -> float:
    """Training FLOPs at reserved length ``length`` as a share of the dense model's, all but two layers routed.

    A layer at n tokens takes 24 n d^2 + 2 n^2 d forward (causal attention, MLP of 4 d); the head takes 2 n d V.
    """

    def layer(n: int) -> int:
        return 24 * n * width**2 + 2 * n**2 * width

    head = 2 * full * width * vocabulary
    return (2 * layer(full) + (layers - 2) * layer(length) + head) / (layers * layer(full) + head)


def compare(dense: Metrics, routed: Metrics, shares: list[float]) -> dict[str, float]:
    """What routing saved. Times are sums over steps without a compilation; ``ideal`` scales dense steps by FLOPs."""
    usual = median(second for second, compiled in zip(dense["seconds"], dense["compiled"], strict=True) if not compiled)
    kept = [not (a or b) for a, b in zip(dense["compiled"], routed["compiled"], strict=True)]
    saved = sum(usual - second for second, keep in zip(routed["seconds"], kept, strict=True) if keep)
    possible = sum(usual * (1 - share) for share, keep in zip(shares, kept, strict=True) if keep)
    return {
        "layer_tokens_saved": 1 - routed["layer_tokens"][-1] / dense["layer_tokens"][-1],
        "time_saved": saved / (usual * sum(kept)),
        "time_saved_ideal": possible / (usual * sum(kept)),
        "realised_efficiency": saved / possible,
    }


def table(runs: Mapping[str, Metrics], comparison: Mapping[str, float]) -> str:
    """The runs side by side."""
    rows = [("", *runs)]
    rows.append(("validation loss", *(f"{run['validation'][-1][1]:.3f}" for run in runs.values())))
    rows.append(("seconds, without compile", *(f"{clock(run)[-1]:.1f}" for run in runs.values())))
    rows.append(
        ("seconds in steps that compile", *(f"{sum(run['seconds']) - clock(run)[-1]:.1f}" for run in runs.values()))
    )
    rows.append(("layer tokens, millions", *(f"{run['layer_tokens'][-1] / 1e6:.2f}" for run in runs.values())))
    rows.append(("graphs compiled", *(str(run["graphs"]) for run in runs.values())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append("")
    lines.append(f"layer tokens saved   {comparison['layer_tokens_saved']:6.1%}")
    lines.append(
        f"step time saved      {comparison['time_saved']:6.1%}  of {comparison['time_saved_ideal']:.1%} by FLOPs"
    )
    lines.append(f"realised efficiency  {comparison['realised_efficiency']:6.2f}  (saved / saved by FLOPs)")
    return "\n".join(lines)


def clock(run: Metrics) -> list[float]:
    """Seconds of training up to each step, steps with a compilation left out."""
    return list(
        accumulate(
            0.0 if compiled else second for second, compiled in zip(run["seconds"], run["compiled"], strict=True)
        )
    )


def plot(runs: Mapping[str, Metrics], path: Path) -> None:
    """Loss against wall-clock and against layer tokens, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, run in runs.items():
        for axis, x in zip(axes, (clock(run), [tokens / 1e6 for tokens in run["layer_tokens"]]), strict=True):
            (line,) = axis.plot(x, smooth(run["loss"]), label=f"{name}, training", alpha=0.45)
            steps, losses = zip(*run["validation"], strict=True)
            axis.plot(
                [x[step - 1] for step in steps], losses, "o-", color=line.get_color(), label=f"{name}, validation"
            )
    axes[0].set(xlabel="seconds of training, without compile", ylabel="loss (nats per byte)")
    axes[1].set(xlabel="layer tokens (millions)")
    axes[0].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """An exponential moving average."""
    return list(accumulate(values, lambda average, value: weight * average + (1 - weight) * value))
