"""litgpt's ``GPT`` in a ``LightningModule``."""

from pathlib import Path
from typing import Any

import pytest
import torch
from program import added_lines, without_added
from torch import Tensor

import ltd_fx

lightning = pytest.importorskip("lightning")
litgpt = pytest.importorskip("litgpt")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*num_workers", "ignore:.*litlogger")]

SEQ, BATCHES, EPOCHS = 32, 8, 3


class Language(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"block_size": SEQ, "n_layer": 4, "n_head": 4, "n_embd": 32, "vocab_size": 64, "padded_vocab_size": 64}
        self.model = litgpt.GPT(litgpt.Config(**sizes))
        self.losses: list[float] = []

    def loss(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, ids: Tensor, i: int) -> Tensor:
        loss = self.loss(ids)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, ids: Tensor, i: int) -> None:
        self.log("loss", self.loss(ids))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(batches: int, seed: int) -> Any:
    """Rows that count on, each from a number of its own."""
    starts = torch.randint(0, 64, (4 * batches, 1), generator=torch.Generator().manual_seed(seed))
    return torch.utils.data.DataLoader((starts + torch.arange(SEQ)) % 64, batch_size=4)


def program(module: Any, folder: Path) -> Any:
    import ltd_fx.lightning  # added

    ltd_fx.transform(module.model, ltd_fx.LTDScheduler(8, SEQ, 20))  # added
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        default_root_dir=folder,
        callbacks=[
            ltd_fx.lightning.LTDCallback(),  # added
            lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(make: Any, folder: Path, checkpoint: Path | None = None) -> tuple[Any, float]:
    """The trained module, and the last validation's loss."""
    module = Language()
    trainer = make(module, folder)
    trainer.fit(module, loader(BATCHES, 0), loader(2, 1), ckpt_path=checkpoint)
    return module, float(trainer.callback_metrics["loss"])


def test_litgpt(tmp_path: Path) -> None:
    plain = without_added(program)
    assert len(added_lines(program)) <= 3
    module, validated = fit(program, tmp_path / "routed")
    assert sum(module.losses[-4:]) < 0.9 * sum(module.losses[:4])
    assert [entry.routed for entry in ltd_fx.summary(module).sites] == [False, True, True, False]
    dense, _ = fit(plain, tmp_path / "plain")
    assert not ltd_fx.is_transformed(dense)
    assert dense.losses != module.losses

    loaded = Language.load_from_checkpoint(tmp_path / "routed" / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
    (found,) = plain(loaded, tmp_path / "loaded").validate(loaded, loader(2, 1), verbose=False)
    assert found["loss"] == validated

    resumed, again = fit(program, tmp_path / "resumed", tmp_path / "routed" / "epoch=0.ckpt")
    assert resumed.losses == module.losses[BATCHES:]
    assert again == validated
    ours, theirs = resumed.state_dict(), module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
