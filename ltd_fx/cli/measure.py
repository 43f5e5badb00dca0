"""``plan --measure``: what a routed layer saves on this machine, where small ones cost what starting them takes."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import ltd_fx
from ltd_fx.errors import LTDError
from ltd_fx.schedule import LTDScheduler, Model

_LAYERS, _ROUNDS = 4, 7


@dataclass(frozen=True)
class Measured:
    """Medians of a training step in eager mode, in float32, or on an accelerator bfloat16.

    Attributes:
        device: what it was measured on.
        milliseconds: of one layer, forward and backward, by the number of tokens that it keeps; all of them: dense.
        time_saved: the share of the layers' time that the whole schedule saves.
    """

    device: str
    milliseconds: dict[int, float]
    time_saved: float


class _Layer(nn.Module):
    """Of the size that the plan counts: d x 3d, d x d, and an MLP four times as wide."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        dim = model.hidden
        self.heads = dim // 64 if dim % 64 == 0 else 1
        self.causal = model.causal
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, hidden_states: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](hidden_states)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        hidden_states = hidden_states + self.out(attended.transpose(1, 2).flatten(2))
        out: Tensor = hidden_states + self.mlp(self.norms[1](hidden_states))
        return out


class _Layers(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(model) for _ in range(_LAYERS))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def measure(model: Model, scheduler: LTDScheduler, steps: int, *, batch: int, device: str) -> Measured:
    """Time layers of ``model``'s size at the first length of the schedule, half-way from it, and dense.

    Args:
        model: its sizes.
        scheduler: as for the plan.
        steps: of the whole run.
        batch: sequences on one device.
        device: such as ``"cpu"`` or ``"cuda"``.

    Raises:
        LTDError: there is no such device.
    """
    try:
        where = torch.device(device)
        hidden = torch.randn(batch, model.seq_len, model.hidden, device=where)
    except (RuntimeError, AssertionError) as error:
        raise LTDError(f"ltd_fx plan: --device {device}: {error}") from error
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    hidden = hidden.to(dtype).requires_grad_()
    layers = _Layers(model).to(where, dtype)
    ltd_fx.register_pattern(_Layer, ltd_fx.LayerPattern())
    lengths = LTDScheduler(1, model.seq_len, 1, kind=lambda step: step)  # The step is the length.
    ltd_fx.transform(layers, lengths, layers=_Layer, skip_first=0, skip_last=0)
    first = scheduler.length_at(0)
    tried = sorted({first, (first + model.seq_len) // 2, model.seq_len})
    seconds: dict[int, list[float]] = {keep: [] for keep in tried}
    for turn in range(_ROUNDS + 1):
        for keep in tried:
            lengths.set_step(keep)
            start = time.perf_counter()
            layers(hidden).sum().backward()
            if where.type != "cpu":
                torch.accelerator.synchronize(where)
            if turn:  # The first turn warms up.
                seconds[keep].append(time.perf_counter() - start)
    per_layer = {keep: statistics.median(times) / _LAYERS for keep, times in seconds.items()}
    dense = per_layer[model.seq_len]
    taken = np.interp([scheduler.length_at(step) for step in range(steps)], tried, [per_layer[k] for k in tried])
    routed = (model.layers - model.dense_layers) / model.layers
    saved = routed * float(1 - taken.mean() / dense)
    return Measured(device, {keep: 1e3 * value for keep, value in per_layer.items()}, saved)
