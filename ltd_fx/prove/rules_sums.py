"""The rules of token flow for products, softmax and attention: where tokens may meet."""

from dataclasses import replace

from ltd_fx.prove.flow import Op, rule
from ltd_fx.prove.values import Kind, MixesError, UnknownError, Value, broadcast, has_tokens, join, normalised_axis


@rule("matmul mm bmm mv dot")
def matmul(op: Op) -> Value:
    return contract(*op.operands())


@rule("addmm baddbmm addbmm")
def addmm(op: Op) -> Value:
    bias, first, second, *numbers = op.operands()
    if numbers:
        raise MixesError("it makes a number of the length")
    product = contract(first, second)
    return join([product, bias], broadcast([product, bias]))


def contract(a: Value, b: Value) -> Value:
    """The product of two matrices, or of batches of them."""
    if len(a.axes) < 2 or len(b.axes) < 2:
        if any(map(has_tokens, (*a.axes, *b.axes))):
            raise UnknownError("a product of vectors")
        return join([a, b], a.axes[:-1] if len(b.axes) == 1 else b.axes[1:], linear=True)
    summed = has_tokens(a.axes[-1]) or has_tokens(b.axes[-2])
    lead = broadcast([a.with_axes(a.axes[:-2]), b.with_axes(b.axes[:-2])])
    axes = (*lead, a.axes[-2], b.axes[-1])
    if not summed:
        return join([a, b], axes, linear=True)
    if a.axes[-1] != b.axes[-2]:
        raise UnknownError("tokens lie along its inputs' axes in different ways")
    for weights, others, d in ((a, b, -1), (b, a, -2)):
        if weights.kind is Kind.WEIGHTS and normalised_axis(weights) == len(weights.axes) + d:
            if others.kind is Kind.WEIGHTS:
                raise UnknownError("attention weights are changed")
            if others.kind not in (Kind.ROW, Kind.FIXED):
                raise MixesError("it counts positions among the tokens that are there")
            return Value(Kind.ROW, axes, hidden=True)
    raise UnknownError("a sum over tokens that is no softmax attention")


@rule("linear")
def linear(op: Op) -> Value:
    value, weight = op.value("input"), op.value("weight")
    if has_tokens(value.axes[-1]):
        raise MixesError("a linear map over the tokens")
    return join(op.operands(), (*value.axes[:-1], weight.axes[0] if len(weight.axes) > 1 else ()))


@rule("einsum")
def einsum(op: Op) -> Value:
    """Two tensors, each letter once in each; what is summed over tokens must be attention weights'."""
    equation, operands = op["equation"].replace(" ", ""), op.values("tensors")
    inputs, _, output = equation.partition("->")
    letters = inputs.split(",")
    if len(operands) != 2 or "." in equation or not output or any(len(set(x)) != len(x) for x in letters):
        raise UnknownError("this einsum")
    axes = {
        letter: axis
        for names, v in zip(letters, operands, strict=True)
        for letter, axis in zip(names, v.axes, strict=True)
        if axis
    }
    summed = {letter for letter in axes if letter not in output and has_tokens(axes[letter])}
    if any(
        axes[n] != axis
        for names, v in zip(letters, operands, strict=True)
        for n, axis in zip(names, v.axes, strict=True)
        if axis
    ):
        raise UnknownError("tokens lie along its inputs' axes in different ways")
    result = tuple(axes.get(letter, ()) for letter in output)
    if not summed:
        for names, v in zip(letters, operands, strict=True):
            if v.kind is Kind.WEIGHTS and "".join(n for n in output if n in names) != names:
                raise UnknownError("attention weights in another order")
        return join(operands, result, linear=True)
    if any(value.kind in (Kind.RANK, Kind.POSITION, Kind.STATE) for value in operands):
        raise UnknownError("a sum over tokens of what is no hidden states")
    if all(value.kind is Kind.WEIGHTS for value in operands):
        raise UnknownError("attention weights are changed")
    for weights, names in zip(operands, letters, strict=True):
        d = normalised_axis(weights) if weights.kind is Kind.WEIGHTS else None
        if d is not None and summed == {names[d]}:
            return Value(Kind.ROW, result, hidden=True)
    raise UnknownError("a sum over tokens that is no softmax attention")


@rule("softmax _softmax _safe_softmax")
def softmax(op: Op) -> Value:
    value = op.value("self")
    d = op.dim("dim", len(value.axes))
    if not has_tokens(value.axes[d]):
        return join([value], value.axes)
    if len(value.axes[d]) > 1:
        raise UnknownError("a softmax over tokens and more")
    if value.kind not in (Kind.ROW, Kind.FIXED):
        raise UnknownError("a softmax of what is no scores")
    before = sum(factor.tokens for axis in value.axes[:d] for factor in axis)
    return replace(value, kind=Kind.WEIGHTS, over=before)


@rule("scaled_dot_product_attention")
def attention(op: Op) -> Value:
    query, key, value, mask = op.value("query"), op.value("key"), op.value("value"), op.maybe("attn_mask")
    given = [query, key, value, *([] if mask is None else [mask])]
    if any(op.value(name).kind is Kind.POSITION for name in ("scale", "dropout_p") if name in op.names):
        raise MixesError("it makes a number of the length")
    if any(has_tokens(v.axes[-1]) for v in (query, key, value)):
        raise UnknownError("attention between features, summed over tokens")
    if any(v.kind in (Kind.RANK, Kind.POSITION) for v in given):
        raise MixesError("attention goes by positions among the tokens that are there")
    if any(v.kind is Kind.STATE for v in given):
        raise MixesError("it goes by a state that it changes")
    if any(v.kind is Kind.WEIGHTS for v in given):
        raise UnknownError("attention weights are changed")
    if key.axes[-2] != value.axes[-2]:
        raise UnknownError("keys and values of different sequences")
    if mask is not None and any(
        has_tokens(axis) and axis != other.axes[-2]
        for axis, other in zip(mask.axes[:-3:-1], (key, query), strict=False)
    ):
        raise UnknownError("a mask of other sequences")
    if op["is_causal"] and query.axes[-2] != key.axes[-2]:
        raise UnknownError("causal attention between different sequences")
    lead = broadcast(
        [v.with_axes(v.axes[:-2]) for v in (query, value if len(value.axes) == len(query.axes) else query)]
    )
    return Value(Kind.ROW, (*lead, query.axes[-2], value.axes[-1]), hidden=True)
