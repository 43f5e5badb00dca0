"""Arguments and outputs of layers as trees: tuples, lists, mappings and dataclasses of tensors."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def items_of(value: Any) -> list[Any] | None:
    """What ``value`` holds, if it is a container."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (tuple, list)):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, BlockMask)):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def like(value: Any, items: list[Any]) -> Any:
    """``items`` as the kind of tuple, list, mapping or dataclass that ``value`` is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: item for f, item in zip(dataclasses.fields(value), items, strict=True)}
        )
    if isinstance(value, Mapping):
        return type(value)(zip(value, items, strict=True))  # type: ignore[call-arg]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


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
