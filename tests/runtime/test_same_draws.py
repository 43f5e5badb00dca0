"""``ltd_fx.same_draws``: forwards that repeat the draws of the one before them; and draws in a forward's own loss."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from toy import Encoder

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

transformers = pytest.importorskip("transformers")
S = 32


def policy() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).train()


def words() -> Tensor:
    return torch.randint(0, 50, (3, S), generator=torch.Generator().manual_seed(0))


def log_probabilities(model: Any, given: Tensor) -> Tensor:
    logits = model(input_ids=given, use_cache=False).logits[:, :-1].log_softmax(-1)
    found: Tensor = logits.gather(2, given[:, 1:, None])
    return found[..., 0]


def draws_of(model: Any) -> str:
    return str({name: rows.tolist() for name, rows in ltd_fx.sampled_indices(model).items()})


def test_the_ratio_of_an_unchanged_policy_is_one_to_the_bit() -> None:
    """PPO: old log-probabilities without gradients, then new ones, several times."""
    model, scheduler = policy(), LTDScheduler(9, S, 20)
    ltd_fx.transform(model, scheduler)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        with torch.no_grad():
            old = log_probabilities(model, words())
        kept = draws_of(model)
        with ltd_fx.same_draws(model):
            for epoch in range(2):
                ratio = (log_probabilities(model, words()) - old).exp()
                assert draws_of(model) == kept
                assert bool((ratio == 1).all()) == (epoch == 0)
                ratio.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        log_probabilities(model, words())
        assert draws_of(model) != kept
        scheduler.step()


@pytest.mark.slow
def test_it_costs_no_graph() -> None:
    model = ltd_fx.transform(policy(), LTDScheduler(9, S, 20))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    step(input_ids=words(), use_cache=False)
    kept = draws_of(model)
    with ltd_fx.same_draws(step):
        step(input_ids=words(), use_cache=False)
        assert draws_of(step) == kept
    step(input_ids=words(), use_cache=False)
    assert draws_of(step) != kept
    assert counter.frame_count == 1


@pytest.mark.slow
def test_with_a_backend() -> None:
    backend = ltd_fx.backend(LTDScheduler(9, S, 20), inner="aot_eager")
    step = torch.compile(policy(), backend=backend, fullgraph=True)
    with pytest.raises(LTDError, match="no forward"):
        ltd_fx.same_draws(backend)
    step(input_ids=words(), use_cache=False)
    kept = draws_of(backend)
    with ltd_fx.same_draws(backend):
        step(input_ids=words(), use_cache=False)
    assert draws_of(backend) == kept


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(4))
        self.recomputes = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recomputes else layer(x)
        return x


def test_two_forwards_may_await_their_recomputes() -> None:
    """Elsewhere, what another forward draws could not be told from what the first one drew."""
    x, grads = torch.randn(2, 12, 16), []
    for recomputes in (False, True):
        model = ltd_fx.transform(Checkpointed().train(), LTDScheduler(5, 12, 9), example_inputs=(x,))
        model.recomputes = recomputes
        model(x)
        with ltd_fx.same_draws(model):
            loss = model(x).square().sum() + model(2 * x).sum()
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*grads)


def test_there_must_be_a_forward_before_and_the_scheduler_stays() -> None:
    scheduler = LTDScheduler(5, 12, 9)
    model = ltd_fx.transform(Encoder(4).train(), scheduler)
    none = pytest.raises(LTDError, match="no training forward since the scheduler stepped")
    with none, ltd_fx.same_draws(model):
        pass
    model(torch.randn(2, 12, 16))
    before = scheduler.state_dict()
    for go in (scheduler.step, lambda: scheduler.set_step(5)):
        with ltd_fx.same_draws(model), pytest.raises(LTDError, match="the scheduler steps within it"):
            go()
        assert scheduler.state_dict() == before
    scheduler.step()
    with none, ltd_fx.same_draws(model):
        pass
    with pytest.raises(LTDError, match="not transformed"):
        ltd_fx.same_draws(Encoder(4))


@pytest.mark.slow
def test_kept_tokens_in_the_loss_of_the_same_forward() -> None:
    """Within one compiled step; two graphs over the schedule."""
    model, scheduler = policy(), LTDScheduler(9, S, 4)
    twin = ltd_fx.transform(copy.deepcopy(model), LTDScheduler(9, S, 4))
    ltd_fx.transform(model, scheduler, example_inputs={"input_ids": words(), "use_cache": False})
    counter = CompileCounterWithBackend("aot_eager")

    def loss(net: nn.Module, given: Tensor) -> Tensor:
        logits = net(input_ids=given, use_cache=False).logits
        kept = ltd_fx.sampled_indices(net)["model.layers.2"]
        return logits.gather(1, kept[..., None].expand(-1, -1, 50)).logsumexp(-1).mean()

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for _ in range(6):
        torch.testing.assert_close(compiled(model, words()), loss(twin, words()))
        scheduler.step()
        twin._ltd_rewrite.state.scheduler.step()
    assert counter.frame_count == 2
