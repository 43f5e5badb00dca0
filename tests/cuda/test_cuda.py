"""The operators on a GPU: pytest -m cuda. docs/cuda.md says how to run them under compute-sanitizer."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import decoder, loss_of, text
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx.cuda import driver
from ltd_fx.ops import arguments as ops_align
from ltd_fx.ops import lowering
from ltd_fx.ops import tokens as ops
from ltd_fx.ops.sampling import draw_key, sample

DEVICE = torch.device("cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

gather_tokens, scatter_tokens = torch.ops.ltd_fx.gather_tokens, torch.ops.ltd_fx.scatter_tokens
gather_aligned, gather_mask = torch.ops.ltd_fx.gather_aligned, torch.ops.ltd_fx.gather_mask
sample_tokens = torch.ops.ltd_fx.sample_tokens
KEY, SITE = torch.tensor(draw_key(0, 7)), torch.tensor(3)
if torch.cuda.is_available():
    KEY, SITE = KEY.to(DEVICE), SITE.to(DEVICE)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert driver.kernels_on(DEVICE) is not None, "the kernels did not load"
    yield
    monkeypatch.undo()
    lowering.register_inductor_decompositions()


def draw(batch: int, seq_len: int, keep: int, rank: Tensor | None = None) -> Tensor:
    drawn: Tensor = sample_tokens(KEY, SITE, KEY, batch, seq_len, keep, rank)
    return drawn


# ---- against the CPU


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1, draw_key(3, 10**9)])
@pytest.mark.parametrize(
    "sizes", [(3, 37, 18), (2, 1, 1), (2, 5, 0), (192, 2048, 1024), (1, 8193, 8193), (2, 10**6, 999)]
)
@pytest.mark.parametrize("ranked", [False, True])
def test_samples_are_the_cpus(sizes: tuple[int, int, int], key: int, ranked: bool) -> None:
    rows, seq_len, keep = sizes
    for rank_rows in (1, rows):
        rank = torch.randint(-1, 2, (rank_rows, seq_len)) if ranked else None
        drawn = sample_tokens(torch.tensor(key, device=DEVICE), SITE, KEY, *sizes, rank.to(DEVICE) if ranked else None)
        assert drawn.is_cuda
        assert torch.equal(drawn.cpu(), sample(torch.tensor(key), SITE.cpu(), rows, seq_len, keep, rank))


def rows(first: int, second: int, dim: int, dtype: torch.dtype, memory: str) -> Tensor:
    """Random bits, laid out as ``memory`` says."""
    wide = {"rows apart": dim + 1, "strided": 2 * dim}.get(memory, dim)
    count = (first * second * wide + 1) * dtype.itemsize
    value = torch.randint(0, 256, (count,), dtype=torch.uint8, device=DEVICE).view(dtype)
    value = (value[1:] if memory == "misaligned" else value[:-1]).view(first, second, wide)
    return value[..., ::2] if memory == "strided" else value[..., :dim]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "sizes", [(2, 41, 24, 17), (1, 1, 1, 1), (3, 50, 33, 0), (8, 2048, 2048, 1024), (70_000, 3, 8, 2)], ids=str
)
def test_rows_are_the_cpus(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """As torch's indexing has them, on the bits."""
    batch, seq_len, dim, keep = sizes
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    drawn = draw(batch, seq_len, keep)
    for index, batch_first in itertools.product((torch.int32, torch.int64), (True, False)):
        for memory in ("contiguous", "misaligned", "rows apart", "strided"):
            full, few = ((batch, seq_len), (batch, keep)) if batch_first else ((seq_len, batch), (keep, batch))
            hidden, kept = rows(*full, dim, dtype, memory), rows(*few, dim, dtype, memory)
            gathered = gather_tokens(hidden, drawn.to(index), batch_first).view(bits)
            merged = scatter_tokens(hidden, drawn.to(index), kept, batch_first).view(bits)
            hidden, kept = hidden.view(bits), kept.view(bits)
            assert torch.equal(gathered, ops.gather_rows(hidden, drawn, batch_first))
            assert torch.equal(merged, ops.scatter_rows(hidden, drawn, kept, batch_first))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("sizes", [(2, 41, 17), (1, 1, 1), (3, 50, 0), (8, 2048, 1024), (70_000, 9, 4)], ids=str)
@pytest.mark.parametrize("drawn", ["each", "shared"])
def test_aligned_arguments_are_the_cpus(drawn: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, seq_len, keep = sizes
    indices = draw(batch if drawn == "each" else 1, seq_len, keep)
    shapes = [(1, seq_len, 24), (1, seq_len, 33), (batch, seq_len), (batch, 1, 1, seq_len), (batch, 2, seq_len, 3)]
    shapes += [(n, 1, seq_len, seq_len) for n in (1, batch)]
    high = 2 if dtype == torch.bool else 250
    *values, one, many = (torch.randint(0, high, shape, device=DEVICE).to(dtype) for shape in shapes)
    values, masks = values * 2, (one, many, many.transpose(2, 3))  # more than one launch takes
    for index in (indices, indices.int()):
        got = [*gather_aligned(values, index, [1, 1, 1, 3, 2] * 2), *(gather_mask(mask, index) for mask in masks)]
        expected = ops_align.aligned_by_indexing(values, indices, [1, 1, 1, 3, 2] * 2)
        expected += [ops_align.mask_by_indexing(mask, indices) for mask in masks]
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_more_than_two_gigabytes() -> None:
    hidden = torch.randint(0, 256, (3, 500_000, 2048), dtype=torch.uint8, device=DEVICE)
    indices, float8 = draw(3, 500_000, 250_000), torch.float8_e4m3fn
    kept = gather_tokens(hidden.view(float8), indices)
    merged = scatter_tokens(torch.zeros_like(hidden).view(float8), indices, kept)
    last = indices[2, -1000:]
    assert torch.equal(kept.view(torch.uint8)[2, -1000:], hidden[2, last])
    assert torch.equal(merged.view(torch.uint8)[2, last], hidden[2, last])


def test_opcheck() -> None:
    hidden = torch.randn(2, 9, 4, device=DEVICE, requires_grad=True)
    kept = torch.randn(2, 4, 4, device=DEVICE, requires_grad=True)
    indices = draw(2, 9, 4)
    torch.library.opcheck(sample_tokens.default, (KEY, SITE, hidden, 2, 9, 4))
    torch.library.opcheck(gather_tokens.default, (hidden, indices, True))
    torch.library.opcheck(scatter_tokens.default, (hidden, indices, kept, True))
    torch.library.opcheck(gather_aligned.default, ([hidden, hidden[:1]], indices, [1, 1]))
    torch.library.opcheck(gather_mask.default, (torch.randn(2, 1, 9, 9, device=DEVICE, requires_grad=True), indices))


# ---- on the right stream and device, without waiting


def route(hidden: Tensor) -> Tensor:
    batch, seq_len, _ = hidden.shape
    key, site = KEY.to(hidden.device), SITE.to(hidden.device)
    indices = sample_tokens(key, site, key, batch, seq_len, seq_len // 2)
    (table,) = gather_aligned([hidden[:1]], indices, [1])
    mask = gather_mask(hidden[:, None, :, :1] - hidden[:, None, None, :, 0], indices)
    kept = gather_tokens(hidden, indices) + table + mask[:, 0].amax(2, keepdim=True)
    routed: Tensor = scatter_tokens(hidden, indices, kept)
    return routed


def test_no_operator_waits_for_the_device() -> None:
    hidden = torch.randn(4, 64, 32, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        route(hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_the_current_stream_and_in_a_thread() -> None:
    hidden = torch.randn(4, 512, 512, device=DEVICE)
    expected = route(hidden)
    results: list[Tensor] = []

    def run() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            late = torch.zeros_like(hidden)
            torch.cuda._sleep(50_000_000)  # a kernel on another stream would read zeros
            late += hidden
            results.append(route(late))
        stream.synchronize()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_on_the_tensors_device() -> None:
    hidden = torch.randn(4, 64, 32, device=DEVICE)
    expected, there = route(hidden), torch.device("cuda", 1)
    routed = route(hidden.to(there))
    assert routed.device == there
    assert torch.equal(routed.to(DEVICE), expected)


def test_in_a_cuda_graph() -> None:
    hidden = torch.randn(4, 64, 32, device=DEVICE)
    route(hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route(hidden)
    for seed in (1, 2):
        hidden.copy_(torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(captured, route(hidden))


def test_an_index_out_of_range_stops_the_program() -> None:
    code = """
import torch, ltd_fx
hidden = torch.zeros(1, 4, 4, device="cuda")
torch.ops.ltd_fx.gather_tokens(hidden, torch.tensor([[1, 4]], device="cuda"))
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "CUDA error" in done.stderr


# ---- whole models


def step(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(model(**inputs))
    loss.backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu(), {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}


def transformed(device: Any) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = decoder("Llama")().to(device).train()
    return ltd_fx.transform(model), {name: value.to(device) for name, value in text().items()}


@pytest.mark.parametrize("lowering", [None, "fuse", "kernel"])
def test_a_step_is_the_cpus(lowering: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if lowering is not None:
        monkeypatch.setenv("LTD_FX_LOWERING", lowering)
    loss, grads = step(*transformed("cpu"))
    model, inputs = transformed(DEVICE)
    run = torch.compile(model, fullgraph=True) if lowering else model
    there, grads_there = step(run, inputs)
    torch.testing.assert_close(there, loss, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_there[name], grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lowering", ["fuse", "kernel"])
def test_cuda_graphs_over_a_walk_of_lengths(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTD_FX_LOWERING", lowering)
    torch.manual_seed(0)
    model = decoder("Llama")().to(DEVICE).train()
    scheduler = ltd_fx.LTDScheduler(16, 64, 12, multiple_of=16)
    ltd_fx.transform(model, scheduler)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    inputs = {name: value.to(DEVICE) for name, value in text().items()}
    for index in range(14):
        scheduler.set_step(index)
        torch.compiler.cudagraph_mark_step_begin()
        loss_of(compiled(**inputs)).backward()


def test_one_graph_for_every_length() -> None:
    model, inputs = transformed(DEVICE)
    scheduler = ltd_fx.LTDScheduler(16, 64, 10)
    ltd_fx.transform(ltd_fx.restore(model), scheduler)
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for index in range(12):
        scheduler.set_step(index)
        loss_of(compiled(**inputs)).backward()
    assert backend.frame_count == 2
