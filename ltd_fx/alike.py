"""When two layers are alike: what is true of one, but for its weights, is true of the other."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"}


def likeness(slot: nn.Module) -> Any:
    """What a layer is apart from its weights and its number in the stack."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, p.shape, p.dtype) for n, p in module._parameters.items() if p is not None),
            tuple((n, repr(v)) for n, v in sorted(vars(module).items()) if n not in _NUMBERS and _is_plain(v)),
        )
        for name, module in slot.named_modules()
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple)) or inspect.isfunction(value)


def shapes(args: Any, kwargs: Any) -> str:
    """The arguments of a call, with shapes for tensors."""
    return repr(pytree.tree_map_only(torch.Tensor, lambda t: (t.shape, t.dtype, t.device), (args, kwargs)))
