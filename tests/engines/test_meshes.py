"""Meshes of two dimensions, on four ranks: hybrid FSDP2, and FSDP2 across tensor-parallel groups."""

from collections.abc import Callable

import pytest
import torch
from conftest import SEQ, checkpoint_layers, loss_of
from ranks import on_ranks
from test_checkpointing import wrap
from test_ddp import batch, both_encoders, encoder, expected, llama, parameters
from test_fsdp import full, shard
from test_model_parallel import ROWS_PLAN, tensor_parallel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from toy import Encoder, Rows

import ltd_fx
from ltd_fx import LTDScheduler

pytestmark = pytest.mark.slow  # four processes


def assert_trains_as_expected(model: nn.Module, build: Callable[[], nn.Module], replicas: int, replica: int) -> None:
    """``replicas`` groups of ranks have a batch each; this rank is in group ``replica``."""
    for step, gradients in enumerate(expected(build, replicas)):
        for forward in range(2):
            loss_of(model(batch(model, replica, step, forward))).backward()
        for name, p in parameters(model).items():
            torch.testing.assert_close(full(p.grad), gradients[name], rtol=1e-4, atol=1e-5)
        model.zero_grad()
        model._ltd_rewrite.state.scheduler.step()


def routed(model: nn.Module, mesh: DeviceMesh, checkpoint: bool | None = None) -> nn.Module:
    if checkpoint is not None:
        checkpoint_layers(model, use_reentrant=checkpoint)
    return ltd_fx.transform(model, LTDScheduler(9, SEQ, 3), device_mesh=mesh)


@pytest.mark.parametrize("checkpoint", [None, False, True])
@on_ranks(4)
def test_hybrid_sharding(checkpoint: bool | None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = shard(routed(llama(), mesh, checkpoint), mesh=mesh)
    assert_trains_as_expected(model, llama, 4, torch.distributed.get_rank())


@both_encoders
@on_ranks(4)
def test_hybrid_sharding_compiled_by_layers(build: Callable[[], nn.Module]) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    model = ltd_fx.compile_layers(shard(routed(build(), mesh), mesh=mesh), backend="aot_eager")
    assert_trains_as_expected(model, encoder, 4, torch.distributed.get_rank())


@pytest.mark.parametrize("checkpoint", [None, False, True])
@pytest.mark.parametrize("order", ["before", "after"])
@on_ranks(4)
def test_fully_shard_across_tensor_parallel_groups(order: str, checkpoint: bool | None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = llama()
    if order == "after":
        routed(model, mesh, checkpoint)
    shard(tensor_parallel(model, mesh["tp"]), mesh=mesh["fsdp"])
    if order == "before":
        routed(model, mesh, checkpoint)
    assert_trains_as_expected(model, llama, 2, mesh.get_local_rank("fsdp"))


def rows_encoder() -> nn.Module:
    torch.manual_seed(0)
    model = Encoder()
    model.blocks = nn.ModuleList(Rows() for _ in range(3))
    return model.train()


@pytest.mark.parametrize("checkpoint", [False, True])
@on_ranks(4)
def test_fully_shard_across_tensor_parallel_groups_compiled_on_rows(checkpoint: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = rows_encoder()
    if checkpoint:
        wrap(model)
    routed(model, mesh)(batch(model))  # learns the layers
    model._ltd_rewrite.state.begin_step(0)
    for block in model.modules():
        if isinstance(block, Rows):
            parallelize_module(block, mesh["tp"], ROWS_PLAN)
    shard(model, mesh=mesh["fsdp"])
    ltd_fx.compile_layers(model, backend="aot_eager")
    assert_trains_as_expected(model, rows_encoder, 2, mesh.get_local_rank("fsdp"))
