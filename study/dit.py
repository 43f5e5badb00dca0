"""A small diffusion transformer (DiT, arXiv 2212.09748): adaLN-zero blocks on patches of an image."""

import math

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from torch import Tensor, nn


class Block(nn.Module):
    """One layer; the condition scales, shifts and gates both of its halves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` ``[B, S, D]`` to the same shape; ``condition`` ``[B, D]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Noisy images ``[B, 1, H, W]``, times ``[B]`` in [0, 1] and classes ``[B]`` to velocities ``[B, 1, H, W]``.

    Class number ``classes`` stands for none.
    """

    def __init__(self, side: int, patch: int, classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.side, self.patch, self.width = side, patch, width
        self.embed = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.5)
        self.classes = nn.Embedding(classes + 1, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch * patch)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, times: Tensor, classes: Tensor) -> Tensor:
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        x = self.embed(patches) + self.position
        condition = self.time(self.waves(times)) + self.classes(classes)
        for block in self.blocks:
            x = block(x, condition)
        patches = self.head(self.norm(x)).transpose(1, 2)
        return F.fold(patches, (self.side, self.side), self.patch, stride=self.patch)

    def waves(self, times: Tensor) -> Tensor:
        """``[B]`` to sines and cosines ``[B, D]``."""
        half = self.width // 2
        frequencies = torch.exp(-math.log(1000.0) * torch.arange(half, device=times.device) / half)
        angles = 1000 * times[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)
