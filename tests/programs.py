"""Training programs that processes of their own run, and that may be killed: each saves, resumes from its newest whole
checkpoint, and reports every step as it is taken."""

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy import PATTERN, Block, Net

import ltd_fx
from ltd_fx import LayerTokenLR, LTDScheduler

STEPS, SEQ = 8, 16
Report = Callable[..., None]  # (step, name=value, ...)


def plain(folder: Path, report: Report) -> None:
    """One file, replaced as a whole."""
    path = folder / "checkpoint.pt"
    parts = build()

    def save(step: int) -> None:
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "new.pt")
        os.replace(folder / "new.pt", path)

    if path.exists():
        saved = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    train(parts, report, save, 0)


def fsdp(folder: Path, report: Report) -> None:
    """A folder a checkpoint, whole once ``torch.distributed.checkpoint`` has written its metadata."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    parts = build(mesh)

    def state() -> dict[str, Any]:
        model, adam = get_state_dict(parts["model"], parts["adam"])
        return {"model": model, "adam": adam, "scheduler": parts["scheduler"], "lr": parts["lr"]}

    def save(step: int) -> None:
        dcp.save(state(), checkpoint_id=folder / str(step))

    whole = sorted(int(path.parent.name) for path in folder.glob("*/.metadata"))
    if whole:
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder / str(whole[-1]))
        set_state_dict(parts["model"], parts["adam"], model_state_dict=loaded["model"], optim_state_dict=loaded["adam"])
    train(parts, report, save, dist.get_rank())


def build(mesh: Any = None) -> dict[str, Any]:
    torch.manual_seed(0)
    ltd_fx.register_pattern(Block, PATTERN)
    model, scheduler = Net().train(), LTDScheduler(3, SEQ, STEPS - 2, global_batch_size=4)
    ltd_fx.transform(model, scheduler, device_mesh=mesh)
    if mesh is not None:
        for layer in model.blocks:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    total = scheduler.total_layer_tokens(STEPS)
    lr = LayerTokenLR(adam, scheduler, total_layer_tokens=total, warmup_layer_tokens=total // 5)
    return {"model": model, "adam": adam, "scheduler": scheduler, "lr": lr}


def train(parts: dict[str, Any], report: Report, save: Callable[[int], None], rank: int) -> None:
    """Two forwards a step, and a checkpoint after each."""
    model, adam, scheduler, lr = parts.values()
    for step in range(scheduler.state_dict()["step"], STEPS):
        losses = []
        for forward in range(2):
            generator = torch.Generator().manual_seed(100 * step + 10 * forward + rank)
            loss = model(torch.randn(2, SEQ, 8, generator=generator)).square().mean()
            loss.backward()
            losses.append(loss.item())
        report(step, losses=losses, draws=kept(model), rate=adam.param_groups[0]["lr"])
        adam.step()
        adam.zero_grad()
        scheduler.step()
        lr.step()
        save(step + 1)
    report(STEPS, weights=digests(model.named_parameters()))


def trainer(folder: Path, report: Report, **options: Any) -> None:
    """transformers' ``Trainer``. A kill may leave its newest folder half written: without ``trainer_state.json``."""
    import transformers
    from conftest import gpt2

    from ltd_fx.huggingface import LTDCallback

    class ByLayerTokens(transformers.Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            total = scheduler.total_layer_tokens(num_training_steps)
            self.lr_scheduler = LayerTokenLR(optimizer or self.optimizer, scheduler, total_layer_tokens=total)
            return self.lr_scheduler

    class Reporter(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rate = kwargs["optimizer"].param_groups[0]["lr"]
            report(state.global_step, draws=kept(kwargs["model"]), rate=rate)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if "loss" in kwargs["logs"]:
                report(state.global_step - 1, log=kwargs["logs"])

    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, max_steps=STEPS, save_steps=1, logging_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=3, learning_rate=0.01, report_to="none",
        disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    world = arguments.world_size
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",)) if world > 1 else None
    torch.manual_seed(0)
    scheduler = LTDScheduler(8, 2 * SEQ, STEPS - 2, global_batch_size=4 * world)
    ids = torch.randint(0, 64, (24, 2 * SEQ), generator=torch.Generator().manual_seed(0))
    texts: Any = [{"input_ids": row, "labels": row} for row in ids]
    model = ltd_fx.transform(gpt2(), scheduler, device_mesh=mesh)
    callbacks = [LTDCallback(), Reporter()]
    run = ByLayerTokens(model, arguments, train_dataset=texts, eval_dataset=texts[:4], callbacks=callbacks)
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    newest = max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    run.train(resume_from_checkpoint=None if newest is None else str(newest))
    report(STEPS, weights=digests(run.model.named_parameters()))


def trainer_compiled(folder: Path, report: Report) -> None:
    trainer(folder, report, torch_compile=True, torch_compile_backend="aot_eager")


def trainer_ddp(folder: Path, report: Report) -> None:
    """In the environment in which ``torchrun`` starts a script."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}  # asked for, though the group is there already
    trainer(folder, report)


def saving(folder: Path, report: Report) -> None:
    """Kills processes in the middle of ``save_clean``."""
    draw = random.Random(0)
    for suffix in (".pt", ".safetensors"):
        path = folder / f"model{suffix}"
        ltd_fx.save_clean(numbered(0), path)
        start = time.monotonic()
        ltd_fx.save_clean(numbered(0), path)
        seconds = time.monotonic() - start
        unfinished: list[Path] = []
        while len(unfinished) < 3:  # so often was it killed in the middle
            child = os.fork()  # of a process without threads
            if child == 0:
                for number in range(100_000):
                    ltd_fx.save_clean(numbered(number), path)
                os._exit(1)
            time.sleep(draw.uniform(0, 2 * seconds))
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            model = numbered(-1)
            ltd_fx.load_clean(model, path)
            assert len({value.item() for p in model.parameters() for value in p.unique()}) == 1, "of two models"
            unfinished = [file for file in folder.iterdir() if file != path]
        assert all(file.name.startswith(".") for file in unfinished)
        ltd_fx.save_clean(numbered(-2), path)
        ltd_fx.load_clean(model, path)
        assert next(model.parameters())[0, 0] == -2
        for file in unfinished:
            file.unlink()
        path.unlink()
        report(0, **{suffix: "survived"})


def numbered(value: int) -> nn.Module:
    """300 KB of one number."""
    model = nn.Sequential(nn.Linear(200, 200), nn.Linear(200, 200))
    for p in model.parameters():
        nn.init.constant_(p, value)
    return model


def kept(model: nn.Module) -> dict[str, Any]:
    return {name: indices.tolist() for name, indices in ltd_fx.sampled_indices(model).items()}


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors}
    return {name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in local.items()}
