"""A small decoder whose layers take a rotary table and a mask, for tests of traced graphs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

D, HEADS, WORDS, LENGTH = 16, 2, 32, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.drop = nn.Dropout(0.0)
        self.register_buffer("unused", torch.zeros(3))

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q * rope[:, None], k * rope[:, None], v, attn_mask=mask)
        return x + self.drop(self.o(mixed.transpose(1, 2).reshape(batch, length, D)))


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, D), nn.Linear(D, WORDS)
        self.layers = nn.ModuleList(make() for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x, places = self.embed(ids), torch.arange(ids.shape[1])
        rope = (places[None, :, None] * 0.1).cos().expand(1, -1, D // HEADS)
        mask = (places[:, None] >= places)[None, None]
        for layer in self.layers:
            x = layer(x, rope, mask)
        return self.head(x)


def words(length: int) -> Tensor:
    return torch.randint(0, WORDS, (3, length), generator=torch.Generator().manual_seed(length))


class TwoResults(Block):
    def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Any:
        made = super().forward(x, rope, mask)
        return made, made.mean()


class TakesBoth(Net):
    def forward(self, ids: Tensor) -> Tensor:
        x, total = self.embed(ids), torch.zeros(())
        for layer in self.layers:
            x, mean = layer(x, torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool))
            total = total + mean
        return self.head(x) + total
