"""Encoders of text and of sound of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .entry import HIDDEN, INTERMEDIATE, B, Entry, S, hf, noise, text

SEP: dict[str, Any] = {"sep_token_id": 2}
RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": [16, 16],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,  # draws from numpy
}


def tokens() -> dict[str, Tensor]:
    """No attention mask: Nystromformer's landmarks fail with one."""
    return {"input_ids": text()["input_ids"]}


def waveform() -> dict[str, Tensor]:
    return {"input_values": noise(B, 400)}


def spectrogram() -> dict[str, Tensor]:
    return {"input_values": noise(B, 40, 16)}


def audio(model: str, variant: str = "", **overrides: Any) -> Entry:
    return hf(model, variant, inputs=waveform, layers=r"encoder\.layers\.\d+", **CONVOLUTIONS, **overrides)


ENTRIES: list[Entry] = [
    hf("BertForMaskedLM"),
    hf("BertForMaskedLM", "eager", attn_implementation="eager"),
    hf("RobertaForMaskedLM"),
    hf("ElectraForMaskedLM", embedding_size=HIDDEN),
    hf("XLMRobertaForMaskedLM"),
    hf("MPNetForMaskedLM"),
    hf("DistilBertForMaskedLM", hidden_dim=INTERMEDIATE),
    hf("DebertaForMaskedLM"),
    hf("DebertaForMaskedLM", "relative", **RELATIVE),
    hf("DebertaV2ForMaskedLM"),
    hf("DebertaV2ForMaskedLM", "relative", position_buckets=8, **RELATIVE),
    hf("AlbertForMaskedLM", embedding_size=16, layers=r".*\.albert_layers\.0"),
    hf("ModernBertForMaskedLM", local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, **SEP),
    hf("EsmForMaskedLM", "absolute", mask_token_id=3, position_embedding_type="absolute"),
    hf("EsmForMaskedLM", "rotary", mask_token_id=3, position_embedding_type="rotary"),
    hf("NystromformerForMaskedLM", "full", num_landmarks=S, segment_means_seq_len=S),
    hf("NystromformerForMaskedLM", "landmarks", inputs=tokens, num_landmarks=4, segment_means_seq_len=S),
    hf("FNetForMaskedLM"),
    hf(
        "FunnelForMaskedLM",
        d_head=8,
        d_inner=INTERMEDIATE,
        block_sizes=[2, 2],
        layers=r".*\.blocks\.\d\.\d",
    ),
    hf("LongformerForMaskedLM", attention_window=8, **SEP),
    hf("BigBirdForMaskedLM", "full", attention_type="original_full", **SEP),
    hf("BigBirdForMaskedLM", "sparse", attention_type="block_sparse", block_size=2, num_random_blocks=1, **SEP),
    hf("RoFormerForMaskedLM", embedding_size=HIDDEN),
    audio("Wav2Vec2Model"),
    audio("HubertModel"),
    audio("Wav2Vec2ConformerModel", "relative", position_embeddings_type="relative"),
    audio("Wav2Vec2ConformerModel", "rotary", position_embeddings_type="rotary"),
    hf("ASTModel", inputs=spectrogram, max_length=40, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8),
]
