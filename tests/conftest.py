"""The models of the tests: small, with random weights, dropout off so that two runs can be compared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BATCH, SEQ = 3, 64


@dataclass(frozen=True)
class Case:
    """A model family: how to build it, its inputs, and where its layers are."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    layers: str
    seq_len: int

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().train()


def assert_same(ours: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    """Gradients by name, a dict a step."""
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-5)


def checkpoint_layers(model: Any, *, use_reentrant: bool) -> None:
    """transformers' own activation checkpointing, by the name that the installed release has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


def loss_of(output: Any) -> Tensor:
    """A scalar that every token of the output matters to."""
    if not isinstance(output, Tensor):
        output = output.logits
    weights = torch.linspace(-1, 1, output.numel(), device=output.device)
    return (output * weights.view_as(output)).sum()


def text() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[1, : SEQ // 4] = 0
    mask[2, -SEQ // 4 :] = 0
    return {"input_ids": torch.randint(0, 64, (BATCH, SEQ), generator=generator), "attention_mask": mask}


def image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}


def decoder(family: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        sizes = {**_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, **config}
        return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))

    return build


def gpt2(depth: int = 4) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 32, "n_layer": depth, "n_head": 4, "n_positions": 64, "vocab_size": 64, "n_inner": 48}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def bert(depth: int = 4) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {**_SIZES, "num_hidden_layers": depth}
    config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {name: size for name, size in _SIZES.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=32, patch_size=4))


def timm_vit() -> nn.Module:
    # RuntimeError: a torchvision that does not fit the installed torch
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 8}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


CASES = {
    "llama": Case(decoder("Llama"), text, "model.layers", SEQ),
    "gpt2": Case(gpt2, text, "transformer.h", SEQ),
    "bert": Case(bert, text, "bert.encoder.layer", SEQ),
    "vit": Case(vit, image, "vit.layers", 65),
    "timm_vit": Case(timm_vit, lambda: {"x": image()["pixel_values"]}, "blocks", 65),
}
DECODERS = {
    "mistral": Case(decoder("Mistral", sliding_window=5), text, "model.layers", SEQ),
    "qwen2": Case(decoder("Qwen2"), text, "model.layers", SEQ),
    "qwen3": Case(decoder("Qwen3", head_dim=8), text, "model.layers", SEQ),
    "gemma": Case(decoder("Gemma", head_dim=8), text, "model.layers", SEQ),
    "olmo2": Case(decoder("Olmo2"), text, "model.layers", SEQ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def llama() -> Case:
    return CASES["llama"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    yield
    torch._dynamo.reset()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """All tests of programs are slow, and what they import takes long to import."""
    return True if collection_path.name == "programs" and config.option.markexpr == "not slow" else None
