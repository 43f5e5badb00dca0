"""A small byte-level GPT: pre-norm blocks, causal attention, rotary positions, tied embeddings."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltd_fx

VOCABULARY = 256  # the bytes
Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """The size of the model; ``max_length`` is the longest sequence, in tokens."""

    layers: int
    width: int
    heads: int
    max_length: int


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.projection = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

        residual_std = 0.02 / math.sqrt(2 * config.layers)  # the residual stream adds up 2 * layers branches
        for linear, std in (
            (self.qkv, 0.02),
            (self.projection, residual_std),
            (self.up, 0.02),
            (self.down, residual_std),
        ):
            nn.init.normal_(linear.weight, std=std)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Map ``x`` ``[B, S, D]`` to the same shape; ``rotary`` is (cos, sin), each ``[B or 1, S, head_dim]``."""
        x = x + self.attend(self.attention_norm(x), rotary)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))

    def attend(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Causal self-attention. Kept tokens stay in order, so causal among them is causal in the sequence."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, S, head_dim]
        out = F.scaled_dot_product_attention(rotate(q, rotary), rotate(k, rotary), v, is_causal=True)
        return self.projection(out.transpose(1, 2).flatten(2))


# All that ltd_fx must know: tokens are gathered from `x`, and along dimension 1 of both rotary tables.
ltd_fx.register_pattern(Block, ltd_fx.LayerPattern(hidden="x", aligned={"rotary": (1,)}, output=None))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary position embedding of queries or keys ``[B, heads, S, head_dim]``."""
    cos, sin = (table.unsqueeze(1) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class GPT(nn.Module):
    """Bytes ``[B, S]`` to next-byte logits ``[B, S, 256]``."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

        head_dim = config.width // config.heads
        frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(config.max_length), frequencies).repeat(1, 2)[None]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the byte after each of ``tokens``."""
        x = self.embedding(tokens)
        rotary = self.rotary(tokens.shape[1])
        for block in self.blocks:
            x = block(x, rotary)
        return F.linear(self.norm(x), self.embedding.weight)

    def rotary(self, length: int) -> Rotary:
        """The tables of the first ``length`` positions."""
        return self.cos[:, :length], self.sin[:, :length]

    @torch.inference_mode()
    def generate(self, prompt: bytes, length: int, *, temperature: float = 0.7, seed: int = 0) -> bytes:
        """``prompt`` continued by ``length`` sampled bytes."""
        tokens = torch.tensor([list(prompt)], device=self.cos.device)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
        for _ in range(length):
            logits = self(tokens[:, -self.config.max_length :])[0, -1]
            probabilities = (logits.float() / temperature).softmax(-1).cpu()
            sampled = torch.multinomial(probabilities, 1, generator=generator).to(tokens.device)
            tokens = torch.cat((tokens, sampled[None]), dim=1)
        return bytes(tokens[0].tolist())
