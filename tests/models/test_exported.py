"""transformers' models as exported programs: losses and gradients of the model itself, routed with the same seed."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, export

import ltd_fx

VOCABULARY, D, LAYERS = 64, 32, 4
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BATCH = Dim("batch", min=2, max=64)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False))


def gpt2() -> nn.Module:
    nothing = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TEXT, **nothing, use_cache=False))


def bert() -> nn.Module:
    nothing = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **nothing))


def vit() -> nn.Module:
    sizes = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8)
    )


def text(length: int) -> dict[str, Any]:
    """Three sequences, the first of them padded."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, -3:] = 0
    return {"input_ids": torch.randint(0, VOCABULARY, (3, length), generator=generator), "attention_mask": mask}


def image(patches: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(patches)
    pixels = torch.randn(3, 3, 8 * patches, 8 * patches, generator=generator)
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def text_sizes() -> dict[str, Any]:
    sizes = {0: BATCH, 1: Dim.AUTO}
    return {"input_ids": sizes, "attention_mask": sizes}


def image_sizes() -> dict[str, Any]:
    return {"pixel_values": {0: BATCH, 2: Dim.AUTO, 3: Dim.AUTO}, "interpolate_pos_encoding": None}


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).logits.float().pow(2).mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.compat("transformers")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "inputs", "sizes", "lengths"),
    [
        (llama, text, text_sizes, (24, 32, 9)),
        (gpt2, text, text_sizes, (24, 32, 9)),
        (bert, text, text_sizes, (24, 32, 9)),
        (vit, image, image_sizes, (6, 5, 3)),
    ],
)
def test_an_exported_model_trains_as_the_model_does(
    make: Any, inputs: Any, sizes: Any, lengths: tuple[int, ...], strict: bool
) -> None:
    torch.manual_seed(0)
    model = make().train()
    program = export(model, (), inputs(lengths[0]), dynamic_shapes=sizes(), strict=strict)
    exported, keys = program.module(), list(program.module().state_dict())
    model = copy.deepcopy(model)
    ltd_fx.transform(model, example_inputs=inputs(lengths[0]))
    ltd_fx.transform(exported, example_inputs=inputs(lengths[0]))
    assert [site.status for site in ltd_fx.summary(exported).sites[1:-1]] == ["proven"] * (LAYERS - 2)
    for length in lengths:
        loss, grads = step(model, inputs(length))
        other, others = step(exported, inputs(length))
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-7)
        assert others
        torch.testing.assert_close(others, {name: grads[name] for name in others}, rtol=1e-5, atol=1e-7)
        drawn = ltd_fx.sampled_indices(exported)
        assert [name.rpartition(".")[2] for name in drawn] == ["1", "2"]
    assert list(exported.state_dict()) == keys
    assert list(ltd_fx.clean_state_dict(exported)) == keys
