"""What else a batch of a real training program holds: labels, logits to keep, images now and then, statistics."""

import copy
from typing import Any

import pytest
import torch
from dense import documents_mask, run_blocked
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

transformers = pytest.importorskip("transformers")

B, S, IMAGE = 2, 24, 60
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "use_cache": False,
}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)).train()


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    sees = transformers.CLIPVisionConfig(**vision, image_size=12, patch_size=4)
    reads = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=sees, text_config=reads, image_token_id=IMAGE)
    return transformers.LlavaForConditionalGeneration(config).train()


def batch(images: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, 50, (B, S), generator=generator)}
    if images:
        inputs["input_ids"][:, 3:12] = IMAGE
        inputs["pixel_values"] = torch.randn(B, 3, 12, 12, generator=generator)
    return inputs


def reference(dense: nn.Module, model: nn.Module, stack: str, inputs: dict[str, Any]) -> Tensor:
    dense = copy.deepcopy(dense)
    dense.set_attn_implementation("eager")
    draws = {name: rows for name, rows in ltd_fx.sampled_indices(model).items() if name.startswith(stack)}
    assert len(draws) == 2
    every = {f"{stack}.{i}": torch.arange(S).expand(B, S) for i in range(4)} | draws
    return run_blocked(dense, every, dict.fromkeys(every, documents_mask([S])), inputs)


def test_logits_to_keep_and_losses_count_all_tokens() -> None:
    model = llama()
    dense = copy.deepcopy(model)
    ltd_fx.transform(model, LTDScheduler(6, S, 9))
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(torch.arange(S) < 5, -100)
    out = model(**inputs, labels=labels, num_items_in_batch=40)
    logits = reference(dense, model, "model.layers", inputs)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / 40
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-4)
    last = model(**inputs, logits_to_keep=4).logits
    logits = reference(dense, model, "model.layers", inputs)
    torch.testing.assert_close(last, logits[:, -4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [True, False], ids=["an image first", "text first"])
def test_images_come_only_in_some_batches(first: bool) -> None:
    stack = "model.language_model.layers"
    model = llava()
    dense = copy.deepcopy(model)
    ltd_fx.transform(model, LTDScheduler(6, S, 9))
    for images in (first, not first, first):
        inputs = batch(images)
        torch.testing.assert_close(model(**inputs).logits, reference(dense, model, stack, inputs), rtol=1e-4, atol=1e-4)


def test_layers_that_only_images_call_are_learnt_from_a_batch_with_images() -> None:
    model = llava()
    where = {"layers": r".*vision_tower.*layers\.\d", "skip_first": 1}
    ltd_fx.transform(model, LTDScheduler(4, 10, 9), **where)
    with pytest.raises(LTDError, match=r"layers\.1 is not called; give example_inputs"):
        model(**batch())
    ltd_fx.restore(model)
    ltd_fx.transform(model, LTDScheduler(4, 10, 9), **where, example_inputs=batch(images=True))
    model(**batch())
    model(**batch(images=True))
    assert len(ltd_fx.sampled_indices(model)) == 2


def test_a_prefix_is_refused_by_its_name() -> None:
    model = llama()
    ltd_fx.transform(model, LTDScheduler(6, S, 9))
    prefix = transformers.DynamicCache()
    for i in range(4):
        prefix.update(torch.randn(B, 4, 3, 8), torch.randn(B, 4, 3, 8), i)
    with pytest.raises(LTDError, match=r"a key-value cache with tokens \(a prefix.*\) in training mode"):
        model(**batch(), past_key_values=prefix, use_cache=True)


class Experts(nn.Module):
    """A mixture that counts, in a buffer, how many tokens each expert took."""

    load: Tensor

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts)
        self.experts = nn.Parameter(torch.randn(experts, dim, dim) / dim)
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64))

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = nn.functional.scaled_dot_product_attention(*[hidden_states] * 3, is_causal=True)
        weights, chosen = self.router(hidden_states).softmax(-1).max(-1)
        if self.training:
            self.load += nn.functional.one_hot(chosen, len(self.load)).sum((0, 1))
        each = torch.einsum("bsd,edf->bsef", hidden_states, self.experts)
        rows = each.gather(2, chosen[..., None, None].expand(-1, -1, 1, each.shape[-1]))[:, :, 0]
        return hidden_states + weights[..., None] * rows


@pytest.mark.parametrize("examples", [False, True], ids=["first forward", "examples"])
def test_load_statistics_count_the_kept_tokens_once(examples: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Experts(8, 3) for _ in range(4)))
    x = torch.randn(B, S, 8)
    dense = copy.deepcopy(model)
    ltd_fx.transform(model, LTDScheduler(6, S, 9), example_inputs=(x,) if examples else None)
    model(x)
    stream = dense[0](x)
    rows = ltd_fx.sampled_indices(model)["1"]
    assert rows.shape == (B, 6)
    dense[1](stream.gather(1, rows[..., None].expand(-1, -1, 8)))
    assert torch.equal(model[1].load, dense[1].load)
    assert [int(layer.load.sum()) for layer in model] == [B * S, B * 6, B * 6, B * S]
