"""When a model draws which tokens: new ones each forward, the same ones in a recompute, a replay and a resume."""

import io
from typing import Any

import pytest
import torch
from conftest import BATCH, SEQ, Case, checkpoint_layers, loss_of, text
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


class Encoder(nn.Module):
    """Blocks that the user checkpoints, one by one or all of them together."""

    def __init__(self, mode: str = "plain", use_reentrant: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True) for _ in range(4))
        self.mode, self.use_reentrant = mode, use_reentrant

    def forward(self, hidden: Tensor) -> Tensor:
        if self.mode == "group":
            return checkpoint(self.run, hidden, use_reentrant=self.use_reentrant)
        return self.run(hidden)

    def run(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            if self.mode == "each":
                hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
            else:
                hidden = block(hidden)
        return hidden


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def encoder(*options: Any, seed: int = 0) -> Encoder:
    torch.manual_seed(0)
    return ltd_fx.transform(Encoder(*options).train(), LTDScheduler(4, SEQ, 10), seed=seed)


@pytest.mark.parametrize("mode", ["each", "group"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_sees_the_same_draw(mode: str, use_reentrant: bool) -> None:
    hidden = torch.randn(BATCH, SEQ, 16, requires_grad=True)
    results = []
    for model in (encoder(), encoder(mode, use_reentrant)):
        for _ in range(3):  # gradient accumulation: each forward draws anew
            loss_of(model(hidden)).backward()
        model._ltd_rewrite.state.scheduler.step()
        loss_of(model(hidden)).backward()
        results.append(gradients(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


@pytest.mark.parametrize("mode", ["each", "group"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_that_would_draw_other_tokens_is_refused(mode: str, use_reentrant: bool) -> None:
    model = encoder(mode, use_reentrant)
    scheduler = model._ltd_rewrite.state.scheduler
    hidden = torch.randn(BATCH, SEQ, 16, requires_grad=True)
    first = loss_of(model(hidden))
    second = loss_of(model(hidden))
    with pytest.raises(LTDError, match="backward"):
        (first + second).backward()
    scheduler.step()
    first = loss_of(model(hidden))
    scheduler.step()
    with pytest.raises(LTDError, match="backward"):
        first.backward()
    scheduler.step()
    with torch.no_grad():  # nothing of this forward will be recomputed
        model(hidden)
    loss_of(model(hidden)).backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_transformers_gradient_checkpointing_with_two_forwards_before_backward(
    llama: Case, use_reentrant: bool
) -> None:
    results = []
    for checkpointed in (False, True):
        model = llama.model()
        if checkpointed:
            checkpoint_layers(model, use_reentrant=use_reentrant)
        ltd_fx.transform(model, LTDScheduler(9, SEQ, 10))
        (loss_of(model(**text())) + loss_of(model(**text()))).backward()
        results.append(gradients(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-5)


def test_the_outermost_checkpoint_wrapper_is_routed() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    wrapped, plain = Encoder().train(), encoder()
    for i, block in enumerate(wrapped.blocks):
        wrapped.blocks[i] = checkpoint_wrapper(block)
    ltd_fx.transform(wrapped, LTDScheduler(4, SEQ, 10))
    assert [site.name for site in ltd_fx.summary(wrapped).sites if site.routed] == ["blocks.1", "blocks.2"]
    hidden = torch.randn(BATCH, SEQ, 16)
    for model in (plain, wrapped):
        (loss_of(model(hidden)) + loss_of(model(hidden))).backward()
    for expected, ours in zip(plain.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    assert list(ltd_fx.clean_state_dict(wrapped)) == list(plain.state_dict())


def test_every_forward_step_site_row_and_seed_draws_anew() -> None:
    hidden = torch.randn(BATCH, SEQ, 16)
    drawn: list[tuple[int, ...]] = []
    for seed in range(2):
        model = encoder(seed=seed)
        scheduler = model._ltd_rewrite.state.scheduler
        for _ in range(4):
            for _ in range(3):
                model(hidden)
                for indices in ltd_fx.sampled_indices(model).values():
                    assert indices.shape == (BATCH, scheduler.reserved_length)
                    drawn.extend(tuple(row.tolist()) for row in indices)
            scheduler.step()
    assert len(set(drawn)) == len(drawn) == 2 * 4 * 3 * 2 * BATCH


def test_sampled_indices_are_of_the_last_training_forward(llama: Case) -> None:
    scheduler = LTDScheduler(9, SEQ, 10)
    model = ltd_fx.transform(llama.model(), scheduler)
    with pytest.raises(LTDError, match="training forward"):
        ltd_fx.sampled_indices(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    model(**text())
    eager = ltd_fx.sampled_indices(model)
    scheduler.set_step(0)
    compiled(**text())
    scheduler.step()
    model.eval()(**text())
    replayed = ltd_fx.sampled_indices(compiled)
    assert eager.keys() == replayed.keys() == {"model.layers.1", "model.layers.2"}
    assert all(torch.equal(eager[name], replayed[name]) for name in eager)
    scheduler.set_step(100)
    model.train()(**text())
    for rows in ltd_fx.sampled_indices(model).values():
        assert torch.equal(rows, torch.arange(SEQ).expand(BATCH, SEQ))


def test_shared_sampling_draws_once_for_the_batch() -> None:
    torch.manual_seed(0)
    model = ltd_fx.transform(Encoder().train(), sampling="shared")
    model(torch.randn(BATCH, SEQ, 16))
    for rows in ltd_fx.sampled_indices(model).values():
        assert rows.shape == (BATCH, SEQ // 2)
        assert torch.equal(rows, rows[:1].expand_as(rows))


@pytest.mark.parametrize("forwards", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resume_goes_on_bit_for_bit(llama: Case, forwards: int) -> None:
    def train(steps: range, model: nn.Module, scheduler: LTDScheduler, optimizer: Any) -> list[float]:
        losses = []
        for _ in steps:
            for _ in range(forwards):
                loss = loss_of(model(**text()))
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return losses

    def fresh(seed: int = 3) -> tuple[nn.Module, LTDScheduler, Any]:
        model, scheduler = llama.model(), LTDScheduler(9, SEQ, 10, multiple_of=3)
        ltd_fx.transform(model, scheduler, seed=seed)
        return model, scheduler, torch.optim.AdamW(model.parameters(), 1e-3)

    whole = fresh()
    expected = train(range(6), *whole)
    model, scheduler, optimizer = fresh()
    assert train(range(3), model, scheduler, optimizer) == expected[: 3 * forwards]
    loss_of(model(**text()))  # in the middle of a step: the count of its forwards is saved too
    file = io.BytesIO()
    torch.save([model.state_dict(), scheduler.state_dict(), optimizer.state_dict()], file)
    after = loss_of(model(**text())).item()
    states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = fresh()
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    assert loss_of(resumed[0](**text())).item() == after
    resumed[1].set_step(3)
    assert train(range(3), *resumed) == expected[3 * forwards :]
    with pytest.raises(LTDError, match=r"seed=3.*seed=4"):
        fresh(seed=4)[1].load_state_dict(states[1])
    with pytest.raises(LTDError, match="transform before"):
        LTDScheduler(9, SEQ, 10, multiple_of=3).load_state_dict(states[1])
