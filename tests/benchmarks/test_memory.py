"""Peak memory of an eager training step: dense, routed, ideal and a hand-written wrapper, as the allocator reports it.

pytest tests/benchmarks/test_memory.py --benchmark-only -s
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from ideal import make_ideal
from torch import Tensor, nn

import ltd_fx

BATCH, SEQ, DEPTH = 4, 512, 8
KINDS = ("ideal", "routed", "hand-written", "dense")


def build() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        max_position_embeddings=SEQ,
        pad_token_id=0,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def hand_write(layers: nn.ModuleList, keep: int) -> None:
    """What a user would write: argsort, gather, scatter with expanded indices."""
    for layer in layers[1:-1]:

        def routed(hidden: Tensor, *, dense: Callable[..., Tensor] = layer.forward, **kwargs: Any) -> Tensor:
            batch, seq, width = hidden.shape
            kept = torch.rand(batch, seq).argsort(1)[:, :keep].sort(1).values
            rows = kept[..., None].expand(-1, -1, width)
            tables = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = tuple(
                table.expand(batch, -1, -1)[torch.arange(batch)[:, None], kept] for table in tables
            )
            return hidden.scatter(1, rows, dense(hidden.gather(1, rows), **kwargs))

        layer.forward = routed


def step(kind: str, keep: int) -> Callable[[], None]:
    model = build()
    if kind == "routed":
        ltd_fx.transform(model, ltd_fx.LTDScheduler(keep, SEQ, 1, kind="constant"))
    elif kind == "ideal":
        make_ideal(model.model.layers, keep)
    elif kind == "hand-written":
        hand_write(model.model.layers, keep)
    ids = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 1000

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    run()  # the gradients exist from here on
    return run


def peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes that were live at once during ``run``, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("share", [2, 4, 8])
def test_peak_memory(benchmark: Any, share: int) -> None:
    keep = SEQ // share
    runs = {kind: step(kind, keep) for kind in KINDS}
    peaks = {kind: peak_bytes(run) for kind, run in runs.items()}
    benchmark.pedantic(runs["routed"], rounds=3, warmup_rounds=1)
    for kind, peak in peaks.items():
        benchmark.extra_info[kind] = peak
        print(f"\nk = S/{share}  {kind:>12}: {peak / 2**20:7.1f} MiB  {peak / peaks['ideal']:.3f} of the ideal", end="")
    assert peaks["routed"] <= 1.03 * peaks["ideal"]
