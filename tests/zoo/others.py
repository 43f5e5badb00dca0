"""Models of torch.nn, torchvision, x-transformers and torchtitan, and one written out in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .entry import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCAB, B, Entry, S, noise, seeded, text

HEAD = HIDDEN // HEADS
MEMORY = 10


def kept() -> Tensor:
    """The text's attention mask as bool [B, S], where true is a token."""
    return text()["attention_mask"].bool()


def tokens() -> Tensor:
    return text()["input_ids"]


# torch.nn


def sequence(length: int, batch_first: bool) -> Tensor:
    made = noise(B, length, HIDDEN)
    return made if batch_first else made.transpose(0, 1)


def torch_encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INTERMEDIATE, batch_first=batch_first)
    return nn.TransformerEncoder(layer, LAYERS)


def torch_encoder_inputs(batch_first: bool) -> dict[str, Tensor]:
    far = (torch.arange(S)[:, None] - torch.arange(S)).abs() > 8
    return {"src": sequence(S, batch_first), "mask": far, "src_key_padding_mask": ~kept()}


def torch_decoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerDecoderLayer(HIDDEN, HEADS, INTERMEDIATE, batch_first=batch_first)
    return nn.TransformerDecoder(layer, LAYERS)


def torch_decoder_inputs(batch_first: bool) -> dict[str, Tensor]:
    future = torch.ones(S, S, dtype=torch.bool).triu(1)
    return {"tgt": sequence(S, batch_first), "memory": sequence(MEMORY, batch_first), "tgt_mask": future}


def torch_entries(name: str, build: Callable[[bool], nn.Module], inputs: Callable[[bool], Any]) -> list[Entry]:
    return [
        Entry("torch", f"{name} (batch_first={first})", seeded(partial(build, first)), partial(inputs, first))
        for first in (True, False)
    ]


class CausalBlock(nn.Module):
    """A layer as nanoGPT writes it: no mask among its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, INTERMEDIATE), nn.GELU(), nn.Linear(INTERMEDIATE, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class NanoGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(64, HIDDEN)
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# torchvision


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    model: nn.Module = VisionTransformer(32, 4, LAYERS, HEADS, HIDDEN, INTERMEDIATE, num_classes=8)
    return model


def torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    model: nn.Module = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=8)
    return model


def image() -> tuple[Tensor]:
    return (noise(B, 3, 32, 32),)


# x-transformers


class Stack(nn.Module):
    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


def x_stack(**options: Any) -> nn.Module:
    from x_transformers import Encoder

    return Stack(Encoder(dim=HIDDEN, depth=1, heads=HEADS, attn_dim_head=HEAD, **options) for _ in range(LAYERS))


def x_wrapper() -> nn.Module:
    from x_transformers import Decoder, TransformerWrapper

    decoder = Decoder(dim=HIDDEN, depth=LAYERS, heads=HEADS, attn_dim_head=HEAD)
    model: nn.Module = TransformerWrapper(num_tokens=VOCAB, max_seq_len=64, attn_layers=decoder)
    return model


def x_entry(variant: str, **options: Any) -> Entry:
    return Entry("x-transformers", f"Encoder ({variant})", seeded(partial(x_stack, **options)), x_inputs)


def x_inputs() -> tuple[Tensor, Tensor]:
    return noise(B, S, HIDDEN), kept()


def x_text() -> dict[str, Tensor]:
    return {"x": tokens(), "mask": kept()}


# torchtitan


def titan() -> nn.Module:
    """The debug model's parts, with the attention that runs on a CPU without compilation."""
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention

    rope = ComplexRoPE.Config(dim=HEAD, max_seq_len=64, theta=10000)
    layers = llama3._build_llama3_layers(
        n_layers=LAYERS,
        dim=HIDDEN,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        hidden_dim=INTERMEDIATE,
        rope=rope,
        attn_backend="varlen",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = llama3.Llama3Model.Config(
        dim=HIDDEN,
        vocab_size=VOCAB,
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=HIDDEN, param_init=llama3._EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=HIDDEN, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(in_features=HIDDEN, out_features=VOCAB, param_init=llama3._output_linear_init(HIDDEN)),
        layers=layers,
    ).build()
    model.init_states()
    built: nn.Module = model
    return built


ENTRIES: list[Entry] = [
    *torch_entries("TransformerEncoder", torch_encoder, torch_encoder_inputs),
    *torch_entries("TransformerDecoder", torch_decoder, torch_decoder_inputs),
    Entry("torch", "nanoGPT", seeded(NanoGPT), lambda: (tokens(),)),
    Entry("torchvision", "VisionTransformer", seeded(torchvision_vit), image),
    Entry("torchvision", "SwinTransformer", seeded(torchvision_swin), image, layers=r"features\.[13]\.\d+"),
    x_entry("no positions"),
    x_entry("rotary", rotary_pos_emb=True),
    x_entry("alibi", alibi_pos_bias=True),
    Entry("x-transformers", "TransformerWrapper", seeded(x_wrapper), x_text, layers=r"attn_layers\.layers\.\d+"),
    Entry("torchtitan", "Llama3Model", seeded(titan), lambda: (tokens(),), layers=r"layers\.\d+"),
]
