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
        if self.family == "dit":
            torch.manual_seed(0)
            return DiT(self.width, self.depth).train()
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
        if self.family == "dit":
            shape = self.batch, self.tokens, self.width
            return {
                "hidden_states": torch.randn(shape, generator=generator),
                "conditioning": torch.randn(self.batch, self.width, generator=generator),
            }
        ids = torch.randint(1, 1000, (self.batch, self.tokens), generator=generator)
        if not self.padded:
            return {"input_ids": ids}
        mask = torch.ones_like(ids)
        mask[0, self.tokens * 3 // 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask}


class DiTBlock(nn.Module):
    """Scaled and shifted by the conditioning, which does not carry the tokens (Peebles and Xie, arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        parts = self.modulation(nn.functional.silu(conditioning))[:, None].chunk(6, -1)
        attended = self.qkv(self.norms[0](hidden_states) * (1 + parts[0]) + parts[1]).unflatten(-1, (3, self.heads, -1))
        attended = nn.functional.scaled_dot_product_attention(*attended.permute(2, 0, 3, 1, 4))
        hidden_states = hidden_states + parts[2] * self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = self.mlp(self.norms[1](hidden_states) * (1 + parts[3]) + parts[4])
        return hidden_states + parts[5] * mixed


class DiT(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DiTBlock(width) for _ in range(depth))

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> tuple[Tensor]:
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning)
        return (hidden_states,)


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
