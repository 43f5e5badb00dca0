"""How an argument of a layer follows the tokens, read off its sizes in several forwards."""

from typing import Any

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ltd_fx.errors import LTDError
from ltd_fx.learn.layer_pattern import Align
from ltd_fx.learn.observe import TensorSpec
from ltd_fx.runtime import Aligned
from ltd_fx.tree import item_of, items_of, leaves


class SizeReader:
    """Reads the sizes of one layer's arguments.

    Args:
        name: the layer's.
        sizes: of its sequence in each forward: plain numbers, or an expression in one at symbolic sizes.
        batches: of its batch, as given and in a forward at another batch size.
        near: where the sequence has the same size in all: so many rows more are taken to follow it, too.
    """

    def __init__(self, name: str, sizes: list[Any], batches: list[Any], near: int) -> None:
        self.name, self.sizes, self.batches, self.near = name, sizes, batches, near
        self.fixed = len(set(sizes)) == 1

    def entry(self, argument: str, value: Any, across: list[Any], rebatched: Any) -> Align:
        """How ``value`` follows the tokens, with what it was in the other forwards.

        Raises:
            LTDError: it does in no way that can be gathered.
        """
        items = items_of(value)
        if items is not None:
            entries = [
                self.entry(argument, item, [item_of(other, i) for other in across], item_of(rebatched, i))
                for i, item in enumerate(items)
            ]
            tensors = [e for e, item in zip(entries, items, strict=True) if any(map(_follows, leaves(item)))]
            alone = all(leaf is None or _follows(leaf) for leaf in leaves(value))
            if alone and all(e == tensors[0] for e in tensors):
                return tensors[0] if tensors else ()
            return tuple(e or None for e in entries) if any(entries) else ()
        if isinstance(value, BlockMask):
            return (2, 3)
        if not isinstance(value, Tensor):
            return ()
        return self._tensor(argument, value, [v for v in across if _is_sized(v)], rebatched)

    def moves(self, value: Tensor, other: Any) -> bool:
        """Whether a size of ``value`` changes with the length, ``other`` being what it was in another forward."""
        if not _is_sized(other) or len(other.shape) != value.ndim:
            return True
        return any(_varies(a, b, self.sizes[-1]) for a, b in zip(value.shape, other.shape, strict=True))

    def _tensor(self, argument: str, value: Tensor, across: list[Any], rebatched: Any) -> Align:
        dims: dict[int, int | None] = {}
        for dim in range(value.ndim):
            column = [value.shape[dim], *(v.shape[dim] for v in across if len(v.shape) == value.ndim)]
            if self._follows(column):
                dims[dim] = self._prefix(argument, value, column)
        if not dims:
            return ()
        if self.fixed and 0 in dims.values():  # Where lengths have to be guessed, the nearest.
            dims = {dim: prefix for dim, prefix in dims.items() if prefix == 0}
        if len(set(dims.values())) > 1:
            raise LTDError(
                f"ltd_fx: {self.name}: argument {argument!r} of shape {tuple(value.shape)} follows the {self.sizes[0]} "
                "tokens with different offsets in its dimensions; register a LayerPattern with a callable for it"
            )
        found = Aligned(tuple(dims), self._batch_dim(value, rebatched, tuple(dims)), next(iter(dims.values())))
        usual = None if 0 in dims else 0
        return found.dims if found.batch == usual and found.prefix == 0 else found

    def _follows(self, column: list[Any]) -> bool:
        """Whether a dimension of these sizes follows the tokens."""
        if self.fixed:
            return len(set(column)) == 1 and column[0] - self.sizes[0] in (0, self.near)
        if len(column) != len(self.sizes) or len(set(column)) == 1:
            return False
        pairs = list(zip(column, self.sizes, strict=True))
        if len({n - s for n, s in pairs}) == 1:
            return True
        # Else it may follow another sequence: the encoder's.
        if _symbols(self.sizes[-1]):
            return _varies(column[0], column[-1], self.sizes[-1])
        return all((n == column[0]) == (s == self.sizes[0]) for n, s in pairs)

    def _prefix(self, argument: str, value: Tensor, column: list[Any]) -> int | None:
        """How many rows a dimension has beyond the tokens'; ``None``: as many as the batch at hand has."""
        offsets = {n - s for n, s in zip(column, self.sizes, strict=False)}
        if self.fixed or len(offsets) == 1:
            return int(column[0] - self.sizes[0])
        beyond = column[-1] - self.sizes[-1]
        if _symbols(beyond) and not _symbols(beyond) & _symbols(self.sizes[-1]):
            return None
        raise LTDError(
            f"ltd_fx: {self.name}: argument {argument!r} of shape {tuple(value.shape)} changes with the sequence "
            f"length, but is {column} long for {self.sizes} tokens; register a LayerPattern with a callable for it"
        )

    def _batch_dim(self, value: Tensor, rebatched: Any, dims: tuple[int, ...]) -> int | None:
        if _is_sized(rebatched) and len(rebatched.shape) == value.ndim:
            pairs = enumerate(zip(value.shape, rebatched.shape, strict=True))
            changed = [d for d, (a, b) in pairs if d not in dims and _varies(a, b, self.batches[-1])]
            if changed:
                return changed[0]
        elif 0 not in dims and value.shape[0] % self.batches[0] == 0:
            return 0
        return 0 if 0 not in dims and value.shape[0] == 1 else None


def _varies(first: Any, other: Any, along: Any) -> bool:
    """Whether a size is another in another forward; at symbolic sizes, whether it has symbols of ``along``."""
    return bool(_symbols(other) & _symbols(along)) if _symbols(along) else bool(other != first)


def _symbols(size: Any) -> set[Any]:
    return getattr(size, "free_symbols", None) or set()


def _is_sized(value: Any) -> bool:
    return isinstance(value, (Tensor, TensorSpec))


def _follows(value: Any) -> bool:
    return isinstance(value, (Tensor, BlockMask))
