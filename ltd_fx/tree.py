"""Arguments and outputs of layers as trees: tuples, lists, mappings and dataclasses of tensors."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def items_of(value: Any) -> list[Any] | None:
    """What ``value`` holds, if it is a container."""
    if value is None or isinstance(value, (Tensor, int, float, str)):
        return None  # Most values are one of these, and the Dynamo of torch 2.11 does not trace is_dataclass(None).
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, BlockMask)):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def item_of(value: Any, i: int) -> Any:
    """The ``i``-th of what ``value`` holds; ``None`` where there is none."""
    items = items_of(value)
    return items[i] if items is not None and i < len(items) else None


def like(value: Any, items: list[Any]) -> Any:
    """``items`` as the kind of tuple, list, mapping or dataclass that ``value`` is."""
    kind: Any = type(value)
    if isinstance(value, Mapping):
        named = dict(zip(value, items, strict=True))
        # transformers' outputs are both, and hold what is not None.
        return kind(**named) if dataclasses.is_dataclass(value) else kind(named)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **dict(zip(names, items, strict=True)))  # type: ignore[type-var]
    return kind(*items) if hasattr(value, "_fields") else kind(items)


def leaves(value: Any) -> Iterator[Any]:
    """What a tree holds, in order."""
    items = items_of(value)
    if items is None:
        yield value
    else:
        for item in items:
            yield from leaves(item)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in it."""
    items = items_of(value)
    if items is not None:
        return like(value, [map_tensors(function, item) for item in items])
    return function(value) if isinstance(value, Tensor) else value
