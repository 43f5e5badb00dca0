"""The models that are measured: bodies of transformers' Llama, BERT and ViT with random weights, in training mode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    """What is run: ``tokens`` per sequence (a ViT has one more, its class token), ``share`` = S / k."""

    family: str = "llama"
    width: int = 512
    tokens: int = 1024
    share: int = 2
    padded: bool = False
    batch: int = 2
    depth: int = 3

    @property
    def seq_len(self) -> int:
        return self.tokens + (self.family == "vit")

    @property
    def keep(self) -> int:
        return self.tokens // self.share

    def __str__(self) -> str:
        padded = ", padded" if self.padded else ""
        return f"{self.family}, d={self.width}, S={self.tokens}, k=S/{self.share}{padded}"

    @property
    def _image(self) -> tuple[int, int]:
        return 128, self.tokens // 2  # 16 rows of patches

    def build(self) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.width // 64,
            "intermediate_size": 4 * self.width,
        }
        if self.family == "vit":
            config = transformers.ViTConfig(**sizes, image_size=self._image, patch_size=8)
            return transformers.ViTModel(config, add_pooling_layer=False).train()
        sizes |= {"vocab_size": 1000, "max_position_embeddings": self.tokens, "pad_token_id": 0}
        if self.family == "bert":
            config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
            return transformers.BertModel(config, add_pooling_layer=False).train()
        # the MLP of a Llama has three matrices
        config = transformers.LlamaConfig(**{**sizes, "intermediate_size": 8 * self.width // 3}, use_cache=False)
        return transformers.LlamaModel(config).train()

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.family == "vit":
            return {"pixel_values": torch.randn(self.batch, 3, *self._image, generator=generator)}
        ids = torch.randint(1, 1000, (self.batch, self.tokens), generator=generator)
        if not self.padded:
            return {"input_ids": ids}
        mask = torch.ones_like(ids)
        mask[0, self.tokens * 3 // 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask}


def layers_of(model: nn.Module) -> nn.ModuleList:
    found = model.get_submodule("encoder.layer" if "Bert" in type(model).__name__ else "layers")
    assert isinstance(found, nn.ModuleList)
    return found


def stepper(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Forward and backward; the gradients exist from the first call on."""

    def step() -> Tensor:
        output = model(**inputs)[0]
        loss: Tensor = output.logsumexp(-1).mean()
        loss.backward()
        return loss

    return step
