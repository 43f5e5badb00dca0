"""A copy of a layer with random weights, whose behaviour does not hide behind zeros."""

import copy
import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ltd_fx.learn import may_change
from ltd_fx.passes import RoutedLayer, swap_back
from ltd_fx.prove.reference import NotVerifiableError
from ltd_fx.torch_private import hooks_of

# Random numbers are repeated from a pool of this many, a prime: no two rows of a matrix are alike, and it is quick.
_POOL = 65537


def random_copy(slot: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``slot`` in ``dtype``, in eval mode and routed no more.

    Raises:
        NotVerifiableError: it cannot be copied.
    """
    # Hooks may hold all of the user's program: those that compute are called as they are, and none is copied.
    memo: dict[int, Any] = {}
    for module in slot.modules():
        for place, hooks in enumerate(hooks_of(module)):
            called = may_change if place < 2 and module is not slot else _never
            memo[id(hooks)] = OrderedDict((number, hook) for number, hook in hooks.items() if called(hook))
    try:
        layer = copy.deepcopy(slot, memo)
    except Exception as error:
        raise NotVerifiableError(f"it cannot be copied: {type(error).__name__}: {error}") from error
    if isinstance(layer, RoutedLayer):
        swap_back(layer)
    layer = layer.to(dtype).eval()
    pool = noise((_POOL,), dtype, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.is_floating_point():
                continue
            drawn = _fill(parameter, pool)
            if parameter.ndim < 2:
                parameter.add_(drawn, alpha=0.3)
            else:
                parameter.copy_(drawn.mul_(1.5 / math.sqrt(max(parameter.shape[-2:]))))
        for buffer in layer.buffers():
            # A table that is yet to be filled would hide that it is read by place.
            if buffer.ndim and buffer.is_floating_point() and not buffer.any():
                buffer.data = _fill(buffer, pool).abs()  # not written into: it may be expanded
    return layer


def _never(hook: Any) -> bool:
    return False


def noise(shape: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal random numbers of ``shape``, on the CPU."""
    # The random numbers are made on the CPU, whatever the default device is.
    return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")


def _fill(like: Tensor, pool: Tensor) -> Tensor:
    """The pool's numbers, again and again, in the shape of ``like``."""
    flat = torch.empty(like.numel(), dtype=pool.dtype, device="cpu")
    whole = flat.numel() // _POOL * _POOL
    flat[:whole].view(-1, _POOL)[:] = pool
    flat[whole:] = pool[: flat.numel() - whole]
    return flat.view(like.shape).to(like.device)
