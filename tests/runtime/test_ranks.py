"""Which ranks draw alike, and that all have the same schedule."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import Encoder

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

SEQ = 32


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder(4).train()


def routed(mesh: DeviceMesh | None = None, total_steps: int = 10, seed: int = 0) -> tuple[nn.Module, LTDScheduler]:
    scheduler = LTDScheduler(8, SEQ, total_steps)
    return ltd_fx.transform(encoder(), scheduler, device_mesh=mesh, seed=seed), scheduler


def drawn(model: nn.Module) -> list[Any]:
    model(torch.zeros(3, SEQ, 16))
    return [rows.tolist() for rows in ltd_fx.sampled_indices(model).values()]


def from_all(value: Any) -> list[Any]:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


MESHES = {
    "dp": ((4,), ("dp",), [0, 1, 2, 3]),
    "without names": ((4,), None, [0, 1, 2, 3]),
    "tp": ((4,), ("tp",), [0, 0, 0, 0]),
    "tp x fsdp": ((2, 2), ("tp", "fsdp"), [0, 1, 0, 1]),
    "hsdp": ((2, 2, 1), ("dp_replicate", "dp_shard", "cp"), [0, 1, 2, 3]),
    "pp x cp": ((2, 2), ("pp", "cp"), [0, 0, 1, 1]),
}


@on_ranks(4)
def test_data_parallel_ranks_draw_differently_and_tensor_parallel_ranks_alike() -> None:
    alone = drawn(routed()[0])
    assert from_all(alone) == [alone] * 4
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, scheduler = routed(mesh)
    for step in range(2):
        everyone = from_all(drawn(model))
        assert step or everyone[0] == alone
        assert everyone[0] == everyone[1] != everyone[2] == everyone[3]
        scheduler.step()
    for shape, names, expected in MESHES.values():
        model, _ = routed(init_device_mesh("cpu", shape, mesh_dim_names=names))
        assert from_all(model._ltd_rewrite.state.rank) == expected
    for part, expected in (("dp", [0, 0, 1, 1]), ("tp", [0, 0, 0, 0])):
        assert from_all(routed(mesh[part])[0]._ltd_rewrite.state.rank) == expected


@on_ranks(2)
def test_a_mesh_that_does_not_tell_is_refused() -> None:
    for shape, names, message in (
        ((2, 1), None, "dimensions without names"),
        ((2,), ("model",), "'model' does not tell"),
        ((2, 1), ("dp", "ep"), "'ep' does not tell"),
    ):
        with pytest.raises(LTDError, match=message):
            routed(init_device_mesh("cpu", shape, mesh_dim_names=names))
    alone = dist.new_group([0])
    if dist.get_rank() == 0:
        routed(DeviceMesh.from_group(alone, "cpu"))
    first = DeviceMesh("cpu", [0])
    if dist.get_rank() == 1:
        with pytest.raises(LTDError, match="rank 1 is not in device_mesh"):
            routed(first)


@on_ranks(4)
def test_ranks_that_differ_are_refused_on_every_rank() -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(LTDError, match="ranks 0 and 3 differ in scheduler"):
        routed(mesh, total_steps=11 if rank == 3 else 10)
    with pytest.raises(LTDError, match="ranks 0 and 1 differ in seed: 0 and 1"):
        routed(mesh, seed=rank)
    for given in (mesh, None):
        model, scheduler = routed(given)
        ltd_fx.check_ranks(model)
        if rank != 2:
            scheduler.step()
        with pytest.raises(LTDError, match="ranks 0 and 2 differ in step: 1 and 0"):
            ltd_fx.check_ranks(model)
    model, scheduler = routed(None, seed=rank)
    model(torch.zeros(1, SEQ, 16))
    ltd_fx.check_ranks(model)
    if rank == 1:
        model(torch.zeros(1, SEQ, 16))
    with pytest.raises(LTDError, match="ranks 0 and 1 differ in forward: 1 and 2"):
        ltd_fx.check_ranks(model)


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
@on_ranks(2)
def test_a_rank_that_misses_a_step_goes_on_with_its_own_length_until_the_check(engine: str) -> None:
    """No gradient's shape depends on the length: these engines neither notice nor wait."""
    model, scheduler = routed(init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))
    run = DistributedDataParallel(model) if engine == "DDP" else fully_shard(model)
    for step in range(2):
        run(torch.ones(3, SEQ, 16)).sum().backward()
        if step or dist.get_rank() == 0:
            scheduler.step()
    assert from_all(scheduler.reserved_length) == [12, 10]
    with pytest.raises(LTDError, match="ranks 0 and 1 differ in step: 2 and 1"):
        ltd_fx.check_ranks(model)


class RowsOfAllRanks(nn.Module):
    """What a tensor-parallel layer does: a collective over tensors as long as the hidden states."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + all_reduce(hidden * 0.5, "sum", dist.group.WORLD)


@on_ranks(2)
def steps_missed_by_tensor_parallel_ranks() -> None:
    ltd_fx.register_pattern(RowsOfAllRanks, ltd_fx.LayerPattern("hidden"))
    model, scheduler = nn.Sequential(*(RowsOfAllRanks() for _ in range(3))).train(), LTDScheduler(8, SEQ, 10)
    ltd_fx.transform(model, scheduler, device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    model(torch.zeros(3, SEQ, 16))
    if dist.get_rank() == 0:
        scheduler.step()
    model(torch.zeros(3, SEQ, 16))


@pytest.mark.slow
def test_tensor_parallel_ranks_of_different_lengths_end_and_do_not_hang() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"the process died|[Gg]loo"):  # gloo ends the process
        steps_missed_by_tensor_parallel_ranks()


@on_ranks(2)
def test_one_ranks_saved_state_resumes_all() -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model, scheduler = routed(mesh)
    for _ in range(2):
        scheduler.step()
        drawn(model)
    states, expected = from_all(scheduler.state_dict()), drawn(model)
    assert states[0] == states[1]
    model, scheduler = routed(mesh)
    scheduler.load_state_dict(states[0])
    assert drawn(model) == expected
    with pytest.raises(LTDError, match="ranks 0 and 1 differ in step: 2 and 1"):
        scheduler.load_state_dict({**states[0], "step": 2 - dist.get_rank()})


def test_one_process_has_nothing_to_check() -> None:
    ltd_fx.check_ranks(routed()[0])
    with pytest.raises(LTDError, match="not transformed"):
        ltd_fx.check_ranks(encoder())


@on_ranks(2)
def test_a_mesh_costs_no_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, scheduler = routed(init_device_mesh("cpu", (2,)))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(12):
        compiled(torch.zeros(3, SEQ, 16))
        scheduler.step()
    assert counter.frame_count == 2


@on_ranks(2)
def failing(where: str) -> None:
    assert dist.get_rank() == 0, where
    dist.barrier()


def test_a_failing_rank_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1:(.|\n)*AssertionError: in the middle"):
        failing(where="in the middle")
