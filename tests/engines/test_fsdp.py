"""FSDP2: ``fully_shard`` before or after ``transform``, and weights in and out of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import SEQ, checkpoint_layers, loss_of
from ranks import on_ranks
from test_ddp import batch, both_encoders, encoder, expected, llama, parameters
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model: nn.Module, **options: Any) -> nn.Module:
    layers = model.blocks if hasattr(model, "blocks") else model.model.layers
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def sharded(model: nn.Module, order: str = "after", **options: Any) -> tuple[nn.Module, LTDScheduler]:
    scheduler = LTDScheduler(9, SEQ, 3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    if order == "before":
        shard(model, mesh=mesh, **options)
    ltd_fx.transform(model, scheduler, device_mesh=mesh)
    if order == "after":
        shard(model, mesh=mesh, **options)
    return model, scheduler


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_trains_as_expected(model: nn.Module, scheduler: LTDScheduler, build: Any, run: Any = None) -> None:
    run = model if run is None else run
    for step, gradients in enumerate(expected(build, dist.get_world_size())):
        model.set_requires_gradient_sync(False)
        loss_of(run(batch(model, dist.get_rank(), step, 0))).backward()
        model.set_requires_gradient_sync(True)
        loss_of(run(batch(model, dist.get_rank(), step, 1))).backward()
        for name, p in parameters(model).items():
            torch.testing.assert_close(full(p.grad), gradients[name], rtol=1e-4, atol=1e-5)
        model.zero_grad()
        scheduler.step()


@pytest.mark.parametrize("checkpoint", [None, pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("order", [pytest.param("before", marks=pytest.mark.slow), "after"])
@on_ranks(2)
def test_fully_shard(order: str, checkpoint: bool | None) -> None:
    model = llama()
    if checkpoint is not None:
        checkpoint_layers(model, use_reentrant=checkpoint)
    assert_trains_as_expected(*sharded(model, order), llama)


def bfloat16(build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    for p in model.parameters():  # not the buffers: rotary frequencies stay float32
        p.data = p.data.bfloat16()
    return model


@pytest.mark.parametrize(
    ("order", "precision"),
    [
        ("after", "float32"),
        pytest.param("before", "float32", marks=pytest.mark.slow),
        pytest.param("after", "bfloat16", marks=pytest.mark.slow),
    ],
)
@both_encoders
@on_ranks(2)
def test_fully_shard_compiled_by_layers(build: Callable[[], nn.Module], order: str, precision: str) -> None:
    plain, options = (encoder, {}) if precision == "float32" else (lambda: bfloat16(encoder), {"mp_policy": BFLOAT16})
    model, scheduler = sharded(build(), order, **options)
    ltd_fx.compile_layers(model, backend="aot_eager")
    assert_trains_as_expected(model, scheduler, plain)


@pytest.mark.slow
@both_encoders
@on_ranks(2)
def test_fully_shard_compiled_whole(build: Callable[[], nn.Module]) -> None:
    """In pieces: FSDP2's hooks break the graph."""
    model, scheduler = sharded(build())
    counter = CompileCounterWithBackend("aot_eager")
    assert_trains_as_expected(model, scheduler, encoder, torch.compile(model, backend=counter))
    assert counter.frame_count


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [None, False, True])
@pytest.mark.parametrize("order", ["before", "after"])
@on_ranks(2)
def test_bfloat16(order: str, checkpoint: bool | None) -> None:
    model = llama()
    if checkpoint is not None:
        checkpoint_layers(model, use_reentrant=checkpoint)
    assert_trains_as_expected(*sharded(model, order, mp_policy=BFLOAT16), lambda: bfloat16(llama))
    assert all(p.dtype == torch.float32 for p in model.parameters())


@on_ranks(2)
def test_weights_of_a_sharded_model(tmp_path: Path) -> None:
    reference, (model, _) = encoder(), sharded(encoder())
    clean = ltd_fx.clean_state_dict(model)
    assert list(clean) == list(reference.state_dict())
    for suffix in (".safetensors", ".pt"):
        path = tmp_path / f"model{suffix}"
        ltd_fx.save_clean(model, path)
        dist.barrier()
        plain = encoder()
        nn.init.zeros_(plain.blocks[0].linear1.weight)
        ltd_fx.load_clean(plain, path)
        other, _ = sharded(encoder())
        for p in other.parameters():
            nn.init.zeros_(p)
        ltd_fx.load_clean(other, path)
        for name, value in reference.state_dict().items():
            assert torch.equal(plain.state_dict()[name], value)
            assert torch.equal(full(other.state_dict()[name]), value)
    with pytest.raises(LTDError, match="cannot be written"):
        ltd_fx.save_clean(model, tmp_path / "nowhere" / "model.pt")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.pt", "model.safetensors"]


@on_ranks(2)
def test_distributed_checkpoints_between_world_sizes(tmp_path: Path) -> None:
    """Saved by two ranks and loaded by one, and the other way."""
    two, scheduler = sharded(encoder())
    two(batch(two, 0))
    for _ in range(2):
        scheduler.step()
    position = scheduler.state_dict()
    dcp.save({"model": get_model_state_dict(two), "scheduler": scheduler}, checkpoint_id=tmp_path / "two")
    if dist.get_rank() == 0:
        one, resumed = encoder(), LTDScheduler(9, SEQ, 3)
        ltd_fx.transform(one, resumed)
        nn.init.zeros_(one.blocks[1].linear1.weight)
        state = {"model": one.state_dict(), "scheduler": resumed}
        dcp.load(state, checkpoint_id=tmp_path / "two", no_dist=True)
        for name, value in encoder().state_dict().items():
            assert torch.equal(one.state_dict()[name], value)
        assert resumed.state_dict() == position
        resumed.step()
        position = resumed.state_dict()
        dcp.save({"model": one.state_dict(), "scheduler": resumed}, checkpoint_id=tmp_path / "one", no_dist=True)
    dist.barrier()
    two, scheduler = sharded(encoder())
    for p in two.parameters():
        nn.init.zeros_(p)
    state = {"model": get_model_state_dict(two), "scheduler": scheduler}
    dcp.load(state, checkpoint_id=tmp_path / "one")
    set_model_state_dict(two, state["model"])
    for name, value in encoder().state_dict().items():
        assert torch.equal(full(two.state_dict()[name]), value)
    assert scheduler.state_dict()["step"] == 3
