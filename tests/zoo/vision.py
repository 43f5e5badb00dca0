"""Vision models of transformers and of timm."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .entry import HEADS, HIDDEN, LAYERS, SIZES, B, Entry, hf, noise, seeded, text

SIZE, PATCH, LABELS = 32, 4, 8
IMAGE_TOKEN = 63
TOWER: dict[str, Any] = {
    name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
PIXELS: dict[str, Any] = {"image_size": 24, "patch_size": 8, "projection_dim": 16}
TEXT: dict[str, Any] = TOWER | {name: SIZES[name] for name in ("vocab_size", "max_position_embeddings", "pad_token_id")}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "window_size": 4}
SCALE: dict[str, Any] = {"init_values": 0.5}  # else 1e-5 or less, which would hide what a layer does
STAGES = r".*layers\.\d+\.blocks\.\d+"


def image(size: int = SIZE) -> Tensor:
    return noise(B, 3, size, size)


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": image()}


def masked() -> dict[str, Tensor]:
    """With the noise that chooses the patches to mask."""
    return pixels() | {"noise": noise(B, (SIZE // PATCH) ** 2)}


def captioned() -> dict[str, Tensor]:
    return text() | {"pixel_values": image(24)}


def placed() -> dict[str, Tensor]:
    """An image's nine patches amid the text."""
    inputs = captioned()
    inputs["input_ids"] = inputs["input_ids"].clamp(max=IMAGE_TOKEN - 1)
    inputs["input_ids"][:, 6:15] = IMAGE_TOKEN
    return inputs


def timm_model(name: str, **arguments: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, img_size=SIZE, num_classes=LABELS, **arguments)
    return model


def mixer() -> nn.Module:
    import timm

    return timm.models.mlp_mixer.MlpMixer(LABELS, SIZE, patch_size=PATCH, num_blocks=LAYERS, embed_dim=HIDDEN)


def tm(name: str, layers: Any = None, **arguments: Any) -> Entry:
    """A timm model of the shared sizes, where `arguments` don't give others."""
    sizes = {} if "depths" in arguments else {"embed_dim": HIDDEN, "num_heads": HEADS, "depth": LAYERS}
    sizes = sizes | {"patch_size": PATCH} | arguments
    return Entry("timm", name, seeded(partial(timm_model, name, **sizes)), lambda: (image(),), layers)


vit = partial(hf, inputs=pixels, image_size=SIZE, patch_size=PATCH)

ENTRIES: list[Entry] = [
    vit("ViTModel"),
    vit("DeiTModel"),
    vit("BeitModel", "relative position bias", use_relative_position_bias=True),
    vit("Dinov2Model", mlp_ratio=2),
    vit("Dinov2WithRegistersModel", mlp_ratio=2),
    vit("DINOv3ViTModel", num_register_tokens=4),
    vit("SiglipVisionModel"),
    vit("SwinModel", layers=STAGES, num_attention_heads=[2, 4], **SWIN),
    vit(
        "ViTMAEForPreTraining",
        inputs=masked,
        decoder_hidden_size=HIDDEN,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=HEADS,
        decoder_intermediate_size=48,
    ),
    vit("Data2VecVisionModel", "shared bias", use_shared_relative_position_bias=True),
    hf("CLIPModel", inputs=captioned, text_config=TEXT, vision_config=TOWER | PIXELS, projection_dim=16),
    hf(
        "LlavaForConditionalGeneration",
        inputs=placed,
        text_config=TEXT | {"model_type": "llama", "num_key_value_heads": 2},
        vision_config=TOWER | PIXELS | {"model_type": "clip_vision_model"},
        image_token_id=IMAGE_TOKEN,
    ),
    tm("vit_tiny_patch16_224"),
    tm("vit_small_patch14_reg4_dinov2", **SCALE),
    tm("deit3_small_patch16_224", **SCALE),
    tm("eva02_tiny_patch14_224", ref_feat_shape=(8, 8)),
    tm("vit_small_patch16_dinov3", **SCALE),
    tm("beit_base_patch16_224"),
    tm("cait_xxs24_224", layers=r"blocks\.\d+", depth_token_only=2, **SCALE),
    tm("swin_tiny_patch4_window7_224", layers=STAGES, num_heads=[2, 4], **SWIN),
    tm("xcit_nano_12_p8_224", layers=r"blocks\.\d+", patch_size=8),
    Entry("timm", "MlpMixer", seeded(mixer), lambda: (image(),)),
]
