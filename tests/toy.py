"""A small layer and model whose pattern the tests choose."""

from typing import Any

from torch import Tensor, nn

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
