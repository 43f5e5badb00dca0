"""A real Lightning ``Trainer``: stepping, logs, checkpoints, validation."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt2
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LayerTokenLR, LTDError, LTDScheduler

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from ltd_fx.lightning import LTDCallback  # noqa: E402

SEQ, STEPS, BATCH = 32, 6, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*litlogger", "ignore:.*already exists")


class Texts:
    """Eight batches an epoch; resumable within it."""

    def __init__(self, seed: int = 0) -> None:
        self.ids = torch.randint(0, 64, (8, BATCH, SEQ), generator=torch.Generator().manual_seed(seed))
        self.next = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Tensor]:
        while self.next < len(self.ids):
            self.next += 1
            yield self.ids[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Language(lightning.LightningModule):
    """A GPT-2 and what was seen of it: loss, learning rate and draws of each batch."""

    def __init__(self, scheduler: LTDScheduler | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = gpt2()
        self.scheduler = scheduler
        self.seen: list[Any] = []
        if scheduler is not None:
            ltd_fx.transform(self.model, scheduler)

    def training_step(self, ids: Tensor, i: int) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        draws = {name: kept.tolist() for name, kept in ltd_fx.sampled_indices(self.model).items()}
        self.seen.append((loss.item(), self.trainer.optimizers[0].param_groups[0]["lr"], draws))
        return loss

    def validation_step(self, ids: Tensor, i: int) -> None:
        self.log("loss", self.model(input_ids=ids, labels=ids).loss)

    def configure_optimizers(self) -> Any:
        adam = torch.optim.AdamW(self.parameters(), lr=0.01)
        total = 12 * SEQ * 4 * 2 * BATCH
        lr = LayerTokenLR(adam, self.scheduler, total_layer_tokens=total, warmup_layer_tokens=total // 10)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": lr, "interval": "step"}}


class Generator(Language):
    """Manual optimization: an optimizer of something else, two of the model, one step in two batches."""

    def __init__(self, scheduler: LTDScheduler) -> None:
        super().__init__(scheduler)
        self.automatic_optimization = False
        self.critic = nn.Linear(1, 1)

    def training_step(self, ids: Tensor, i: int) -> Tensor:
        loss = super().training_step(ids, i)
        self.manual_backward(loss + self.critic(loss[None]).sum())
        critic, matrices, vectors = self.optimizers()
        critic.step()
        if i % 2:
            matrices.step()
            vectors.step()
            matrices.zero_grad()
            vectors.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        split = [[p for p in self.model.parameters() if (p.ndim == 2) == matrix] for matrix in (True, False)]
        return [torch.optim.AdamW(p, lr=0.01) for p in (self.critic.parameters(), *split)]


def scheduler_of(**options: Any) -> LTDScheduler:
    return LTDScheduler(
        **{"min_length": 8, "max_length": SEQ, "total_steps": 10, "global_batch_size": 2 * BATCH, **options}
    )


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Any:
    arguments = {"max_steps": STEPS, "accumulate_grad_batches": 2, "val_check_interval": 4, **options}
    return lightning.Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, "", ""),
        callbacks=[LTDCallback(), *callbacks],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def logged(folder: Path, name: str) -> list[float]:
    with open(folder / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run without interruption, and the folder with its logs and checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    module = Language(scheduler_of())
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer_of(folder, save).fit(module, Texts(), Texts(1))
    return module, folder


@pytest.mark.compat("lightning")
def test_a_step_an_optimizer_step(whole: Any) -> None:
    """Two batches a step: same length, other tokens; the learning rate follows."""
    module, folder = whole
    scheduler = module.scheduler
    lengths = [scheduler.length_at(step) for step in range(STEPS)]
    assert [len(draws["transformer.h.1"][0]) for _, _, draws in module.seen] == [n for n in lengths for _ in range(2)]
    assert module.seen[0][2] != module.seen[1][2]
    assert logged(folder, "ltd_reserved_length") == lengths
    consumed = [2 * BATCH * (2 * sum(lengths[: step + 1]) + 2 * SEQ * (step + 1)) for step in range(STEPS)]
    assert logged(folder, "ltd_layer_tokens") == consumed
    saved = [1 - tokens / (2 * BATCH * 4 * SEQ * (step + 1)) for step, tokens in enumerate(consumed)]
    assert logged(folder, "ltd_saved") == pytest.approx(saved)
    ratio_at = module.trainer.lr_scheduler_configs[0].scheduler.ratio_at
    assert [lr for _, lr, _ in module.seen[::2]] == [0.01 * ratio_at(tokens) for tokens in [0, *consumed[:-1]]]


@pytest.mark.compat("lightning")
@pytest.mark.parametrize("step", [2, 4], ids=["in an epoch", "between epochs"])
def test_resumed_is_uninterrupted(whole: Any, step: int, tmp_path: Path) -> None:
    """Loss, weights, draws and learning rate, to the bit."""
    expected, folder = whole
    module = Language(scheduler_of())
    trainer_of(tmp_path).fit(module, Texts(), Texts(1), ckpt_path=folder / f"step={step}.ckpt")
    assert module.seen == expected.seen[2 * step :]
    assert logged(tmp_path, "ltd_layer_tokens") == logged(folder, "ltd_layer_tokens")[step:]
    ours, theirs = module.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Tuned(Language):
    """With a batch size for the tuner."""

    def __init__(self, scheduler: LTDScheduler) -> None:
        super().__init__(scheduler)
        self.batch_size = BATCH
        self.lr = 0.01

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Texts().ids.flatten(0, 1), self.batch_size)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@pytest.mark.parametrize("tune", ["scale_batch_size", "lr_find"])
@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "after a fit"])
def test_the_tuners_trials_leave_the_schedule_and_the_draws(tune: str, again: bool, tmp_path: Path) -> None:
    from lightning.pytorch.tuner import Tuner

    module = Tuned(scheduler_of())
    options = {"default_root_dir": tmp_path, "accumulate_grad_batches": 1, "val_check_interval": None}
    trainer = trainer_of(tmp_path, **options)
    module.scheduler.set_step(3)
    module.model(input_ids=Texts().ids[0])
    if again:
        trainer.fit(module)
        callback, trainer = trainer.callbacks[0], trainer_of(tmp_path, **options)
        trainer.callbacks[0] = callback
    before, seen = module.scheduler.state_dict(), len(module.seen)
    limits = {"max_trials": 2, "steps_per_trial": 2} if tune == "scale_batch_size" else {"num_training": 3}
    getattr(Tuner(trainer), tune)(module, **limits)
    assert len(module.seen) > seen  # there were trials
    assert module.scheduler.state_dict() == before
    module.scheduler.set_step(5)
    trainer.fit(module)
    assert module.scheduler.state_dict()["step"] == 5 + STEPS


def test_validation_is_dense(whole: Any, tmp_path: Path) -> None:
    """The loss found in the middle of training is that of the checkpoint in a plain module."""
    _, folder = whole
    plain = Language.load_from_checkpoint(folder / "step=4.ckpt", weights_only=True)
    assert not ltd_fx.is_transformed(plain)
    (found,) = trainer_of(tmp_path).validate(plain, Texts(1), verbose=False)
    assert found["loss"] == pytest.approx(logged(folder, "loss")[1], abs=0)


def test_manual_optimization(tmp_path: Path) -> None:
    """Twelve batches, twelve steps of the first optimizer, six of each of the model's."""
    module = Generator(scheduler_of())
    trainer = trainer_of(tmp_path, max_steps=24, accumulate_grad_batches=1)
    trainer.fit(module, Texts(), Texts(1))
    assert trainer.global_step == 24
    lengths = [module.scheduler.length_at(step) for step in range(STEPS)]
    assert [len(draws["transformer.h.1"][0]) for _, _, draws in module.seen] == [n for n in lengths for _ in range(2)]
    assert list(dict.fromkeys(logged(tmp_path, "ltd_reserved_length"))) == lengths  # repeated where no step is taken


def without_ltd(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as if saved without the callback."""
    state = torch.load(checkpoint, weights_only=True)
    del state["callbacks"]["LTDCallback"]
    torch.save(state, folder / "without.ckpt")
    return folder / "without.ckpt"


def test_a_checkpoint_saved_without_the_callback(whole: Any, tmp_path: Path) -> None:
    expected, folder = whole
    module = Language(scheduler_of())
    with pytest.warns(UserWarning, match="saved without this callback; the schedule goes on from step 2"):
        trainer_of(tmp_path).fit(module, Texts(), Texts(1), ckpt_path=without_ltd(folder / "step=2.ckpt", tmp_path))
    assert module.seen == expected.seen[4:]


def test_a_checkpoint_without_the_callback_of_several_optimizers(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, "last", every_n_train_steps=4)
    trainer_of(tmp_path, save, max_steps=4, accumulate_grad_batches=1).fit(Generator(scheduler_of()), Texts(), Texts(1))
    trainer = trainer_of(tmp_path, max_steps=24, accumulate_grad_batches=1)
    with pytest.raises(LTDError, match="its global_step counts 3 optimizers"):
        trainer.fit(Generator(scheduler_of()), Texts(), ckpt_path=without_ltd(tmp_path / "last.ckpt", tmp_path))


def test_refusals(whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = whole

    def fit(module: Language, **options: Any) -> None:
        trainer_of(tmp_path, num_sanity_val_steps=0).fit(module, Texts(), **options)

    with pytest.raises(LTDError, match="total_steps=10, this scheduler total_steps=11"):
        fit(Language(scheduler_of(total_steps=11)), ckpt_path=folder / "step=2.ckpt")
    module = Language(scheduler_of())
    adam = torch.optim.AdamW(module.model.parameters())
    lr = LayerTokenLR(adam, module.scheduler, total_layer_tokens=1000)
    monkeypatch.setattr(module, "configure_optimizers", lambda: {"optimizer": adam, "lr_scheduler": lr})
    with pytest.raises(LTDError, match="LayerTokenLR changes at every step, but has the interval 'epoch'"):
        fit(module)
    monkeypatch.setattr(module, "configure_optimizers", lambda: adam)
    ltd_fx.transform(ltd_fx.restore(module.model))
    with pytest.raises(LTDError, match="pass an LTDScheduler to transform"):
        fit(module)
    ltd_fx.restore(module.model)
    with pytest.raises(LTDError, match="not transformed"):
        fit(module)
    module = Generator(scheduler_of())
    others = [torch.optim.SGD([p]) for p in module.critic.parameters()]
    monkeypatch.setattr(module, "configure_optimizers", lambda: others)
    with pytest.raises(LTDError, match="no optimizer holds parameters of the transformed model"):
        trainer_of(tmp_path, accumulate_grad_batches=1).fit(module, Texts())
