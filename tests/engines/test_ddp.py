"""DistributedDataParallel: gradients are those of one process that averages the ranks' losses, with the same draws."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEQ, checkpoint_layers, decoder, loss_of
from ranks import on_ranks
from test_checkpointing import wrap
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from toy import Encoder

import ltd_fx
from ltd_fx import LTDScheduler

STEPS, FORWARDS = 2, 2


def llama() -> nn.Module:
    torch.manual_seed(0)
    model = decoder("Llama", num_hidden_layers=3)().train()
    model.config.use_cache = False
    return model


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return Encoder().train()


def checkpointed_encoder() -> nn.Module:
    return wrap(encoder())


# above a test: also of checkpointed layers, where slow tests are run
both_encoders = pytest.mark.parametrize("build", [encoder, pytest.param(checkpointed_encoder, marks=pytest.mark.slow)])


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return ltd_fx.clean_state_dict(dict(model.named_parameters()))


def batch(model: nn.Module, *seeds: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash(seeds))
    if isinstance(model, Encoder):
        return torch.randn(2, SEQ, 16, generator=generator).to(next(model.parameters()).dtype)
    return torch.randint(0, 64, (2, SEQ), generator=generator)


def expected(build: Callable[[], nn.Module], world: int) -> list[dict[str, Tensor]]:
    """The gradients of each step, of one process that draws as each rank in turn."""
    models = [ltd_fx.transform(build(), LTDScheduler(9, SEQ, 3)) for _ in range(world)]
    for rank, model in enumerate(models):
        model._ltd_rewrite.state.rank = rank
        model._ltd_rewrite.state.begin_step(0)
    steps = []
    for step in range(STEPS):
        total: dict[str, Tensor] = {}
        for rank, model in enumerate(models):
            for forward in range(FORWARDS):
                model.zero_grad()
                loss_of(model(batch(model, rank, step, forward))).backward()
                for name, p in model.named_parameters():
                    total[name] = total.get(name, 0) + p.grad.float() / world
            model._ltd_rewrite.state.scheduler.step()
        steps.append(total)
    return steps


def assert_trains_as_expected(
    run: Any, model: nn.Module, scheduler: LTDScheduler, build: Callable[[], nn.Module], sync: bool = False
) -> None:
    """``run`` is the wrapped, perhaps compiled model; ``sync`` in every backward, not in the last of each step only."""
    rank, ddp = dist.get_rank(), getattr(run, "_orig_mod", run)
    for step, gradients in enumerate(expected(build, dist.get_world_size())):
        with nullcontext() if sync else ddp.no_sync():
            loss_of(run(batch(model, rank, step, 0))).backward()
        loss_of(run(batch(model, rank, step, 1))).backward()
        for name, p in parameters(model).items():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5)
        model.zero_grad()
        scheduler.step()


def routed(model: nn.Module) -> tuple[nn.Module, LTDScheduler]:
    scheduler = LTDScheduler(9, SEQ, 3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    return ltd_fx.transform(model, scheduler, device_mesh=mesh), scheduler


@pytest.mark.parametrize("static_graph", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpoint", [None, *(pytest.param(c, marks=pytest.mark.slow) for c in (False, True))])
@on_ranks(2)
def test_ddp(checkpoint: bool | None, static_graph: bool) -> None:
    model = llama()
    if checkpoint is not None:
        checkpoint_layers(model, use_reentrant=checkpoint)
    _, scheduler = routed(model)
    ddp = DistributedDataParallel(model, static_graph=static_graph)
    # with static_graph, torch 2.14's DDP asserts where its first backward is within no_sync
    assert_trains_as_expected(ddp, model, scheduler, llama, sync=static_graph)
    for name, value in ltd_fx.clean_state_dict(ddp).items():
        assert torch.equal(value, model.state_dict()[name])


@on_ranks(2)
def test_transform_after_ddp() -> None:
    model = llama()
    ddp = DistributedDataParallel(model)
    _, scheduler = routed(ddp)
    assert_trains_as_expected(ddp, model, scheduler, llama)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["layers", "inside", "outside"])
@pytest.mark.parametrize("static_graph", [False, True])
@both_encoders
@on_ranks(2)
def test_ddp_compiled(build: Callable[[], nn.Module], static_graph: bool, where: str) -> None:
    model, scheduler = routed(build())
    if where == "layers":
        ltd_fx.compile_layers(model, backend="aot_eager")
    inside = torch.compile(model, backend="aot_eager", fullgraph=True) if where == "inside" else model
    ddp = DistributedDataParallel(inside, static_graph=static_graph)
    run = torch.compile(ddp, backend="aot_eager") if where == "outside" else ddp
    assert_trains_as_expected(run, model, scheduler, encoder, sync=static_graph)
