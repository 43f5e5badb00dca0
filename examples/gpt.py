"""A small byte-level GPT: pre-norm blocks, causal attention, rotary positions, tied embedding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltd_fx

VOCABULARY = 256  # bytes
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """The size of the model."""

    layers: int = 8
    width: int = 192
    heads: int = 6
    max_length: int = 256


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Apply the layer to ``x`` ``[B, S, D]``; ``rotary`` holds cos and sin, each ``[B | 1, S, head_dim]``."""
        x = x + self.attend(self.attention_norm(x), rotary)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    def attend(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # ltd_fx keeps tokens in order, so causal among the kept ones is causal among all
        out = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, is_causal=True)
        return self.projection(out.transpose(1, 2).flatten(2))


# Tell ltd_fx what follows the tokens: `x`, and dimension 1 of both rotary tables.
ltd_fx.register_pattern(Block, ltd_fx.LayerPattern(hidden="x", aligned={"rotary": (1,)}, output=None))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (table.unsqueeze(1) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GPT(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        head_dim = config.width // config.heads
        frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(config.max_length), frequencies).repeat(1, 2)[None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 / ((2 * config.layers) ** 0.5 if name.endswith(("projection.weight", "down.weight")) else 1))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        rotary = self.cos[:, :length], self.sin[:, :length]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotary)
        return self.head(self.norm(x))
