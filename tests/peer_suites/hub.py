"""Stand-ins for the tiny models that peft's tests download: the same architectures under the same names, in a cache of
the hub's, where an offline program finds them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 1024
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": {
        "model_type": "opt",
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        **SIZES,
    },
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": {"model_type": "gpt2", **NO_DROPOUT, **SIZES},
    "hf-internal-testing/tiny-random-gpt2": {"model_type": "gpt2", **NO_DROPOUT, **SIZES},
    "peft-internal-testing/tiny-random-GPTJForCausalLM": {
        "model_type": "gptj",
        "rotary_dim": 4,
        **NO_DROPOUT,
        **SIZES,
    },
    "trl-internal-testing/tiny-random-LlamaForCausalLM": {"model_type": "llama", **GROUPED},
    "peft-internal-testing/tiny-dummy-qwen2": {"model_type": "qwen2", **GROUPED},
    "hf-internal-testing/tiny-random-MistralForCausalLM": {"model_type": "mistral", **GROUPED},
    "trl-internal-testing/tiny-Qwen3ForCausalLM": {"model_type": "qwen3", "head_dim": 8, **GROUPED},
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": {"model_type": "gemma3_text", "head_dim": 8, **GROUPED},
}


def fill(cache: Path) -> None:
    """Put the models, each with a tokenizer of bytes, where ``HF_HUB_CACHE=cache`` finds them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    for name, settings in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / "0"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(snapshot)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")


def stay_offline() -> None:
    """peft's tests go online for the first use of a model, whatever ``HF_HUB_OFFLINE`` is."""
    from tests import testing_utils

    testing_utils.hub_online_once = lambda model_id: nullcontext()
