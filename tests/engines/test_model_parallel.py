"""Tensor parallelism and pipelines: the same gradients as in one process, with the same draws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEQ, assert_same, checkpoint_layers, loss_of
from ranks import on_ranks
from test_ddp import batch, both_encoders, encoder, llama
from test_fsdp import full
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from toy import Encoder, Rows

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

PLAN = {
    **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    **{f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
    "mlp.down_proj": RowwiseParallel(),
}
ROWS_PLAN = {**{name: ColwiseParallel() for name in "qkv"}, "out": RowwiseParallel()}


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        parallelize_module(layer, mesh, PLAN)
    return model


def gradients(model: nn.Module, run: Any = None) -> list[dict[str, Tensor]]:
    run, scheduler, steps = model if run is None else run, model._ltd_rewrite.state.scheduler, []
    for step in range(2):
        for forward in range(2):
            loss_of(run(batch(model, step, forward))).backward()
        steps.append({name: full(p.grad) for name, p in model.named_parameters()})
        model.zero_grad()
        scheduler.step()
    return steps


@pytest.mark.parametrize("checkpoint", [None, pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("order", ["before", "after"])
@on_ranks(2)
def test_tensor_parallel(order: str, checkpoint: bool | None) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    expected = gradients(ltd_fx.transform(llama(), LTDScheduler(9, SEQ, 3)))
    model = llama()
    if checkpoint is not None:
        checkpoint_layers(model, use_reentrant=checkpoint)
    if order == "before":
        tensor_parallel(model, mesh)
    ltd_fx.transform(model, LTDScheduler(9, SEQ, 3), device_mesh=mesh)
    if order == "after":
        tensor_parallel(model, mesh)
    assert_same(gradients(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
@on_ranks(2)
def test_tensor_parallel_compiled_on_rows(checkpoint: bool) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model, blocks = Encoder().train(), [Rows() for _ in range(3)]
    model.blocks = nn.ModuleList(checkpoint_wrapper(block) if checkpoint else block for block in blocks)
    ltd_fx.transform(model, LTDScheduler(9, SEQ, 3), device_mesh=mesh)
    expected = gradients(model)
    model._ltd_rewrite.state.scheduler.set_step(0)
    for block in blocks:
        parallelize_module(block, mesh, ROWS_PLAN)
    ltd_fx.compile_layers(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model), expected)


@on_ranks(2)
def test_torch_cannot_compile_a_tensor_parallel_linear_at_a_symbolic_length() -> None:
    """Without ltd_fx. Once this fails, tensor parallel models of any layers compile: correct docs/stacks.md."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    linear = parallelize_module(nn.Linear(16, 32), mesh, ColwiseParallel())
    hidden = torch.randn(2, 9, 16, requires_grad=True)
    torch._dynamo.mark_dynamic(hidden, 1)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="RecursionError"):
        torch.compile(linear, backend="aot_eager", fullgraph=True)(hidden)


def pipelined(stage: nn.Module, schedule: Any, microbatches: int) -> Any:
    example = torch.zeros(2, SEQ, 16, requires_grad=True)
    place = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    stage = PipelineStage(stage, *place, input_args=(example,), output_args=(example,))
    return schedule(stage, microbatches, loss_fn=lambda output, target: loss_of(output - target))


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda stage: stage,
    "whole": lambda stage: torch.compile(stage, backend="aot_eager", fullgraph=True),
    "by layers": lambda stage: ltd_fx.compile_layers(stage, backend="aot_eager"),
}


@pytest.mark.parametrize("schedule", [Schedule1F1B, pytest.param(ScheduleGPipe, marks=pytest.mark.slow)])
@both_encoders
@pytest.mark.parametrize(
    "compiled", ["plain", *(pytest.param(f, marks=pytest.mark.slow) for f in ("by layers", "whole"))]
)
@on_ranks(2)
def test_pipeline_stages(schedule: Any, compiled: str, build: Callable[[], nn.Module]) -> None:
    """Each stage is transformed by itself; every microbatch is a forward, and draws anew."""
    rank, microbatches = dist.get_rank(), 4
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    alone = [encoder(), encoder()]
    for number, theirs in enumerate(alone):
        for p in theirs.parameters():
            p.data += number / 100  # a stage of its own
        ltd_fx.transform(theirs, LTDScheduler(9, SEQ, 3))
        theirs._ltd_rewrite.state.rank = number
        theirs._ltd_rewrite.state.begin_step(0)
    model, scheduler = build(), LTDScheduler(9, SEQ, 3)
    for p in model.parameters():
        p.data += rank / 100
    ltd_fx.transform(model, scheduler, device_mesh=mesh)
    pipeline = pipelined(FORMS[compiled](model), schedule, microbatches)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        hidden, target = torch.randn(2, 2 * microbatches, SEQ, 16, generator=generator)
        pipeline.step(*([hidden] if rank == 0 else []), **({"target": target} if rank == 1 else {}))
        for x, y in zip(hidden.split(2), target.split(2), strict=True):
            (loss_of(alone[1](alone[0](x)) - y) / microbatches).backward()
        for ours, expected in zip(model.parameters(), alone[rank].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5)
        for part in (model, *alone):
            part.zero_grad()
            part._ltd_rewrite.state.scheduler.step()
        ltd_fx.check_ranks(model)


@on_ranks(2)
def test_a_stage_that_misses_a_step_goes_on_with_its_own_length_until_the_check() -> None:
    rank, model, scheduler = dist.get_rank(), encoder(), LTDScheduler(9, SEQ, 3)
    ltd_fx.transform(model, scheduler, device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("pp",)))
    pipeline, hidden = pipelined(model, Schedule1F1B, 2), torch.ones(4, SEQ, 16)
    for step in range(2):
        pipeline.step(*([hidden] if rank == 0 else []), **({"target": hidden} if rank == 1 else {}))
        if step or rank == 0:
            scheduler.step()
    assert [kept.shape[1] for kept in ltd_fx.sampled_indices(model).values()] == [9 if rank else 27]
    with pytest.raises(LTDError, match="ranks 0 and 1 differ in step: 2 and 1"):
        ltd_fx.check_ranks(model)
