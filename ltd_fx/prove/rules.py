"""The rules of token flow for operators that compute, by their names in aten.

A rule takes an :class:`~ltd_fx.prove.flow.Op` and returns the value of the result, or a list of them. It raises
:class:`MixesError` where tokens meet wrongly, and :class:`UnknownError` where it cannot tell.
"""

from dataclasses import replace
from typing import Any

import torch

from ltd_fx.prove.flow import Op, rule
from ltd_fx.prove.values import (
    Kind,
    MixesError,
    UnknownError,
    Value,
    broadcast,
    has_tokens,
    join,
    size_of,
    token_factors,
)

# ---- element by element

_ELEMENTWISE = """
abs neg exp exp2 expm1 log log1p log2 sqrt rsqrt reciprocal square pow float_power sin cos tan tanh atan2 sinc
sigmoid logit erf erfc sign sgn copysign heaviside floor ceil round trunc frac hypot xlogy relu relu6 gelu silu mish
elu selu celu hardswish hardsigmoid hardtanh leaky_relu softplus softsign logsigmoid log_sigmoid threshold prelu add
sub rsub subtract mul multiply div divide true_divide floor_divide remainder fmod maximum minimum addcmul addcdiv
lerp where masked_fill clamp clamp_min clamp_max nan_to_num isnan isinf isfinite isneginf bitwise_and bitwise_or
bitwise_not bitwise_xor logical_and logical_or logical_not logical_xor __and__ __or__ to type_as clone
contiguous detach alias positive lift_fresh lift_fresh_copy copy fill dropout native_dropout feature_dropout
alpha_dropout bernoulli conj resolve_conj resolve_neg real
"""
# What leaves a rank a rank, and attention weights attention weights.
_SAME = {"to", "type_as", "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy"}
_LINEAR = _SAME | {"dropout", "native_dropout", "mul", "div"}


@rule(_ELEMENTWISE)
def elementwise(op: Op) -> Any:
    """An entry of the result from one entry of each input."""
    name, operands = op.name, op.operands()
    if name in ("to", "type_as"):
        operands = operands[:1]
    if any(value.kind is Kind.POSITION and not value.axes for value in operands) and any(v.hidden for v in operands):
        raise MixesError("it makes a number of the length")
    if name in _SAME and operands[0].kind in (Kind.RANK, Kind.POSITION):
        counts = op.out.dtype in (torch.int32, torch.int64, torch.float32, torch.float64)
        return operands[0] if counts else replace(operands[0], kind=Kind.POSITION, offset=None)
    if operands[0].kind is Kind.BOUNDARIES:  # Of another type, or a copy.
        if op.out.dtype not in (torch.int32, torch.int64):
            raise UnknownError("boundaries of documents are rounded")
        return operands[0]
    ranks = [value for value in operands if value.kind is Kind.RANK]
    axes = broadcast(operands)
    if name == "sub" and len(ranks) == len(operands) == 2 and op["alpha"] == 1 and _same_sequence(ranks):
        return Value(Kind.POSITION, axes, offset=ranks[0].offset - ranks[1].offset)
    if name in ("add", "sub") and len(ranks) == 1 and isinstance(op["other"], int) and op["alpha"] == 1:
        shift = op["other"] if name == "add" else -op["other"]
        return replace(ranks[0], offset=ranks[0].offset + shift)
    by_weights = name == "div" and operands[0].kind is not Kind.WEIGHTS
    result = join(operands, axes, linear=name in _LINEAR and not by_weights)
    return [result, result] if isinstance(op.out, (tuple, list)) else result


@rule("ge gt le lt eq ne")
def compare(op: Op) -> Value:
    """Two ranks compared, or their distance with zero, is their order, which stays when tokens are left out."""
    operands = op.operands()
    axes, other = broadcast(operands), op["other"]
    if len(operands) == 2 and all(value.kind is Kind.RANK for value in operands):
        if not _same_sequence(operands):
            raise UnknownError("places in different sequences are compared")
        same = operands[0].offset == operands[1].offset
        return Value(Kind.ROW if same else Kind.POSITION, axes)
    if len(operands) == 1 and operands[0].kind is Kind.POSITION and operands[0].offset is not None:
        return Value(Kind.ROW if operands[0].offset == other else Kind.POSITION, axes)
    return join(operands, axes)


def _same_sequence(ranks: list[Value]) -> bool:
    return len({factor for rank in ranks for factor in token_factors(rank)}) == 1


@rule("tril triu")
def triangle(op: Op) -> Value:
    """A triangle up to the diagonal is an order; one beyond it is a distance."""
    value, diagonal = op.value("self"), op["diagonal"]
    last = {len(value.axes) - 1, len(value.axes) - 2}
    along = value.token_axes() & last
    if not along:
        return value
    ordered = (
        along == last and value.axes[-1] == value.axes[-2] and diagonal in ((-1, 0) if op.name == "tril" else (0, 1))
    )
    if not ordered and value.hidden:
        raise MixesError("it attends within a window of places")
    if value.kind not in (Kind.FIXED, Kind.ROW):
        raise UnknownError("a triangle of what is no scores")
    return replace(value, kind=Kind.ROW if ordered else Kind.POSITION)


# ---- new tensors


@rule("ones zeros full empty new_ones new_zeros new_full new_empty rand randn scalar_tensor")
def constant(op: Op) -> Value:
    """Alike at every token, or drawn for each by itself."""
    counts = any(name in op.names and op.value(name).kind is Kind.POSITION for name in ("fill_value", "s"))
    return Value(Kind.POSITION if counts else Kind.FIXED, op.axes(op.out.shape))


@rule("ones_like zeros_like full_like empty_like rand_like randn_like new_empty_strided")
def constant_like(op: Op) -> Value:
    counts = "fill_value" in op.names and op.value("fill_value").kind is Kind.POSITION
    return Value(Kind.POSITION if counts else Kind.FIXED, op.value("self").axes)


@rule("arange")
def arange(op: Op) -> Value:
    axes = op.axes(op.out.shape)
    if not any(map(has_tokens, axes)):
        return join(op.operands(), axes)
    start, step = op["start"] or 0, op["step"] or 1
    if step != 1 or not isinstance(start, int):
        return Value(Kind.POSITION, axes)
    return Value(Kind.RANK, axes, offset=start)


# ---- along an axis


_REDUCTIONS = """
sum nansum mean prod var std var_mean amax amin max min aminmax median argmax argmin any all norm linalg_vector_norm
logsumexp
"""
_ALONG = """
softmin log_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin sort argsort topk kthvalue flip roll
"""
_NEIGHBOURS = """
avg_pool1d max_pool1d avg_pool2d max_pool2d adaptive_avg_pool1d adaptive_avg_pool2d unfold im2col upsample_linear1d
upsample_nearest1d lstm gru rnn_tanh fft_fft fft_rfft _fft_r2c _fft_c2c diff
"""


@rule(_REDUCTIONS)
def reduce(op: Op) -> Any:
    """What is reduced over features is each token's own."""
    value = op.value("self")
    if "other" in op.names and op.maybe("other") is not None:
        return elementwise(op)
    dims = op.dims("dim", len(value.axes))
    if dims & value.token_axes():
        if value.hidden and len(token_factors(value)) == 1:
            raise MixesError("it is computed over all tokens")
        raise UnknownError("a reduction over tokens")
    keep = bool(op["keepdim"])
    axes = tuple(() if d in dims else axis for d, axis in enumerate(value.axes) if keep or d not in dims)
    result = join([value], axes)
    return [result] * len(op.out) if isinstance(op.out, (tuple, list)) else result


@rule(_ALONG)
def along(op: Op) -> Any:
    """Along features it is each token's own."""
    value = op.value("self")
    dims = op.dims("dims" if "dims" in op.names else "dim", len(value.axes))
    if dims & value.token_axes():
        # Experts sort the tokens, and put each one's result back: whether they do is not seen here.
        if value.hidden and len(token_factors(value)) == 1 and op.name not in ("sort", "argsort"):
            raise MixesError("it goes along the tokens")
        if value.kind is Kind.FIXED and op.name in ("cumsum", "cumprod"):
            return replace(value, kind=Kind.POSITION)
        raise UnknownError("it goes along the tokens")
    made = op.out if isinstance(op.out, (tuple, list)) else [op.out]
    (d,) = dims if len(dims) == 1 else (None,)
    if "shifts" in op.names and op.operands()[1:]:
        raise UnknownError("it goes along by a number of the length")
    axes = tuple(op.axis(made[0].shape[i]) if i == d else axis for i, axis in enumerate(value.axes))
    result = join([value], axes)
    return [result] * len(made) if isinstance(op.out, (tuple, list)) else result


# ---- norms


@rule("layer_norm native_layer_norm rms_norm _fused_rms_norm")
def norm(op: Op) -> Any:
    value = op.value("input")
    count = len(op["normalized_shape"])
    if any(map(has_tokens, value.axes[-count:])):
        raise MixesError("it normalises over the tokens")
    result = join(op.operands(), value.axes)
    return [result] * len(op.out) if isinstance(op.out, (tuple, list)) else result


@rule("batch_norm native_batch_norm instance_norm _native_batch_norm_legit cudnn_batch_norm")
def batch_norm(op: Op) -> Any:
    value = op.value("input")
    if value.token_axes() - {1}:
        raise MixesError("it normalises over the tokens")
    return join(op.operands(), value.axes)


@rule("group_norm native_group_norm")
def group_norm(op: Op) -> Any:
    value = op.value("input")
    if value.token_axes() - {0}:
        raise MixesError("it normalises over the tokens")
    return join(op.operands(), value.axes)


# ---- neighbours


@rule("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d")
def convolution(op: Op) -> Value:
    value, weight = op.value("input"), op.value("weight")
    along, kernel = value.token_axes(), weight.axes[2:]
    if along & {1} or any(d >= 2 and size_of(kernel[d - 2]) != 1 for d in along):
        raise MixesError("a convolution over the tokens")
    axes = tuple(
        axis if d in along else op.axis(n) for d, (axis, n) in enumerate(zip(value.axes, op.out.shape, strict=True))
    )
    return join(op.operands(), axes)


@rule(_NEIGHBOURS)
def neighbours(op: Op) -> Value:
    operands = op.operands()
    if any(value.hidden and value.token_axes() for value in operands):
        raise MixesError("it goes over neighbouring tokens")
    raise UnknownError("nothing is known of this operator")
