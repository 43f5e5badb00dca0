"""What is known of a tensor in a layer's graph: along which axes the tokens lie, and how its entries depend on them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

import sympy


class MixesError(Exception):
    """Tokens meet in another way than in attention, or a token's place among those that are there matters."""


class UnknownError(Exception):
    """Nothing is known of an operator, or of how it is used: neither right nor wrong."""


class Kind(Enum):
    """How an entry depends on the tokens."""

    FIXED = "independent of tokens"
    ROW = "row-wise"  # An entry at a token depends on that token; at two tokens, on both, or on their order.
    RANK = "rank"  # The place among the tokens that are there, counted by one.
    POSITION = "position"  # What was computed from places: a distance, a table's row, the length as a number.
    STATE = "state"  # What the forward changes and keeps.
    BOUNDARIES = "boundaries of documents"  # How many of the tokens that are there come before each.
    WEIGHTS = "attention weights"  # Normalised over tokens, to be contracted over them.


class Factor(NamedTuple):
    """A part of an axis: an axis of ``B * S`` has two, in the order in which they are flattened.

    Along one that carries tokens, ``lead`` entries at the start and ``tail`` at the end are there whatever is dropped:
    protected tokens, or those of another sequence that were joined to it.
    """

    size: Any  # sympy.Expr
    tokens: bool
    lead: int = 0
    tail: int = 0


Axis = tuple[Factor, ...]


@dataclass(frozen=True)
class Value:
    """The abstract value of a tensor.

    Attributes:
        kind: how its entries depend on the tokens.
        axes: its dimensions.
        hidden: whether it was computed from hidden states.
        offset: of a rank, what was added to it; of a distance between two ranks, the same; else ``None``.
        over: of attention weights, which of its axes' token factors they are normalised over, in flattened order.
    """

    kind: Kind
    axes: tuple[Axis, ...]
    hidden: bool = False
    offset: Any = None
    over: int | None = None

    def token_axes(self) -> set[int]:
        """The dimensions along which tokens lie."""
        return {d for d, axis in enumerate(self.axes) if has_tokens(axis)}

    def refuse_places(self) -> None:
        """Raise :class:`MixesError` if it counts places and was computed from hidden states."""
        if self.kind in (Kind.RANK, Kind.POSITION) and self.hidden:
            raise MixesError("it counts positions among the tokens that are there")

    def with_axes(self, axes: Iterable[Axis]) -> "Value":
        return replace(self, axes=tuple(axes))

    def __str__(self) -> str:
        sizes = ", ".join("*".join(str(f.size) for f in axis) or "1" for axis in self.axes)
        return f"{self.kind.value} [{sizes}]"


def has_tokens(axis: Axis) -> bool:
    return any(factor.tokens for factor in axis)


def size_of(axis: Axis) -> Any:
    return sympy.Mul(*(factor.size for factor in axis))


def axis_of(size: Any, length: Any, protected: int = 0) -> Axis:
    """An axis of a new tensor; tokens lie along it if its size depends on the ``length``."""
    size = sympy.sympify(size)
    if length not in size.free_symbols:
        return () if size == 1 else (Factor(size, False),)
    more = size - length
    return (Factor(size, True, max(0, protected + int(more)) if more.is_Integer else 0),)


def broadcast(values: Sequence[Value]) -> tuple[Axis, ...]:
    """The axes of what is computed from ``values`` element by element."""
    ndim = max((len(value.axes) for value in values), default=0)
    axes = []
    for d in range(-ndim, 0):
        here = [value.axes[d] for value in values if len(value.axes) >= -d]
        along = {axis for axis in here if has_tokens(axis)}
        if len(along) > 1:
            raise UnknownError("tokens lie along its inputs' axes in different ways")
        axes.append(next(iter(along), max(here, key=len)))
    return tuple(axes)


def join(values: Sequence[Value], axes: tuple[Axis, ...], *, linear: bool = False) -> Value:
    """What is computed from ``values``, an entry from one entry of each.

    Attention weights must be used ``linear``-ly: what is zero for a token that is not there stays zero.
    """
    kinds, hidden = {value.kind for value in values}, any(value.hidden for value in values)
    if Kind.WEIGHTS in kinds:
        if not linear or Kind.STATE in kinds:
            raise UnknownError("attention weights are changed")
        if hidden and kinds & {Kind.RANK, Kind.POSITION}:
            raise MixesError("it counts positions among the tokens that are there")
        if kinds & {Kind.RANK, Kind.POSITION}:
            raise UnknownError("attention weights are changed")
        weights = [value for value in values if value.kind is Kind.WEIGHTS]
        others = [value for value in values if value.kind is not Kind.WEIGHTS and has_any_tokens(value)]
        if len(weights) > 1 or others:
            raise UnknownError("attention weights are changed")
        return replace(weights[0], axes=axes, hidden=hidden)
    if Kind.STATE in kinds:
        if hidden:
            raise MixesError("it goes by a state that it changes")
        return Value(Kind.STATE, axes)
    kind = Kind.ROW if Kind.ROW in kinds else Kind.FIXED
    if kinds & {Kind.RANK, Kind.POSITION}:
        kind = Kind.POSITION
    value = Value(kind, axes, hidden)
    value.refuse_places()
    return value


def has_any_tokens(value: Value) -> bool:
    return bool(value.token_axes())


def token_factors(value: Value) -> list[Factor]:
    """The parts of axes that carry tokens: one where an entry is of a token, two where it is of a pair."""
    return [factor for axis in value.axes for factor in axis if factor.tokens]


def regroup(value: Value, sizes: Sequence[Any]) -> Value:
    """``value`` viewed with other ``sizes``: each token's entries must stay together.

    Raises:
        MixesError: the sequence is cut into pieces.
        UnknownError: the new axes cannot be told from the old ones.
    """
    flat = [factor for axis in value.axes for factor in axis if factor.size != 1]
    axes: list[Axis] = []
    for size in map(sympy.sympify, sizes):
        axis, need = [], size
        while need != 1:
            if not flat:
                raise UnknownError("its new axes cannot be told from the old ones")
            factor = flat.pop(0)
            rest = sympy.cancel(need / factor.size)
            if rest.is_Integer or (rest.is_polynomial(*rest.free_symbols) and sympy.denom(rest) == 1):
                axis.append(factor)
                need = rest
            elif not factor.tokens and need.is_Integer and factor.size % need == 0:
                axis.append(Factor(need, False))
                flat.insert(0, Factor(factor.size / need, False))
                need = sympy.Integer(1)
            elif factor.tokens and value.hidden:
                raise MixesError("it cuts the sequence into pieces")
            else:
                raise UnknownError("its new axes cannot be told from the old ones")
        axes.append(tuple(axis))
    if flat:
        raise UnknownError("its new axes cannot be told from the old ones")
    return value.with_axes(axes)


def permuted(value: Value, order: Sequence[int]) -> Value:
    """``value`` with its dimensions in another order."""
    axes = tuple(value.axes[d] for d in order)
    if value.over is None:
        return value.with_axes(axes)
    places = [(d, i) for d, axis in enumerate(value.axes) for i, factor in enumerate(axis) if factor.tokens]
    target = places[value.over]
    moved = [(d, i) for d in order for i, factor in enumerate(value.axes[d]) if factor.tokens]
    return replace(value, axes=axes, over=moved.index(target))


def normalised_axis(value: Value) -> int | None:
    """The dimension that attention weights are normalised over; ``None`` where it was flattened with others."""
    assert value.over is not None
    places = [d for d, axis in enumerate(value.axes) for factor in axis if factor.tokens]
    d = places[value.over]
    return d if len(value.axes[d]) == 1 else None
