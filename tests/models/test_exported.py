"""transformers' models as exported programs: losses and gradients of the model itself, routed with the same seed."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, export, unflatten
from torch.fx.experimental.proxy_tensor import make_fx

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


WAYS = ("export", "strict export", "unflatten")
MODELS = [
    (llama, text, text_sizes, (24, 32, 9)),
    (gpt2, text, text_sizes, (24, 32, 9)),
    (bert, text, text_sizes, (24, 32, 9)),
    (vit, image, image_sizes, (6, 5, 3)),
]


def traced(way: str, model: nn.Module, inputs: dict[str, Any], sizes: dict[str, Any]) -> nn.Module:
    program = export(model, (), inputs, dynamic_shapes=sizes, strict=way == "strict export")
    return unflatten(program) if way == "unflatten" else program.module()


@pytest.mark.slow
@pytest.mark.compat("transformers")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("make", "inputs", "sizes", "lengths"), MODELS)
def test_an_exported_model_trains_as_the_model_does(
    make: Any, inputs: Any, sizes: Any, lengths: tuple[int, ...], way: str
) -> None:
    torch.manual_seed(0)
    model = make().train()
    exported = traced(way, model, inputs(lengths[0]), sizes())
    keys, model = list(exported.state_dict()), copy.deepcopy(model)
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


@pytest.mark.compat("transformers")
@pytest.mark.parametrize(
    ("make", "inputs", "sizes", "lengths"), [MODELS[2], *(pytest.param(*m, marks=pytest.mark.slow) for m in MODELS)]
)
def test_a_model_of_make_fx_trains_as_the_model_does(
    make: Any, inputs: Any, sizes: Any, lengths: tuple[int, ...]
) -> None:
    """Its parameters are the model's, by names of its own; sizes are read off tensors of other layers."""
    torch.manual_seed(0)
    model, others = make().train(), {k: v for k, v in inputs(lengths[0]).items() if not isinstance(v, Tensor)}
    names = [name for name in inputs(lengths[0]) if name not in others]

    def run(*given: Tensor) -> Tensor:
        logits: Tensor = model(**dict(zip(names, given, strict=True)), **others).logits
        return logits

    def tensors(length: int) -> list[Tensor]:
        return [inputs(length)[name] for name in names]

    run._orig_mod = model  # type: ignore[attr-defined]
    how = {"tracing_mode": "symbolic", "pre_dispatch": True, "record_module_stack": True}
    graph = make_fx(run, _allow_non_fake_inputs=True, **how)(*tensors(lengths[0]))
    twin = ltd_fx.transform(copy.deepcopy(model), example_inputs=inputs(lengths[0]))
    ltd_fx.transform(graph)
    assert [site.status for site in ltd_fx.summary(graph).sites[1:-1]] == ["proven"] * (LAYERS - 2)
    for length in lengths:
        loss, grads = step(twin, inputs(length))
        model.zero_grad()
        other = graph(*tensors(length)).float().pow(2).mean()
        other.backward()
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-7)
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(own, grads, rtol=1e-5, atol=1e-7)
