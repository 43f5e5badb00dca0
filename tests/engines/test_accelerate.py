"""Accelerate's checkpoints and learning rate steps, in a plain loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SEQ, decoder
from torch import Tensor

import ltd_fx
from ltd_fx import LayerTokenLR, LTDScheduler

accelerate = pytest.importorskip("accelerate")


def batch_at(step: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (2, SEQ), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


class Run:
    """A plain loop with Accelerate, two micro-batches a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.scheduler = LTDScheduler(8, SEQ, 12, global_batch_size=4)
        model = ltd_fx.transform(decoder("Llama")().train(), self.scheduler)
        adam = torch.optim.AdamW(model.parameters(), lr=0.01)
        lr = LayerTokenLR(adam, self.scheduler, total_layer_tokens=self.scheduler.total_layer_tokens(10))
        self.model, self.adam, self.lr = self.accelerator.prepare(model, adam, lr)
        self.accelerator.register_for_checkpointing(self.scheduler)

    def train(self, first: int, last: int) -> list[Any]:
        """Loss, learning rate and draws of each micro-batch."""
        seen = []
        for step in range(2 * first, 2 * last):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch_at(step)).loss
                draws = {name: kept.tolist() for name, kept in ltd_fx.sampled_indices(self.model).items()}
                seen.append((loss.item(), self.adam.param_groups[0]["lr"], draws))
                self.accelerator.backward(loss)
                self.adam.step()
                if self.accelerator.sync_gradients:
                    self.scheduler.step()
                    self.lr.step()
                self.adam.zero_grad()
        return seen


@pytest.mark.slow
@pytest.mark.compat("accelerate")
def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    whole = Run()
    expected = whole.train(0, 4)
    assert [len(next(iter(draws.values()))[0]) for _, _, draws in expected] == [8, 8, 12, 12, 17, 17, 22, 22]
    first = Run()
    assert first.train(0, 2) == expected[:4]
    first.accelerator.save_state(str(tmp_path))
    second = Run()
    second.accelerator.load_state(str(tmp_path))
    assert second.train(2, 4) == expected[4:]
    ours, theirs = second.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
