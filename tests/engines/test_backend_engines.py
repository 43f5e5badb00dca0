"""Models under ``ltd_fx.backend`` in HF's Trainer, DDP and FSDP2 by layers; what they save is the plain model's."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import test_ddp as test_ddp_
import test_fsdp
import test_huggingface
import torch
import torch.distributed as dist
from conftest import SEQ
from ranks import on_ranks
from test_ddp import encoder, llama
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.huggingface import LTDCallback


@pytest.mark.slow
@pytest.mark.parametrize("build", [encoder, llama])
@on_ranks(2)
def test_ddp(build: Any) -> None:
    """The gradients of one process that draws as each rank in turn, with ``transform``."""
    model, scheduler = build(), LTDScheduler(9, SEQ, 3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    backend = ltd_fx.backend(scheduler, inner="aot_eager", device_mesh=mesh)
    ddp = DistributedDataParallel(torch.compile(model, backend=backend, fullgraph=True))
    with torch._dynamo.config.patch(optimize_ddp=False):
        test_ddp_.assert_trains_as_expected(ddp, model, scheduler, build)
    assert {site.status for site in ltd_fx.summary(backend).sites if site.routed} == {"proven"}


@pytest.mark.slow
@on_ranks(2)
def test_the_parts_that_ddp_has_a_graph_split_into_are_refused() -> None:
    model, kibibyte = encoder(), 1 << 10
    run = torch.compile(model, backend=ltd_fx.backend(inner="aot_eager"))
    ddp = DistributedDataParallel(run, bucket_cap_mb=kibibyte / 2**20)
    with (
        mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", kibibyte),
        pytest.raises(LTDError, match="optimize_ddp"),
    ):
        ddp(test_ddp_.batch(model, 0, 0, 0))


@pytest.mark.slow
@on_ranks(2)
def test_fsdp2_by_layers() -> None:
    """Its hooks make each layer a graph, which all of them share."""
    model, scheduler = llama(), LTDScheduler(9, SEQ, 3)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    test_fsdp.shard(model, mesh=mesh)
    counter = CompileCounterWithBackend("aot_eager")
    backend = ltd_fx.backend(scheduler, inner=counter, device_mesh=mesh)
    test_fsdp.assert_trains_as_expected(model, scheduler, llama, run=torch.compile(model, backend=backend))
    assert {site.status for site in ltd_fx.summary(backend).sites if site.routed} == {"proven"}


# Names that accelerate knows, and torch has no backends of.
FREE = iter(("nvprims_nvfuser", "aot_ts_nvfuser", "fx2trt"))


def compiled_trainer(folder: Path, scheduler: LTDScheduler, *, by_name: bool = False) -> Any:
    """``test_huggingface``'s, with a model that is compiled rather than transformed."""
    backend, options = ltd_fx.backend(scheduler, inner="aot_eager"), {}
    if by_name:
        options = {"torch_compile_backend": next(FREE)}
        torch._dynamo.register_backend(backend, name=options["torch_compile_backend"])
    trainer = test_huggingface.trainer_of(folder, **options)
    ltd_fx.restore(trainer.model)
    if not by_name:
        trainer.model.compile(backend=backend)
    for kind in (LTDCallback, test_huggingface.Watch):
        trainer.remove_callback(kind)
    trainer.add_callback(LTDCallback(scheduler))
    trainer.lr_scheduler._scheduler = scheduler
    return trainer


@pytest.mark.slow
@pytest.mark.compat("transformers")
@pytest.mark.parametrize("by_name", [False, True])
def test_trainer(by_name: bool, tmp_path: Path) -> None:
    """The losses of the transformed model, to rounding; what is saved is the plain model's, and resumes."""
    transformed = test_huggingface.trainer_of(tmp_path / "transformed")
    transformed.train()
    scheduler, again = test_huggingface.scheduler_of(), test_huggingface.scheduler_of()
    trainer = compiled_trainer(tmp_path / "compiled", scheduler, by_name=by_name)
    trainer.train()
    ours, theirs = test_huggingface.losses(trainer), test_huggingface.losses(transformed)
    assert list(ours) == list(theirs)
    assert ours == pytest.approx(theirs, rel=1e-4)
    for key in ("ltd_reserved_length", "ltd_layer_tokens", "ltd_saved"):
        assert test_huggingface.losses(trainer, key) == test_huggingface.losses(transformed, key)
    trainer.model.save_pretrained(tmp_path / "saved")
    plain = type(trainer.model)(trainer.model.config)
    plain.load_state_dict(trainer.model.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    files = [(tmp_path / which / "model.safetensors").read_bytes() for which in ("saved", "plain")]
    assert files[0] == files[1]
    resumed = compiled_trainer(tmp_path / "resumed", again, by_name=by_name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "compiled" / "checkpoint-4"))
    assert test_huggingface.losses(resumed) == ours
