"""A loop of timm's parts: optimizer, learning rate, mixup, EMA, checkpoint saver."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from program import added_lines, without_added
from torch import Tensor

import ltd_fx

# RuntimeError: a torchvision that does not fit the installed torch
timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
from timm import data, loss, models, optim, scheduler, utils  # noqa: E402

pytestmark = pytest.mark.slow

EPOCHS, BATCHES, SIZE, TOKENS, CLASSES = 4, 6, 16, 17, 4


class Trained(NamedTuple):
    model: Any
    ema: Any
    losses: list[float]


def make() -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": CLASSES}
    return timm.create_model("vit_tiny_patch16_224", **sizes, drop_path_rate=0.1, proj_drop_rate=0.1)


def images(epoch: int) -> list[tuple[Tensor, Tensor]]:
    """Each class a pattern of its own, under noise."""
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + epoch)
    labels = torch.randint(CLASSES, (BATCHES, 8), generator=generator)
    return [(patterns[row] + torch.randn(8, 3, SIZE, SIZE, generator=generator), row) for row in labels]


def program(model: Any, folder: Path, resume: Path | None = None) -> Trained:
    import ltd_fx  # added

    schedule = ltd_fx.LTDScheduler(5, TOKENS, 18)  # added
    ltd_fx.transform(model, schedule, protect=1)  # added
    optimizer = optim.create_optimizer_v2(model, "adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.9)
    lr, _ = scheduler.create_scheduler_v2(
        optimizer, "cosine", num_epochs=EPOCHS, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=BATCHES
    )
    ema = utils.ModelEmaV3(model, decay=0.9)
    mixup = data.Mixup(mixup_alpha=0.1, num_classes=CLASSES)
    criterion = loss.SoftTargetCrossEntropy()
    folder.mkdir(exist_ok=True)
    saver = utils.CheckpointSaver(
        model, optimizer, argparse.Namespace(model="vit"), ema, checkpoint_dir=folder, recovery_dir=folder
    )
    first = models.resume_checkpoint(model, resume, optimizer) if resume else 0
    if resume:
        models.load_checkpoint(ema.module, resume, use_ema=True)
    losses = []
    for epoch in range(first, EPOCHS):
        utils.random_seed(epoch)
        model.train()
        for i, (pixels, labels) in enumerate(images(epoch)):
            step = epoch * BATCHES + i
            lr.step_update(step)
            schedule.set_step(step)  # added
            pixels, targets = mixup(pixels, labels)
            value = criterion(model(pixels), targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            ema.update(model, step=step)
            losses.append(value.item())
        saver.save_checkpoint(epoch, metric=-losses[-1])
    return Trained(model, ema, losses)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(-1)[0][0])


def test_timm(tmp_path: Path) -> None:
    plain = without_added(program)
    assert len(added_lines(program)) <= 3
    routed = program(make(), tmp_path / "routed")
    assert sum(routed.losses[-4:]) < 0.9 * sum(routed.losses[:4])
    assert len(ltd_fx.sampled_indices(routed.model)) == 2
    dense = plain(make(), tmp_path / "plain")
    assert not ltd_fx.is_transformed(dense.model)
    assert dense.losses != routed.losses

    for part, use_ema in ((routed.model, False), (routed.ema.module, True)):
        loaded = make()
        models.load_checkpoint(loaded, tmp_path / "routed" / "last.pth.tar", use_ema=use_ema)
        assert torch.equal(logits(loaded), logits(part))

    resumed = program(make(), tmp_path / "resumed", tmp_path / "routed" / "checkpoint-1.pth.tar")
    assert resumed.losses == routed.losses[2 * BATCHES :]
    for ours, theirs in ((resumed.model, routed.model), (resumed.ema.module, routed.ema.module)):
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
