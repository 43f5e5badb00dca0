"""A layer's number in its stack: handed on to a cache, in most models; in others it decides what the layer does."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

NUMBERS = frozenset(("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx"))
_USES = (
    *("eq", "ne", "lt", "le", "gt", "ge", "bool", "float", "neg", "hash"),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "mod", "rmod", "floordiv", "truediv", "pow", "rpow", "and", "rand"),
)


class LayerNumber(int):
    """An integer that says when something is computed from it, except by a key-value cache."""

    used: Callable[[], None]


def _noting(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: LayerNumber, *args: Any) -> Any:
        frame = inspect.currentframe()
        caller = frame.f_back.f_locals.get("self") if frame is not None and frame.f_back is not None else None
        if not hasattr(caller, "get_seq_length"):
            self.used()
        return plain(self, *args)

    return method


for _name in _USES:
    setattr(LayerNumber, f"__{_name}__", _noting(f"__{_name}__"))


def watch_number(module: nn.Module, used: Callable[[], None]) -> None:
    """Until its ``__dict__`` is put back, have ``used`` called when the module computes something from its number."""
    for name in NUMBERS & module.__dict__.keys():
        if type(module.__dict__[name]) is int:
            number = LayerNumber(module.__dict__[name])
            number.used = used
            module.__dict__[name] = number
