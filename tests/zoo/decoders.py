"""Decoder-only language models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .entry import HEADS, HIDDEN, INTERMEDIATE, LAYERS, B, Entry, S, hf, text

MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
MROPE: dict[str, Any] = ROPE | {"mrope_section": [1, 1, 2]}
SLIDING: dict[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
HEAD = HIDDEN // HEADS


def text_3d() -> dict[str, Tensor]:
    return text() | {"position_ids": torch.arange(S).expand(3, B, S)}


ENTRIES: list[Entry] = [
    hf("LlamaForCausalLM"),
    hf("LlamaForCausalLM", "eager", attn_implementation="eager"),
    hf("MistralForCausalLM", "sliding window", sliding_window=5),
    hf("Qwen2ForCausalLM"),
    hf("Qwen3ForCausalLM", head_dim=HEAD),
    hf("GemmaForCausalLM", head_dim=HEAD),
    hf("Gemma2ForCausalLM", head_dim=HEAD, **SLIDING),
    hf("Gemma3ForCausalLM", config="Gemma3TextConfig", head_dim=HEAD, **SLIDING),
    hf("Olmo2ForCausalLM"),
    hf("PhiForCausalLM"),
    hf("Phi3ForCausalLM"),
    hf("GPT2LMHeadModel", config="GPT2Config"),
    hf("GPTNeoXForCausalLM"),
    hf("GPTJForCausalLM", rotary_dim=4),
    hf("GPTNeoForCausalLM", attention_types=[[["global", "local"], LAYERS // 2]], window_size=8),
    hf("GPTBigCodeForCausalLM"),
    hf("OPTForCausalLM", ffn_dim=INTERMEDIATE, word_embed_proj_dim=HIDDEN),
    hf("BloomForCausalLM"),
    hf("FalconForCausalLM", "rotary", alibi=False),
    hf("FalconForCausalLM", "alibi", alibi=True),
    hf("MptForCausalLM", max_seq_len=64),
    hf("StableLmForCausalLM"),
    hf("Starcoder2ForCausalLM"),
    hf("CohereForCausalLM"),
    hf("MixtralForCausalLM", **MOE),
    hf("Qwen2MoeForCausalLM", moe_intermediate_size=16, shared_expert_intermediate_size=16, **MOE),
    hf("Qwen3MoeForCausalLM", moe_intermediate_size=16, head_dim=HEAD, **MOE),
    hf("GptOssForCausalLM", head_dim=HEAD, rope_parameters=ROPE, **SLIDING, **MOE),
    hf("GraniteForCausalLM"),
    hf("CodeGenForCausalLM", rotary_dim=4),
    hf("XGLMForCausalLM", ffn_dim=INTERMEDIATE),
    hf("BioGptForCausalLM"),
    hf("Qwen2VLTextModel", config="Qwen2VLTextConfig", inputs=text_3d, rope_parameters=MROPE),
    hf(
        "Llama4ForCausalLM",
        config="Llama4TextConfig",
        head_dim=HEAD,
        intermediate_size_mlp=INTERMEDIATE,
        attention_chunk_size=8,
        **MOE,
    ),
    hf(
        "DeepseekV3ForCausalLM",
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=HEAD,
        num_key_value_heads=HEADS,
    ),
    hf("MambaForCausalLM", state_size=4),
    hf("RwkvForCausalLM", attention_hidden_size=HIDDEN),
    hf("RecurrentGemmaForCausalLM", head_dim=HEAD, lru_width=HIDDEN, attention_window_size=8),
]
