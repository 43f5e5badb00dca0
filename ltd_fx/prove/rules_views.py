"""The rules of token flow for operators that only arrange: views, parts, joins and look-ups."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy

from ltd_fx.prove.flow import Op, rule
from ltd_fx.prove.values import (
    Axis,
    Factor,
    Kind,
    MixesError,
    UnknownError,
    Value,
    broadcast,
    has_any_tokens,
    has_tokens,
    join,
    permuted,
    regroup,
    size_of,
)
from ltd_fx.torch_private_sizes import size_expr


def _sizes(op: Op) -> list[Any]:
    return [size_expr(n) for n in op.out.shape]


@rule("view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as ravel _reshape_alias reshape_as")
def view(op: Op) -> Value:
    if "dtype" in op.names:
        raise UnknownError("its entries are read as of another dtype")
    return regroup(op.operands()[0], _sizes(op))


@rule("transpose swapaxes swapdims")
def transpose(op: Op) -> Value:
    value = op.value("self")
    names = ("dim0", "dim1") if "dim0" in op.names else ("axis0", "axis1")
    first, second = (op.dim(name, len(value.axes)) for name in names)
    order = list(range(len(value.axes)))
    order[first], order[second] = second, first
    return permuted(value, order)


@rule("t numpy_T mT adjoint matrix_H mH")
def transposed(op: Op) -> Value:
    value = op.value("self")
    order = list(range(len(value.axes)))
    if op.name == "numpy_T":
        order.reverse()
    else:
        order[-2:] = reversed(order[-2:])
    return permuted(value, order)


@rule("permute")
def permute(op: Op) -> Value:
    value = op.value("self")
    return permuted(value, [int(d) % len(value.axes) for d in op["dims"]])


@rule("movedim moveaxis")
def movedim(op: Op) -> Value:
    value = op.value("self")
    ndim = len(value.axes)
    source, target = ([x] if isinstance(x, int) else list(x) for x in (op["source"], op["destination"]))
    order: list[int | None] = [None] * ndim
    for s, t in zip(source, target, strict=True):
        order[t % ndim] = s % ndim
    rest = iter(d for d in range(ndim) if d not in order)
    return permuted(value, [next(rest) if d is None else d for d in order])


@rule("expand expand_as broadcast_to repeat tile")
def expand(op: Op) -> Value:
    """Axes of size 1 repeated; others as they are, or repeated where they carry no tokens."""
    value, axes = op.operands()[0], []
    if value.kind is Kind.WEIGHTS and sum(map(has_tokens, op.axes(op.out.shape))) != len(value.token_axes()):
        raise UnknownError("attention weights are repeated")
    for d, size in zip(range(-len(op.out.shape), 0), _sizes(op), strict=True):
        before: Axis = value.axes[d] if len(value.axes) >= -d else ()
        if size_of(before) == size:
            axes.append(before)
        elif has_tokens(before) or (before and has_tokens(op.axis(size))):
            raise UnknownError("tokens are repeated")
        else:
            axes.append(op.axis(size))
    return value.with_axes(axes)


@rule("repeat_interleave")
def repeat_interleave(op: Op) -> Value:
    value, dim = op.value("self"), op["dim"]
    if dim is None or has_tokens(value.axes[int(dim) % len(value.axes)]):
        raise UnknownError("tokens are repeated")
    d = int(dim) % len(value.axes)
    repeated = op.axis(op.out.shape[d])
    if value.axes[d] and has_tokens(repeated):
        raise UnknownError("tokens are repeated")
    return value.with_axes(_replaced(value.axes, d, repeated))


# ---- parts


@rule("select")
def select(op: Op) -> Value:
    value = op.value("self")
    d = op.dim("dim", len(value.axes))
    if not has_tokens(value.axes[d]) or not 0 <= op["index"] < value.axes[d][0].lead:
        _refuse_part(value, value.axes[d])
    return join([value], (*value.axes[:d], *value.axes[d + 1 :]), linear=True)


@rule("slice narrow")
def part(op: Op) -> Value:
    value = op.value("self")
    d = op.dim("dim", len(value.axes))
    if op.name == "slice" and op["step"] != 1 and has_tokens(value.axes[d]):
        _refuse_part(value, value.axes[d])
    start = size_expr(op["start"] or 0)
    start = start + size_of(value.axes[d]) if start.is_Integer and start < 0 else start
    return _cut(op, value, d, start, size_expr(op.out.shape[d]))


def _cut(op: Op, value: Value, d: int, start: Any, size: Any) -> Value:
    """``size`` entries along ``d``, from ``start``."""
    before = value.axes[d]
    if size_of(before) == size:
        return value
    if has_tokens(before):
        return value.with_axes(_replaced(value.axes, d, _part_of(value, before, start, size)))
    result = value.with_axes(_replaced(value.axes, d, op.axis_of(size)))
    if has_tokens(result.axes[d]):  # So many rows of a table, the first ones.
        if has_any_tokens(value):
            raise UnknownError("a square table by place, which may be a mask of who comes first")
        result = replace(result, kind=Kind.POSITION)
        result.refuse_places()
    return result


@rule("split split_with_sizes chunk tensor_split unbind unsafe_split unsafe_chunk hsplit")
def split(op: Op) -> list[Value]:
    value = op.value("self")
    d = op.dim("dim", len(value.axes))
    if op.name == "unbind":
        _refuse_part(value, value.axes[d])
        return [join([value], (*value.axes[:d], *value.axes[d + 1 :]), linear=True)] * len(op.out)
    start, parts = sympy.Integer(0), []
    for made in op.out:
        size = size_expr(made.shape[d])
        parts.append(_cut(op, value, d, start, size))
        start += size
    return parts


def _part_of(value: Value, axis: Axis, start: Any, size: Any) -> Axis:
    """A part of an axis of tokens: some of those that are always there, or all but these.

    Raises:
        MixesError: the part is of tokens that may be dropped.
        UnknownError: the same of an argument.
    """
    factor = axis[0]
    after = factor.size - start - size
    if len(axis) == 1 and value.kind is Kind.ROW:
        if size.is_Integer and start.is_Integer and start + size <= factor.lead:
            return () if size == 1 else (Factor(size, False),)
        if size.is_Integer and after.is_Integer and after + size <= factor.tail:
            return () if size == 1 else (Factor(size, False),)
    plain = len(axis) == 1 and value.kind in (Kind.ROW, Kind.WEIGHTS) and start.is_Integer and after.is_Integer
    if plain and start <= factor.lead and 0 <= after <= factor.tail:
        return (Factor(size, True, factor.lead - int(start), factor.tail - int(after)),)
    _refuse_part(value, axis)
    raise AssertionError


def _refuse_part(value: Value, axis: Axis) -> None:
    if has_tokens(axis):
        if value.hidden:
            raise MixesError("it takes some of the tokens by their places")
        raise UnknownError("it takes a part of an argument by place")


@rule("diagonal diag linalg_diagonal")
def diagonal(op: Op) -> Value:
    if any(value.token_axes() for value in op.operands()):
        raise UnknownError("a diagonal of tokens")
    return join(op.operands(), op.axes(op.out.shape))


# ---- joins


@rule("cat concat concatenate")
def cat(op: Op) -> Value:
    values = [value for value in op.values("tensors") if value.axes]
    d = op.dim("dim", len(values[0].axes))
    along = [i for i, value in enumerate(values) if has_tokens(value.axes[d])]
    if along:
        sizes = [size_of(value.axes[d]) for value in values]
        joined = values[along[0]].axes[d]
        if len(along) > 1 or len(joined) > 1:
            raise UnknownError("tokens are joined to others")
        before, after = (int(sum(part)) for part in (sizes[: along[0]], sizes[along[0] + 1 :]))
        axis = (Factor(sum(sizes), True, joined[0].lead + before, joined[0].tail + after),)
        values = [value.with_axes(_replaced(value.axes, d, axis)) for value in values]
        result = join(values, broadcast(values))
        return result if result.kind is not Kind.FIXED else replace(result, kind=Kind.ROW)
    rest = broadcast([value.with_axes(axis if i != d else () for i, axis in enumerate(value.axes)) for value in values])
    return join(values, (*rest[:d], op.axis(op.out.shape[d]), *rest[d + 1 :]))


def _replaced(axes: Sequence[Axis], d: int, axis: Axis) -> tuple[Axis, ...]:
    return (*axes[:d], axis, *axes[d + 1 :])


@rule("stack")
def stack(op: Op) -> Value:
    values = op.values("tensors")
    rest = broadcast(values)
    d = op.dim("dim", len(rest) + 1)
    return join(values, (*rest[:d], op.axis(len(values)), *rest[d:]))


@rule("pad constant_pad_nd")
def pad(op: Op) -> Value:
    value, amounts = op.value("self"), list(op["pad"])
    for i, d in enumerate(range(len(value.axes) - 1, len(value.axes) - 1 - len(amounts) // 2, -1)):
        if has_tokens(value.axes[d]) and any(amounts[2 * i : 2 * i + 2]):
            raise UnknownError("tokens are padded")
        if not has_tokens(value.axes[d]) and has_tokens(op.axis(op.out.shape[d])):
            raise UnknownError("features are padded to the length")
    return join(
        [value],
        tuple(axis if has_tokens(axis) else op.axis(n) for axis, n in zip(value.axes, op.out.shape, strict=True)),
    )


# ---- as other numbers


@rule("view_as_complex")
def view_as_complex(op: Op) -> Value:
    return op.value("self").with_axes(op.value("self").axes[:-1])


@rule("view_as_real")
def view_as_real(op: Op) -> Value:
    return op.value("self").with_axes((*op.value("self").axes, op.axis(2)))
