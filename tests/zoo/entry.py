"""What an entry of the zoo is, the sizes all its models share, and how a transformers model is made from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

B, S = 3, 24
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 32, 4, 4, 2, 48, 64
STD = 0.15  # of the weights: near HIDDEN ** -0.5, so that attention is far from uniform and each layer is seen
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,  # as the Trainer sets it
    "initializer_range": STD,
    "init_std": STD,
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


@dataclass(frozen=True)
class Entry:
    """A model family of the zoo."""

    library: str
    name: str  # unique, what a table shows: usually the model class, plus a variant
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]  # dict of keyword, or tuple of positional arguments for one forward
    layers: Any = None  # selects the repeated layers, where they aren't plainly the elements of a container
    options: Mapping[str, Any] = field(default_factory=dict)
    refused: str | None = None


def config(name: str, **overrides: Any) -> Any:
    """A transformers config with the shared sizes, as far as it has them, and `overrides`."""
    import transformers

    cls = getattr(transformers, name)
    known = {k: getattr(cls, k, None) for k in SIZES if hasattr(cls, k) or k in cls.attribute_map}
    return cls(**{k: SIZES[k] for k, default in known.items() if not isinstance(default, property)} | overrides)


def pretrained(config_name: str, model_name: str, **overrides: Any) -> nn.Module:
    """A randomly initialised transformers model; `attn_implementation` is an override like any other."""
    import transformers

    made = config(config_name, **overrides)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, model_name)(made)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # such as tables of relative positions
            nn.init.normal_(parameter, std=STD)
    return model


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`make` after the seed, with weights of the standard deviation `STD`, where libraries often take 0.02."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = make()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=STD)
        return model

    return build


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def text(length: int = S) -> dict[str, Tensor]:
    """Random tokens: a full row, a left-padded one and a right-padded one."""
    mask = torch.ones(B, length, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, -7:] = 0
    return {"input_ids": torch.randint(3, VOCAB, (B, length), generator=generator()) * mask, "attention_mask": mask}


def hf(
    model: str,
    variant: str = "",
    *,
    config: str | None = None,
    inputs: Callable[[], Any] = text,
    layers: Any = None,
    **overrides: Any,
) -> Entry:
    """The entry of a transformers model class, whose config's class is named after it unless `config` says."""
    config = config or re.sub("(For[A-Z].*|Model)$", "Config", model)
    name = f"{model} ({variant})" if variant else model
    return Entry("transformers", name, partial(pretrained, config, model, **overrides), inputs, layers)
