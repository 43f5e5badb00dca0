"""Seconds that `transform` takes to learn and prove 24 layers from example inputs.

pytest tests/benchmarks/test_transform_time.py --benchmark-only -s
"""

from typing import Any

import pytest
import torch
from torch import nn

import ltd_fx

LAYERS, HIDDEN, HEADS = 24, 1024, 16


def text() -> dict[str, Any]:
    ids = torch.randint(5, 900, (4, 2048))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    if name == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=2816, vocab_size=32000)
        return transformers.LlamaForCausalLM(config), text()
    if name == "opt":  # no built-in pattern
        config = transformers.OPTConfig(**sizes, ffn_dim=4 * HIDDEN, word_embed_proj_dim=HIDDEN)
        return transformers.OPTForCausalLM(config), text()
    config = transformers.Dinov2Config(**sizes)  # no built-in pattern, and a length that cannot be narrowed
    return transformers.Dinov2Model(config), {"pixel_values": torch.randn(8, 3, 224, 224)}


@pytest.mark.parametrize("name", ["llama", "opt", "dinov2"])
def test_transform(benchmark: Any, name: str) -> None:
    model, inputs = build(name)

    def plain() -> Any:
        if ltd_fx.is_transformed(model):
            ltd_fx.restore(model)
        return (model.train(),), {"example_inputs": inputs}

    benchmark.pedantic(ltd_fx.transform, setup=plain, rounds=3)
    times = benchmark.stats.stats
    print(f"{name}: {times.median:.2f} s ({times.min:.2f} to {times.max:.2f})")
