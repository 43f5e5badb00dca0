"""transformers' reentrant checkpointing: what needs gradients reaches the layer by position, and gets them."""

import pytest
import torch
from conftest import assert_same, checkpoint_layers

import ltd_fx

transformers = pytest.importorskip("transformers")

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART = {
    **TOKENS,
    "forced_eos_token_id": 2,
    "vocab_size": 64,
    "d_model": 32,
    **{f"{side}_layers": 3 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 24, "max_target_positions": 32}
MODELS = {"Bart": BART, "MBart": BART, "T5": T5 | {"decoder_start_token_id": 0}, "Whisper": WHISPER}


@pytest.mark.compat("transformers")
@pytest.mark.slow
@pytest.mark.parametrize("family", ["Bart", "MBart", "T5", "Whisper"])
def test_gradients_are_the_plain_runs(family: str) -> None:
    generator = torch.Generator().manual_seed(1)
    decoder = torch.randint(3, 64, (2, 18), generator=generator)
    if family == "Whisper":
        inputs = {"input_features": torch.randn(2, 8, 48, generator=generator)}
    else:
        inputs = {"input_ids": torch.randint(3, 64, (2, 24), generator=generator)}
    each = []
    for reentrant in (None, True, False):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**MODELS[family])
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config).train()
        if reentrant is not None:
            checkpoint_layers(model, use_reentrant=reentrant)
        ltd_fx.transform(model)
        model(**inputs, decoder_input_ids=decoder, use_cache=False).logits.square().mean().backward()
        each.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        kept = ltd_fx.sampled_indices(model)
        assert sorted(rows.shape[1] for rows in kept.values()) == [9, 12]  # encoder and decoder
    assert_same([each[1], each[2]], [each[0], each[0]])
