"""The auxiliary loss of mixtures of experts under a padding mask, of the tokens that each layer kept."""

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx import LTDScheduler

transformers = pytest.importorskip("transformers")

B, S, EXPERTS, TOP = 3, 16, 4, 2
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP,
    "output_router_logits": True,
}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS))


def qwen3() -> nn.Module:
    """Its second layer has no experts."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=EXPERTS, moe_intermediate_size=24, head_dim=8, mlp_only_layers=[1]
    )
    return transformers.Qwen3MoeForCausalLM(config)


def made(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return ltd_fx.transform(make().train(), LTDScheduler(7, S, 4), **options)


def batch(padded: bool = True) -> dict[str, Any]:
    ids = torch.randint(1, 64, (B, S), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, : 6 if padded else 0] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask, "use_cache": False}


def expected(model: nn.Module, out: Any, given: dict[str, Any], experts_of: list[int]) -> Tensor:
    """Expert by expert: its share of the real tokens that a layer saw, times its mean probability (Switch, eq. 4)."""
    draws = ltd_fx.sampled_indices(model)
    share, mean, count = torch.zeros(EXPERTS), torch.zeros(EXPERTS), 0
    for layer, logits in zip(experts_of, out.router_logits, strict=True):
        rows = draws.get(f"model.layers.{layer}", torch.arange(S).expand(B, S))
        real = given["attention_mask"].gather(1, rows).flatten().bool()
        chances = logits.detach()[real].softmax(-1)
        count += len(chances)
        mean += chances.sum(0)
        for token in chances:
            share[token.topk(TOP).indices] += 1
    return EXPERTS * (share / count * mean / count).sum()


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "all real"])
@pytest.mark.parametrize(
    ("make", "experts_of"), [(mixtral, [0, 1, 2, 3]), pytest.param(qwen3, [0, 2, 3], marks=pytest.mark.slow)]
)
def test_it_counts_the_real_tokens_that_layers_kept(
    make: Callable[[], nn.Module], experts_of: list[int], padded: bool
) -> None:
    model, given = made(make), batch(padded)
    out = model(**given)
    assert {len(logits) for logits in out.router_logits} == {B * 7, B * S}
    torch.testing.assert_close(out.aux_loss.detach(), expected(model, out, given, experts_of))
    out.aux_loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "gate.weight" in name)
    model.eval()
    dense = ltd_fx.restore(copy.deepcopy(model))
    assert torch.equal(model(**given).aux_loss, dense(**given).aux_loss)
    assert "forward" not in dense.__dict__
    assert "forward" in model.__dict__
    assert inspect.signature(model.forward) == inspect.signature(dense.forward)


def through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file])
def test_copies_count_their_own(how: Callable[[nn.Module], Any]) -> None:
    model, given = made(mixtral), batch()
    other = how(model).train()
    model(**given)
    other.model.layers[1].mlp.gate.weight.data.normal_()
    out = other(**given)
    torch.testing.assert_close(out.aux_loss.detach(), expected(other, out, given, [0, 1, 2, 3]))


@pytest.mark.slow
def test_within_another_model_and_compiled() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mixtral()

        def forward(self, **given: Any) -> Any:
            return self.inner(**given).aux_loss

    given = batch()
    torch.manual_seed(0)
    model = Outer().train()
    twin, scheduler = copy.deepcopy(model), LTDScheduler(7, S, 4)
    ltd_fx.transform(model, scheduler, example_inputs=given)
    ltd_fx.transform(twin, LTDScheduler(7, S, 4))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter)
    for _ in range(5):
        torch.testing.assert_close(step(**given), twin(**given))
        scheduler.step()
        twin._ltd_rewrite.state.scheduler.step()
    ltd_fx.restore(model)
    assert "forward" not in model.inner.__dict__


def test_losses_that_count_otherwise_are_left_alone() -> None:
    """Switch's takes other arguments: a model of its layers that see all tokens computes it as before."""
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 4}
    config = transformers.SwitchTransformersConfig(
        **sizes, num_layers=4, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0, decoder_start_token_id=0
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config).train()
    ltd_fx.transform(model, LTDScheduler(7, S, 4), layers=r"encoder\.block\.\d+")
    assert "forward" not in model.__dict__
