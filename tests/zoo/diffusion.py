"""Diffusion transformers of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .entry import HEADS, HIDDEN, LAYERS, B, Entry, generator, noise, seeded

HEAD = HIDDEN // HEADS
PROMPT, PROMPT_T5, WIDTH = 6, 5, 16
STEPS = torch.tensor([0.01, 0.5, 0.9])
BLOCKS = r"(\w+_)?blocks\.\d+"
LATENT: dict[str, Any] = {"sample_size": 8, "patch_size": 2, "in_channels": 4}
JOINT: dict[str, Any] = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}


def diffuser(name: str, **overrides: Any) -> nn.Module:
    import diffusers

    model: nn.Module = getattr(diffusers, name)(num_attention_heads=HEADS, attention_head_dim=HEAD, **overrides)
    return model


def latents(*names: str) -> dict[str, Any]:
    """An 8 x 8 image of 4 channels, and those of the other inputs that are named."""
    others = {
        "class_labels": torch.arange(B),
        "encoder_hidden_states": noise(B, PROMPT, WIDTH),
        "encoder_attention_mask": torch.arange(PROMPT) < torch.tensor([[PROMPT], [2], [4]]),
        "pooled_projections": noise(B, WIDTH),
    }
    chosen = {name: others[name] for name in names}
    return {"hidden_states": noise(B, 4, 8, 8), "timestep": (STEPS * 1000).long()} | chosen


def flux_inputs() -> dict[str, Any]:
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=-1)
    latent = latents("encoder_hidden_states", "pooled_projections")
    return latent | {
        "hidden_states": noise(B, 16, 4),
        "timestep": STEPS,
        "img_ids": places,
        "txt_ids": torch.zeros(PROMPT, 3),
    }


def aura_inputs() -> dict[str, Any]:
    return latents("encoder_hidden_states") | {"timestep": STEPS}


def hunyuan_inputs() -> dict[str, Any]:
    angles = torch.rand(16, HEAD, generator=generator())
    return latents() | {
        "encoder_hidden_states": noise(B, PROMPT, HIDDEN),
        "text_embedding_mask": torch.ones(B, PROMPT, dtype=torch.long),
        "encoder_hidden_states_t5": noise(B, PROMPT_T5, WIDTH),
        "text_embedding_mask_t5": torch.ones(B, PROMPT_T5, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "timestep": STEPS * 1000,
    }


def diffusion(name: str, inputs: Callable[[], Any], **overrides: Any) -> Entry:
    return Entry("diffusers", name, seeded(partial(diffuser, name, **overrides)), inputs, BLOCKS)


ENTRIES: list[Entry] = [
    diffusion(
        "DiTTransformer2DModel",
        partial(latents, "class_labels"),
        num_layers=LAYERS,
        num_embeds_ada_norm=8,
        **LATENT,
    ),
    diffusion(
        "FluxTransformer2DModel",
        flux_inputs,
        in_channels=4,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        axes_dims_rope=(2, 2, 4),
        **JOINT,
    ),
    diffusion(
        "SD3Transformer2DModel",
        partial(latents, "encoder_hidden_states", "pooled_projections"),
        num_layers=LAYERS,
        out_channels=4,
        caption_projection_dim=HIDDEN,
        pos_embed_max_size=8,
        **LATENT,
        **JOINT,
    ),
    diffusion(
        "PixArtTransformer2DModel",
        partial(latents, "encoder_hidden_states", "encoder_attention_mask"),
        num_layers=LAYERS,
        cross_attention_dim=HIDDEN,
        caption_channels=WIDTH,
        use_additional_conditions=False,
        **LATENT,
    ),
    diffusion(
        "HunyuanDiT2DModel",
        hunyuan_inputs,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        cross_attention_dim=HIDDEN,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        text_len=PROMPT,
        text_len_t5=PROMPT_T5,
        use_style_cond_and_image_meta_size=False,
        **LATENT,
    ),
    diffusion(
        "AuraFlowTransformer2DModel",
        aura_inputs,
        num_mmdit_layers=LAYERS,
        num_single_dit_layers=LAYERS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=HIDDEN,
        pos_embed_max_size=16,
        **LATENT,
    ),
]
