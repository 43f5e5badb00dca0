"""A small layer and model whose pattern the tests choose."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import ltd_fx
from ltd_fx import LayerPattern


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, stream: Tensor, scale: Tensor | None = None, *, shift: float = 0.0) -> tuple[Tensor, None]:
        out = stream + self.linear(stream) + shift
        return (out if scale is None else out * scale[..., None]), None


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, stream: Tensor, scale: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            stream, _ = block(stream, scale)
        return stream


PATTERN = LayerPattern(hidden="stream", aligned={"scale": (1,)}, output=0)


def snapshot(model: nn.Module) -> Any:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()], list(model.state_dict()), hooks


class Encoder(nn.Module):
    """Layers of torch's own, of which all but the first and last are routed."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True) for _ in range(depth))

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class Rows(nn.Module):
    """A layer of no known class, whose linear modules see ``[B * S, D]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.norm(hidden).flatten(0, 1)
        heads = (project(rows).view(*hidden.shape[:2], -1, 8).transpose(1, 2) for project in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(*heads).transpose(1, 2)
        return hidden + self.out(mixed.flatten(2).flatten(0, 1)).view_as(hidden)


class Wrapper(nn.Module):
    """A module of somebody's own around another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


LOOPS = 3
STREAM = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)


class Looped(nn.Module):
    """A stack of layers that is run several times over."""

    def __init__(self, checkpointed: bool = False, layer: Callable[[], nn.Module] = encoder_layer) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layer() for _ in range(3))
        self.checkpointed = checkpointed

    def forward(self, hidden: Tensor) -> Tensor:
        for _ in range(LOOPS):
            for block in self.blocks:
                hidden = checkpoint(block, hidden, use_reentrant=False) if self.checkpointed else block(hidden)
        return hidden


def statuses(model: nn.Module) -> list[str]:
    """What is known of the routed layers, in order."""
    return [site.status for site in ltd_fx.summary(model).sites if site.routed]


@contextmanager
def warned(*texts: str) -> Iterator[None]:
    """As many warnings of ours within, each with its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(warning.message) for warning in caught if str(warning.message).startswith("ltd_fx")]
    assert len(ours) == len(texts), ours
    assert all(text in message for text, message in zip(texts, ours, strict=True)), ours
