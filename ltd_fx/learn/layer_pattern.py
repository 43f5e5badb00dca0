"""What a routed layer's forward looks like: where the hidden states are, which arguments follow the tokens."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.runtime import Draw

# Dimensions that carry the sequence, or how to gather an argument for which dimensions are not enough.
Align = tuple[Any, ...] | Callable[[Draw | None, Any], Any]


@dataclass(frozen=True)
class LayerPattern:
    """How to route a layer class.

    Args:
        hidden: the argument holding the hidden states, ``[B, S, D]`` (``[S, B, D]`` with ``batch_first=False``).
        aligned: per argument, the dimensions along which it carries the sequence; each has size S, or 1 to broadcast.
            Dimension 0 is the batch (of size B, 1, or a multiple of B such as batch times heads) unless it is listed.
            A tuple of tensors shares one entry. Instead of dimensions, an :class:`ltd_fx.Aligned`, or a tuple of one
            of them per item, or a callable ``(draw, value) -> value``. ``()`` says that an argument does not carry the
            sequence; one that is not listed is refused when it looks as if it did.
        batch_first: the layout of the hidden states.
        output: the slot of the hidden states in a tuple output; ``None``: the layer returns a bare tensor.
            A layer that returns a bare tensor is accepted with any slot.
        returned: further tensors in a tuple output: by slot, the argument that the layer hands on there (a shared
            position bias), or ``None`` for a tensor that does not carry the sequence and is returned as it is.
        dropped: slots that are ``None`` while the layer is routed: what is computed for the kept tokens only and read
            by nobody (attention weights). Any other further tensor is refused.
        cache: the argument holding a key-value cache, so that decoding in training mode can be refused: the cache of a
            routed layer lacks the dropped tokens.
    """

    hidden: str = "hidden_states"
    aligned: Mapping[str, Align] = field(default_factory=dict)
    batch_first: bool = True
    output: int | None = 0
    returned: Mapping[int, str | None] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("aligned", "returned"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def _plain(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    def __hash__(self) -> int:
        return hash(tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in self._plain()))

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerPattern, self._plain()

    def unknown_argument(self, layer_class: type[nn.Module]) -> str | None:
        """An argument that the pattern names and ``layer_class.forward`` does not have, with its role; else ``None``.

        A name may also be one of its ``**kwargs``, with dimensions but not with a callable.
        """
        parameters = forward_signature(layer_class).parameters.values()
        names = argument_names(layer_class)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [("hidden", self.hidden), ("cache", self.cache)]
        named += [("aligned", name) for name in self.aligned] + [("returned", name) for name in self.returned.values()]
        for role, name in named:
            if name is None or name in names:
                continue
            if role == "aligned" and takes_any and not callable(self.aligned[name]):
                continue
            return f"{role} argument {name!r}"
        return None

    def check(self, layer_class: type[nn.Module]) -> None:
        """See that the pattern fits ``layer_class``.

        Raises:
            LTDError: the pattern names an argument that ``layer_class.forward`` does not have.
        """
        unknown = self.unknown_argument(layer_class)
        if unknown is not None:
            names = argument_names(layer_class)
            raise LTDError(
                f"ltd_fx: the pattern of {layer_class.__name__} has {unknown}, but its forward "
                f"takes ({', '.join(names)}); correct it with "
                f"ltd_fx.register_pattern({layer_class.__name__}, LayerPattern(...))"
            )


def forward_signature(layer_class: type[nn.Module]) -> inspect.Signature:
    """The signature of ``layer_class.forward`` as a caller sees it, without ``self``."""
    signature = inspect.signature(layer_class.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def argument_names(layer_class: type[nn.Module]) -> list[str]:
    """Of ``layer_class.forward``, without ``self``, ``*args`` and ``**kwargs``."""
    parameters = forward_signature(layer_class).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
