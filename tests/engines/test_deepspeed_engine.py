"""DeepSpeed's engine on the CPU, with every ZeRO stage: gradients as of one process, and a resumed run."""

import itertools
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import SEQ, checkpoint_layers, loss_of
from ranks import on_ranks
from test_ddp import FORWARDS, batch, expected, llama
from torch.distributed.device_mesh import init_device_mesh

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="without the package deepspeed"),
]


def deepspeed() -> Any:
    """The package, for the CPU, and without the shared-memory operator that it would compile for minutes."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


class Run:
    def __init__(self, stage: int, lr: float, checkpoint: bool = False, compiled: bool = False) -> None:
        self.scheduler = LTDScheduler(9, SEQ, 3)
        model = llama()
        if checkpoint:
            checkpoint_layers(model, use_reentrant=False)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
        ltd_fx.transform(model, self.scheduler, device_mesh=mesh)
        if compiled:
            ltd_fx.compile_layers(model, backend="aot_eager")
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": FORWARDS,
            "optimizer": {"type": "AdamW", "params": {"lr": lr, "torch_adam": True}},
            # or small parameters, as all of these are, would be whole on every rank
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        }
        self.engine, *_ = deepspeed().initialize(model=model, model_parameters=model.parameters(), config=config)

    def step(self, number: int) -> tuple[list[float], dict[str, Any]]:
        """Losses, and the accumulated gradients, of which DeepSpeed takes the mean."""
        from deepspeed.utils import safe_get_full_grad

        losses, gradients = [], {}
        for forward in range(FORWARDS):
            boundary = self.engine.is_gradient_accumulation_boundary()
            assert boundary == (forward == FORWARDS - 1)
            loss = loss_of(self.engine(batch(self.engine, dist.get_rank(), number, forward)))
            self.engine.backward(loss)
            losses.append(loss.item())
            if boundary:
                for name, p in self.engine.module.named_parameters():
                    gradients[name] = safe_get_full_grad(p) * FORWARDS
            self.engine.step()
            if boundary:
                self.scheduler.step()
        return losses, gradients


@on_ranks(2, seconds=900)
def test_every_zero_stage(tmp_path: Path) -> None:
    for stage in range(4):  # of one process group: DeepSpeed keeps the first
        for checkpoint, compiled in itertools.product((False, True), repeat=2):
            run = Run(stage, 0.0, checkpoint, compiled)
            for number, gradients in enumerate(expected(llama, 2)):
                for name, value in run.step(number)[1].items():
                    torch.testing.assert_close(value, gradients[name], rtol=1e-4, atol=1e-5)
        assert_resumes(stage, tmp_path / str(stage))
        assert_saves_clean_weights(stage, tmp_path / f"{stage}.{dist.get_rank()}.safetensors")


def assert_resumes(stage: int, path: Path) -> None:
    whole, first, second = (Run(stage, 0.01) for _ in range(3))
    losses = [whole.step(number)[0] for number in range(3)]
    assert first.step(0)[0] == losses[0]
    first.engine.save_checkpoint(path, client_state={"ltd": first.scheduler.state_dict()})
    _, state = second.engine.load_checkpoint(path)
    second.scheduler.load_state_dict(state["ltd"])
    assert [second.step(number)[0] for number in (1, 2)] == losses[1:]


def assert_saves_clean_weights(stage: int, path: Path) -> None:
    engine, other = Run(stage, 0.0).engine, Run(stage, 0.0).engine
    whole = deepspeed().zero.GatheredParameters
    with whole(engine.module.parameters()):
        ltd_fx.save_clean(engine, path)
    if stage == 3:
        for refused in (ltd_fx.save_clean, ltd_fx.load_clean):
            with pytest.raises(LTDError, match="weight is partitioned by DeepSpeed's ZeRO-3"):
                refused(engine, path)
    with whole(other.module.parameters(), modifier_rank=0):
        for p in other.module.parameters():
            torch.nn.init.zeros_(p)
        ltd_fx.load_clean(other, path)
    plain = llama()
    with whole(other.module.parameters()):
        for name, value in plain.state_dict().items():
            assert torch.equal(other.module.state_dict()[name], value)
    torch.nn.init.zeros_(plain.lm_head.weight)
    ltd_fx.load_clean(plain, path)
    assert torch.equal(plain.lm_head.weight, llama().lm_head.weight)
