"""The rules of token flow for operators that take, or write, entries by an index."""

from collections.abc import Sequence
from dataclasses import replace

from ltd_fx.prove.flow import Op, rule
from ltd_fx.prove.values import Kind, MixesError, UnknownError, Value, broadcast, has_any_tokens, has_tokens, join


@rule("embedding")
def embedding(op: Op) -> Value:
    indices, weight = op.value("indices"), op.value("weight")
    if has_any_tokens(weight) or weight.kind is not Kind.FIXED:
        raise UnknownError("tokens are taken by index")
    kind = Kind.POSITION if indices.kind is Kind.RANK else indices.kind
    return replace(indices, kind=kind, axes=(*indices.axes, weight.axes[-1]), offset=None)


@rule("index_select")
def index_select(op: Op) -> Value:
    value, index = op.value("self"), op.value("index")
    return _look_up(value, [(op.dim("dim", len(value.axes)), index)])


@rule("index")
def index(op: Op) -> Value:
    value = op.value("self")
    places = [(d, op.values("indices")[d]) for d, item in enumerate(op["indices"]) if item is not None]
    return _look_up(value, places)


def _look_up(value: Value, places: Sequence[tuple[int, Value]]) -> Value:
    """Rows of a table by index; the index's axes come where the table's were."""
    if any(has_tokens(value.axes[d]) for d, _ in places):
        raise UnknownError("tokens are taken by index")
    first, count = places[0][0], len(places)
    if [d for d, _ in places] != list(range(first, first + count)):
        raise UnknownError("this way of indexing")
    indices = [index for _, index in places]
    joined = join([value, *(replace(i, kind=Kind.POSITION) if i.kind is Kind.RANK else i for i in indices)], ())
    return joined.with_axes((*value.axes[:first], *broadcast(indices), *value.axes[first + count :]))


@rule("gather take_along_dim scatter scatter_add scatter_reduce")
def gather(op: Op) -> Value:
    """Along features, each token's own: the index, and what is written, must lie with the tokens as the tensor does."""
    given = [value for value in op.operands() if value.axes]
    value, index = op.value("self"), op.value("index" if "index" in op.names else "indices")
    d, writes = op.dim("dim", len(value.axes)), op.name.startswith("scatter")
    rest = {tuple(axis for i, axis in enumerate(each.axes) if i != d) for each in given}
    if len(rest) > 1 or any(has_tokens(each.axes[d]) for each in given if writes or each is value):
        raise UnknownError("tokens are taken or written by index")
    return join(op.operands(), value.axes if writes else index.axes)


@rule("one_hot")
def one_hot(op: Op) -> Value:
    value = op.value("self")
    return join([value], (*value.axes, op.axis(op.out.shape[-1])))


@rule("searchsorted bucketize")
def number_of_document(op: Op) -> Value:
    """How many documents begin at a token or before: counted among the kept tokens, that is as before.

    With ``right=False`` those would not count that begin at the token, and a dropped one's place is the next one's.
    """
    boundaries = op.value("sorted_sequence" if op.name == "searchsorted" else "boundaries")
    places, right = op.value("self"), op["right"] or ("side" in op.names and op["side"] == "right")
    if "sorter" in op.names and op.maybe("sorter") is not None:
        raise UnknownError("places are looked up in an order of their own")
    factors = [factor for axis in places.axes for factor in axis]
    one_row = [factor.size for factor in factors] == [op.flow.length]
    if boundaries.kind is Kind.FIXED and places.kind in (Kind.FIXED, Kind.ROW) and not has_any_tokens(boundaries):
        return join([boundaries, places], places.axes)
    if boundaries.kind is not Kind.BOUNDARIES or places.kind is not Kind.RANK or places.offset or not one_row:
        raise UnknownError("places are looked up among others")
    if not right:
        raise MixesError("it takes documents to begin after their first token")
    return Value(Kind.ROW, places.axes)
