"""Encoder-decoder models of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .entry import HEADS, HIDDEN, INTERMEDIATE, LAYERS, B, Entry, S, config, hf, noise, text

TARGET = 18
T5: dict[str, Any] = {
    "d_kv": HIDDEN // HEADS,
    "d_ff": INTERMEDIATE,
    "num_decoder_layers": LAYERS,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INTERMEDIATE,
    "decoder_ffn_dim": INTERMEDIATE,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


def target(length: int = TARGET) -> dict[str, Tensor]:
    return {f"decoder_{name}": tensor for name, tensor in text(length).items()}


def texts(length: int = TARGET) -> dict[str, Tensor]:
    return text() | target(length)


def speech() -> dict[str, Tensor]:
    return {"input_features": noise(B, 16, 2 * S)} | target()


def encoder_decoder() -> nn.Module:
    import transformers

    encoder = config("BertGenerationConfig")
    decoder = config("BertGenerationConfig", is_decoder=True, add_cross_attention=True)
    made = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    torch.manual_seed(0)
    return transformers.EncoderDecoderModel(config=made)


equal = partial(texts, S)

ENTRIES: list[Entry] = [
    hf("T5ForConditionalGeneration", inputs=texts, **T5),
    hf("T5ForConditionalGeneration", "equal lengths", inputs=equal, **T5),
    hf("MT5ForConditionalGeneration", inputs=texts, **T5),
    hf("UMT5ForConditionalGeneration", inputs=texts, **T5),
    hf("BartForConditionalGeneration", inputs=texts, **BART),
    hf("BartForConditionalGeneration", "equal lengths", inputs=equal, **BART),
    hf("MBartForConditionalGeneration", inputs=texts, **BART),
    hf("PegasusForConditionalGeneration", inputs=texts, **BART),
    hf("MarianMTModel", config="MarianConfig", inputs=texts, **BART),
    hf(
        "WhisperForConditionalGeneration",
        inputs=speech,
        num_mel_bins=16,
        max_source_positions=S,
        max_target_positions=64,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **BART,
    ),
    hf("M2M100ForConditionalGeneration", inputs=texts, **BART),
    hf(
        "LEDForConditionalGeneration",
        inputs=texts,
        attention_window=8,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        **BART,
    ),
    Entry("transformers", "EncoderDecoderModel (BertGeneration)", encoder_decoder, texts),
]
