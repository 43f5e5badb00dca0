"""What a model of the zoo needs to be routed right, or why it is refused (regular expressions)."""

from typing import Any

EVERY: dict[str, Any] = {"skip_first": 0, "skip_last": 0}
SHARED: dict[str, Any] = {"sampling": "shared"}

OPTIONS: dict[str, dict[str, Any]] = {
    "MptForCausalLM": SHARED,
    "DebertaV2ForMaskedLM (relative)": SHARED,
    "DINOv3ViTModel": {"protect": 5},
    "eva02_tiny_patch14_224": {"protect": 1},
    "vit_small_patch16_dinov3": {"protect": 5},
    "FluxTransformer2DModel": SHARED,
    "HunyuanDiT2DModel": SHARED,
    "AlbertForMaskedLM": EVERY,
    "FunnelForMaskedLM": EVERY,
    "SwinModel": EVERY,
    "swin_tiny_patch4_window7_224": EVERY,
    "SwinTransformer": EVERY,
}

_DIFFERS = "kept tokens differ from the dense layer's"
_OTHER_WAYS = "kept tokens see dropped ones by other ways than softmax attention"
_SHAPE = "on fewer tokens it fails"

REFUSED = {
    "GPTNeoForCausalLM": _DIFFERS,  # a local window counted inside
    "MambaForCausalLM": _OTHER_WAYS,
    "RwkvForCausalLM": _OTHER_WAYS,
    "RecurrentGemmaForCausalLM": _OTHER_WAYS,
    "DebertaForMaskedLM (relative)": _DIFFERS,  # relative distances counted inside
    "NystromformerForMaskedLM (full)": _OTHER_WAYS,  # a convolution over the values
    "NystromformerForMaskedLM (landmarks)": "not verifiable",
    "FNetForMaskedLM": _OTHER_WAYS,
    "FunnelForMaskedLM": "cannot be routed|follow|changes with the sequence length",
    "LongformerForMaskedLM": "cannot be routed",  # windows counted inside, of lengths that must be multiples
    "BigBirdForMaskedLM (sparse)": "cannot be routed",
    "Wav2Vec2ConformerModel (relative)": _OTHER_WAYS,
    "Wav2Vec2ConformerModel (rotary)": _OTHER_WAYS,
    "UMT5ForConditionalGeneration": _DIFFERS,  # a position bias in every layer, counted inside
    "LEDForConditionalGeneration": "cannot be routed",
    "BeitModel (relative position bias)": _SHAPE,
    "SwinModel": _SHAPE,
    "beit_base_patch16_224": _SHAPE,
    "cait_xxs24_224": _OTHER_WAYS,  # heads are mixed after the softmax, with a bias
    "swin_tiny_patch4_window7_224": r"no argument holds 3-D .* \[B, S, D\]",
    "xcit_nano_12_p8_224": _OTHER_WAYS,
    "MlpMixer": _OTHER_WAYS,
    "SwinTransformer": r"no argument holds 3-D .* \[B, S, D\]",
    "Encoder (rotary)": _DIFFERS,
    "Encoder (alibi)": _DIFFERS,
    "TransformerWrapper": "never called",
}
