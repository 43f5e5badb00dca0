"""The operators on a GPU against the memory's speed, DeepSpeed's steps, and each other: make bench-cuda.

Times are CUDA events over many launches, medians of 20; bytes are those that the operation must move.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

import ltd_fx
from ltd_fx.ops.arguments import aligned_by_indexing, mask_by_indexing
from ltd_fx.ops.lowering import register_inductor_decompositions
from ltd_fx.ops.sampling import draw_key

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

# B, S, D, k of one GPU: GPT-3 1.3B and ViT-L, both at half of the tokens
SHAPES = {"gpt3-1.3b": (8, 2048, 2048, 1024), "vit-l": (64, 197, 1024, 98)}
SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ops = torch.ops.ltd_fx


def seconds(run: Callable[[], Any], launches: int = 20) -> float:
    for _ in range(3):
        run()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(launches):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / launches)
    return median(times)


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Key, site, hidden states, indices and the layer's output."""
    batch, seq_len, dim, keep = shape
    key, site = torch.tensor(draw_key(0, 0), device="cuda"), torch.tensor(1, device="cuda")
    hidden = torch.randn(batch, seq_len, dim, device="cuda", dtype=torch.bfloat16)
    indices = ops.sample_tokens(key, site, key, batch, seq_len, keep)
    return key, site, hidden, indices, ops.gather_tokens(hidden, indices)


def copied(count: int) -> float:
    """Bytes a second, read and written, of a device-to-device copy that moves ``count`` in all."""
    source = torch.empty(count // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return count / seconds(lambda: target.copy_(source))


def report(benchmark: Any, name: str, time: float, count: int) -> None:
    speed, copy = count / time, copied(count)
    benchmark.extra_info.update(microseconds=time * 1e6, gb_s=speed / 1e9, of_a_copy=speed / copy)
    print(f"\n{name}: {time * 1e6:.1f} us, {speed / 1e9:.0f} GB/s, {speed / copy:.2f} of a copy", end="")


@SHAPE
@pytest.mark.parametrize("name", ["gather", "merge", "sample"])
def test_operator(benchmark: Any, name: str, shape: tuple[int, ...]) -> None:
    batch, seq_len, _, keep = shape
    key, site, hidden, indices, kept = tensors(shape)
    run, count = {
        "gather": (lambda: ops.gather_tokens(hidden, indices), 2 * kept.nbytes),
        "merge": (lambda: ops.scatter_tokens(hidden, indices, kept), 2 * hidden.nbytes),
        "sample": (lambda: ops.sample_tokens(key, site, key, batch, seq_len, keep), indices.nbytes),
    }[name]
    benchmark(run)
    report(benchmark, name, seconds(run), count)


@SHAPE
@pytest.mark.parametrize("name", ["tables", "mask"])
def test_aligned_arguments(benchmark: Any, name: str, shape: tuple[int, ...]) -> None:
    """Rotary tables, position ids and a key mask together, or a dense mask; beside torch's indexing."""
    batch, seq_len, _, keep = shape
    indices = tensors(shape)[3]
    tables = [torch.randn(1, seq_len, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    tables += [torch.arange(seq_len, device="cuda").expand(batch, -1), torch.ones(batch, seq_len, device="cuda") > 0]
    mask = torch.randn(batch, 1, seq_len, seq_len, device="cuda", dtype=torch.bfloat16)
    ours, theirs, count = {
        "tables": (
            lambda: ops.gather_aligned(tables, indices, [1] * 4),
            lambda: aligned_by_indexing(tables, indices, [1] * 4),
            batch * keep * (2 * 2 * 256 + 2 * 8 + 2),
        ),
        "mask": (
            lambda: ops.gather_mask(mask, indices),
            lambda: mask_by_indexing(mask, indices),
            batch * keep * (seq_len + keep) * 2,
        ),
    }[name]
    benchmark(ours)
    report(benchmark, name, seconds(ours), count)
    benchmark.extra_info["indexing"] = seconds(theirs) * 1e6
    print(f", indexing {seconds(theirs) * 1e6:.1f} us", end="")


def deepspeed_steps(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """What DeepSpeed's wrapper launches for a layer: multinomial, sort, gather, a clone of everything, scatter."""
    batch, seq_len, dim, keep = shape
    _, _, hidden, _, _ = tensors(shape)

    def run() -> Tensor:
        drawn = torch.multinomial(torch.ones(batch, seq_len, device="cuda"), keep).sort(1).values
        rows = drawn[..., None].expand(-1, -1, dim)
        return hidden.clone().scatter_(1, rows, hidden.gather(1, rows))

    return run


@SHAPE
def test_route_of_one_layer(benchmark: Any, shape: tuple[int, ...]) -> None:
    batch, seq_len, _, keep = shape
    key, site, hidden, _, _ = tensors(shape)

    def run() -> Tensor:
        indices = ops.sample_tokens(key, site, key, batch, seq_len, keep)
        merged: Tensor = ops.scatter_tokens(hidden, indices, ops.gather_tokens(hidden, indices))
        return merged

    benchmark(run)
    ours, theirs = seconds(run), seconds(deepspeed_steps(shape))
    benchmark.extra_info.update(microseconds=ours * 1e6, deepspeed_steps=theirs * 1e6)
    print(f"\nroute: {ours * 1e6:.1f} us, DeepSpeed's steps {theirs * 1e6:.1f} us", end="")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_lowerings(benchmark: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step over a walk of lengths, ``LTD_FX_LOWERING=fuse`` against ``kernel``."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816}
    config = transformers.LlamaConfig(**sizes, vocab_size=1000, use_cache=False)
    ids = torch.randint(0, 1000, (8, 1024), device="cuda")
    steps = {}
    for lowering in ("fuse", "kernel"):
        monkeypatch.setenv("LTD_FX_LOWERING", lowering)
        torch._dynamo.reset()
        model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
        scheduler = ltd_fx.LTDScheduler(256, 1024, 8, multiple_of=256)
        compiled = torch.compile(ltd_fx.transform(model, scheduler), mode=mode)

        def walk(compiled: Any = compiled, scheduler: Any = scheduler) -> None:
            for index in (0, 3, 6):
                scheduler.set_step(index)
                torch.compiler.cudagraph_mark_step_begin()
                compiled(input_ids=ids, labels=ids).loss.backward()

        steps[lowering] = seconds(walk, launches=3) / 3
    benchmark.pedantic(walk, rounds=3)
    benchmark.extra_info.update(steps)
    print(f"\n{mode}: fuse {steps['fuse'] * 1e3:.2f} ms, kernel {steps['kernel'] * 1e3:.2f} ms a step", end="")
    monkeypatch.undo()
    register_inductor_decompositions()
