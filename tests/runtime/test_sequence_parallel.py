"""Layers whose hidden states are a part of the sequence: plain shards ``[B, S / n, D]``, and ``DTensor``s."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEQ
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.functional import scaled_dot_product_attention
from toy import Encoder

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


class ContextParallel(nn.Module):
    """Attention from the rank's own tokens to all ranks' (all of its own, without a mesh)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mesh: DeviceMesh | None = None

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        scaled = hidden if table is None else hidden * table
        q, k, v = self.qkv(self.norm(scaled)).unflatten(2, (6, 8)).transpose(1, 2).chunk(3, 1)
        if self.mesh is not None:
            k, v = (all_gather_tensor_autograd(part, 2, self.mesh.get_group()) for part in (k, v))
        return hidden + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


ltd_fx.register_pattern(ContextParallel, ltd_fx.LayerPattern("hidden", aligned={"table": (1,)}))


def encoder() -> Encoder:
    torch.manual_seed(0)
    model = Encoder(4)
    model.blocks = nn.ModuleList(ContextParallel() for _ in range(4))
    return model.train()


def dropped(model: nn.Module, hidden: Tensor, rows: dict[str, Tensor], parts: int) -> Tensor:
    """The whole sequence in one process, with the tokens ``rows`` ``[B, k]`` of each of its ``parts``."""
    length = hidden.shape[1] // parts
    for i, block in enumerate(model.blocks):
        if (kept := rows.get(f"blocks.{i}")) is None:
            hidden = block(hidden)
            continue
        places = torch.cat([kept + part * length for part in range(parts)], 1)[..., None].expand(-1, -1, 16)
        hidden = hidden.scatter(1, places, block(hidden.gather(1, places)))
    return hidden


def assert_shards_train_as_one_sequence(mesh: DeviceMesh, checkpoint: bool = False, compiled: bool = False) -> None:
    cp, replica = mesh["cp"], mesh.get_local_rank("dp")
    part, parts = cp.get_local_rank(), cp.size()
    scheduler = LTDScheduler(5, SEQ // parts, 3)  # lengths of a shard
    model, alone = encoder(), encoder()
    for i, block in enumerate(model.blocks):
        block.mesh = cp
        if checkpoint:
            model.blocks[i] = checkpoint_wrapper(block)
    ltd_fx.transform(model, scheduler, device_mesh=mesh)
    if compiled:
        ltd_fx.compile_layers(model, backend="aot_eager", fullgraph=True)
    for step in range(4):
        whole = torch.randn(2, SEQ, 16, generator=torch.Generator().manual_seed(2 * step + replica))
        target = torch.randn(2, SEQ, 16, generator=torch.Generator().manual_seed(2 * step + replica + 1))
        output = model(whole.chunk(parts, 1)[part])
        (output * target.chunk(parts, 1)[part]).sum().backward()
        rows = ltd_fx.sampled_indices(model)
        assert [kept.shape[1] for kept in rows.values()] == [scheduler.reserved_length] * 2
        expected = dropped(alone, whole, rows, parts)
        torch.testing.assert_close(output, expected.chunk(parts, 1)[part], rtol=1e-4, atol=1e-5)
        (expected * target).sum().backward()
        for p, other in zip(model.parameters(), alone.parameters(), strict=True):
            dist.all_reduce(p.grad, group=cp.get_group())
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        alone.zero_grad()
        scheduler.step()
    assert rows["blocks.1"].shape[1] == SEQ // parts  # dense at the end


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpoint", [False, True])
@on_ranks(2)
def test_plain_shards_on_two_ranks(checkpoint: bool, compiled: bool) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    assert_shards_train_as_one_sequence(mesh, checkpoint, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2), (1, 4)], ids=str)
@on_ranks(4)
def test_plain_shards_on_four_ranks(shape: tuple[int, int]) -> None:
    assert_shards_train_as_one_sequence(init_device_mesh("cpu", shape, mesh_dim_names=("dp", "cp")))


def test_arguments_of_the_whole_sequence_beside_a_shard_are_refused() -> None:
    model = encoder()
    ltd_fx.transform(model, LTDScheduler(5, SEQ // 2, 3))
    shard, table = torch.zeros(2, SEQ // 2, 16), torch.zeros(1, SEQ, 16)
    with pytest.raises(LTDError, match=rf"'table' of shape \(1, {SEQ}, 16\) must have the sequence length {SEQ // 2}"):
        model.blocks[1](shard, table)


class Sequences(Encoder):
    """Hands its layers DTensors."""

    placement: Any

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(distribute_tensor(hidden, self.mesh, [self.placement]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("placement", [Shard(1), Replicate()], ids=str)
@on_ranks(2)
def test_distributed_hidden_states_are_refused(placement: Any, compiled: bool) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = Sequences().train()
    model.mesh, model.placement = mesh, placement
    ltd_fx.transform(model, LTDScheduler(9, SEQ, 3), skip_first=0, device_mesh=mesh)
    run = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(LTDError, match=r"blocks.0: the hidden states are a DTensor.*PrepareModuleInput"):
        run(torch.zeros(2, SEQ, 16))
