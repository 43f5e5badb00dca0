"""When two layers are alike: what is true of one, but for its weights, is true of the other."""

import inspect
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from ltd_fx.learn.hooks import forward_hooks, may_change
from ltd_fx.learn.numbers import NUMBERS
from ltd_fx.torch_private import pytree
from ltd_fx.torch_private_dynamo import COMPILED_CALL
from ltd_fx.tree import leaves

_OWN = {*NUMBERS, COMPILED_CALL}  # Each layer has another, and is none the less like the others.


def likeness(slot: nn.Module) -> Any:
    """What a layer is apart from its weights and its number in the stack (see :meth:`Sandbox.goes_by_number`)."""
    return tuple(
        (
            name,
            module.code if isinstance(module, fx.GraphModule) else type(module),  # fx makes a class for each
            tuple((n, p.shape, p.dtype) for n, p in module.named_parameters(recurse=False, remove_duplicate=False)),
            tuple((n, _content(b)) for n, b in module.named_buffers(recurse=False, remove_duplicate=False)),
            tuple((n, repr(v)) for n, v in sorted(vars(module).items()) if n not in _OWN and _is_plain(v)),
            tuple(id(hook) for hook in forward_hooks(module) if module is not slot and may_change(hook)),
        )
        for name, module in slot.named_modules()
    )


def _is_plain(value: Any) -> bool:
    plain = (bool, int, float, str, tuple, list, Enum, torch.dtype)
    return value is None or isinstance(value, plain) or inspect.isfunction(value)


def _content(buffer: torch.Tensor) -> Any:
    """A buffer by value: it may be a window, of another width in every other layer."""
    if buffer.device.type == "meta":
        return buffer.shape, buffer.dtype
    flat = buffer.detach().cpu().contiguous().reshape(-1)
    return buffer.shape, buffer.dtype, hash(flat.view(torch.uint8).numpy().tobytes())


def shapes(args: Any, kwargs: Any) -> str:
    """The arguments of a call, with shapes for tensors."""
    return repr(pytree.tree_map_only(torch.Tensor, lambda t: (t.shape, t.dtype, t.device), (args, kwargs)))


def structure(call: Any) -> Any:
    """What a layer is given and returns, with shapes for tensors and no other values."""
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in leaves(call[1:])]
