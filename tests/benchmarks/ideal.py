"""The ideal that routing is measured against: the same layers on the first k tokens, with no routing at all."""

from typing import Any

import torch
from torch import Tensor, nn

# The arguments of a transformers decoder layer that carry the sequence, and along which dimensions.
_SEQUENCE = {"attention_mask": (2, 3), "position_ids": (1,), "position_embeddings": (1,)}


def narrow(value: Any, dims: tuple[int, ...], keep: int) -> Any:
    if isinstance(value, tuple):
        return tuple(narrow(item, dims, keep) for item in value)
    if isinstance(value, Tensor):
        for dim in dims:
            value = value.narrow(dim, 0, min(keep, value.shape[dim]))
    return value


def make_ideal(layers: nn.ModuleList, keep: int) -> None:
    """Run all but the first and last of ``layers`` on the first ``keep`` tokens; the others wait outside."""
    rest: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = {name: narrow(value, _SEQUENCE.get(name, ()), keep) for name, value in kwargs.items()}
        hidden, *others = args
        if hidden.shape[1] > keep:
            rest.append(hidden[:, keep:])
            hidden = hidden[:, :keep]
        return (hidden, *others), kwargs

    def leave(_: nn.Module, args: tuple[Any, ...]) -> Any:
        return torch.cat([args[0], rest.pop()], dim=1), *args[1:]

    for layer in layers[1:-1]:
        layer.register_forward_pre_hook(enter, with_kwargs=True)
    layers[-1].register_forward_pre_hook(leave)
