"""What a routed layer must equal: the dense layer with attention to its dropped tokens blocked.

Nothing here knows how a layer is routed, what its mask argument is, or how it computes attention: that a score involves
a dropped token is seen from its value, which changes when the dropped tokens do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ltd_fx.learn import tensors_in
from ltd_fx.torch_private import SOFTMAXES, TO_COPY, TorchDispatchMode, is_grouped_mm, safe_softmax

_FACTORIES = {
    overload
    for name in ("arange", "ones", "zeros", "full", "empty", "tril_indices", "linspace")
    for overload in (getattr(getattr(torch.ops.aten, name), o) for o in getattr(torch.ops.aten, name).overloads())
}
# Dropout divides by what it draws with, so this much of each entry leaves it as it is.
_RANDOM: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.bernoulli_.float: lambda mask, p=0.5: mask.fill_(p),
    torch.ops.aten.bernoulli_.Tensor: lambda mask, p: mask.copy_(p),
    torch.ops.aten.bernoulli.p: lambda mask, p=0.5: torch.full_like(mask, p),
    torch.ops.aten.bernoulli.default: lambda p: p.clone(),
    torch.ops.aten.native_dropout.default: lambda x, p, train: (x.clone(), torch.ones_like(x, dtype=torch.bool)),
    torch.ops.aten.uniform_.default: lambda x, low=0.0, high=1.0: x.fill_((low + high) / 2),
    torch.ops.aten.normal_.default: lambda x, mean=0.0, std=1.0: x.fill_(mean),
}
_RANDOM_TENSORS = {
    getattr(torch.ops.aten, name).default: value
    for name, value in {"rand": 0.5, "rand_like": 0.5, "randn": 0.0, "randn_like": 0.0}.items()
}
_MAX_SOFTMAXES = 16
# Masks add the lowest number of some dtype; no score is as low.
_MASKED = -1e4


class NotVerifiableError(Exception):
    """The dense layer's attention to dropped tokens cannot be blocked; the message says why."""


class PlainKernels(TorchFunctionMode):
    """Fused attention as matmul and softmax, whatever backends the layer asks for; experts that know no float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if is_grouped_mm(func) and args[0].dtype == torch.float64:
            return _grouped_mm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights: Tensor = safe_softmax(scores, -1)
    return weights @ value


class Scores(TorchDispatchMode):
    """Blocks scores in the first softmaxes of a layer, and keeps those of the next one, ``[..., queries, keys]``.

    What training leaves to chance is left out, so that dropout drops nothing, whatever it is called.

    Casts from float64 to float32 (in norms, rotary embeddings and softmaxes) are left out, so that a difference is not
    taken for rounding, nor rounding for a difference.
    """

    def __init__(self, blocked: list[Tensor], length: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.blocked = blocked
        self.length = length
        self.counted = False
        self.count = 0
        self.scores: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is TO_COPY and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": torch.float64 if kwargs.get("dtype") == torch.float32 else kwargs.get("dtype")}
        if func in _RANDOM:
            return _RANDOM[func](*args)
        if func in _RANDOM_TENSORS:
            return func(*args, **kwargs).fill_(_RANDOM_TENSORS[func])
        if func not in SOFTMAXES:
            result = func(*args, **kwargs)
            if func in _FACTORIES:
                self.counted |= self.length in result.shape
            return result
        scores, dim, *rest = args
        if self.count < len(self.blocked):
            blocked = self.blocked[self.count].movedim(-1, dim)
            scores = scores.masked_fill(blocked, -torch.inf)
        elif self.count == len(self.blocked):
            self.scores = scores.movedim(dim, -1).clone()
        self.count += 1
        return func(scores, dim, *rest, **kwargs)


class DefaultDtype(TorchDispatchMode):
    """What a layer makes without naming a dtype goes with its weights, as it did before these were cast to ``dtype``.

    torch's own default is the whole process's: other threads would see it change.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.dtype != torch.get_default_dtype() or result.dtype == self.dtype:
            return result
        given = tensors_in((*args, *kwargs.values()))
        # torch.tensor makes its tensor unseen, and has it lifted.
        unnamed = kwargs.get("dtype") is None and not any(t.is_floating_point() or t.is_complex() for t in given)
        return result.to(self.dtype) if unnamed or func is torch.ops.aten.lift_fresh.default else result


def _grouped_mm(rows: Tensor, experts: Tensor, offs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Mixtures of experts: ``rows`` ``[T, in]``, sorted by expert, each times its ``[in, out]``."""
    ends = offs.tolist()
    parts = [rows[start:end] @ expert for start, end, expert in zip([0, *ends], ends, experts, strict=False)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - ends[-1], experts.shape[-1])])


class Reference(NamedTuple):
    """A dense layer with attention to the dropped tokens blocked.

    Attributes:
        outputs: the hidden states ``[B, S, D]``, then any further tensors.
        other: the same with other dropped tokens; equal at the kept rows if nothing lets them see the dropped ones.
        blind: ``[B, S]`` bool, where a token can attend to nothing (its mask leaves it dropped ones at most).
        unblocked: the outputs with nothing blocked.
        counted: whether the layer makes tensors as long as the sequence by itself: positions, distances, windows.
    """

    outputs: list[Tensor]
    other: list[Tensor]
    blind: Tensor
    unblocked: list[Tensor]
    counted: bool


def dense_reference(call: Callable[[Tensor], list[Tensor]], hidden: Tensor, kept: Tensor) -> Reference:
    """Run a dense layer with attention to the dropped tokens blocked.

    Softmax by softmax, in order of execution: as long as all earlier ones are blocked, a score differs between two
    runs that differ in the dropped tokens only if its query or its key is a dropped token. Those scores are blocked.

    Args:
        call: hidden states to output tensors, the hidden states first.
        hidden: ``[B, S, D]``.
        kept: ``[B, S]`` bool.

    Raises:
        NotVerifiableError: too many softmaxes, or their number depends on the values.
    """
    # Each dropped token becomes another token of its sequence, halved.
    other = torch.where(kept[..., None], hidden, hidden.roll(1, dims=1) / 2)
    blind = torch.zeros_like(kept)
    blocked: list[Tensor] = []
    unblocked: list[Tensor] = []
    while True:
        first, ours = _run(call, hidden, blocked)
        second, theirs = _run(call, other, blocked)
        unblocked = unblocked or ours
        if first.count != second.count or first.count > _MAX_SOFTMAXES:
            raise NotVerifiableError(f"it runs {first.count} and {second.count} softmaxes on inputs of the same shapes")
        if first.scores is None or second.scores is None:
            return Reference(ours, theirs, blind, unblocked, first.counted)
        changed = _changed(first.scores, second.scores)
        blind |= _blind(first.scores, changed, *kept.shape)
        # A dropped query's whole row changes. Nobody reads its output, but it must stay finite.
        blocked.append(changed & ~(changed | first.scores.isneginf()).all(-1, keepdim=True))


def _run(call: Callable[[Tensor], list[Tensor]], hidden: Tensor, blocked: list[Tensor]) -> tuple[Scores, list[Tensor]]:
    with Scores(blocked, hidden.shape[1]) as mode:
        outputs = run_plain(call, hidden)
    return mode, outputs


def run_plain(call: Callable[[Tensor], list[Tensor]], hidden: Tensor) -> list[Tensor]:
    """Run a layer with every softmax in plain sight."""
    # Gradients are enabled, since torch would otherwise take fused paths that hide the scores.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), PlainKernels():
        return call(hidden)


def _changed(scores: Tensor, other: Tensor) -> Tensor:
    visible = scores.masked_fill(scores <= _MASKED, 0)
    scale = visible.nan_to_num().abs().max() if visible.numel() else torch.zeros(())
    difference = scores - other
    if scores.numel() and bool((scores.amax(-1) == 0).all()):
        # The layer subtracted each row's maximum, which may be a dropped key's: compare with the attention sink's score
        # behind all keys, or else with the token's own.
        queries, keys = scores.shape[-2:]
        same = difference[..., -1] if keys > queries else difference.diagonal(dim1=-2, dim2=-1)
        difference = difference - same.unsqueeze(-1) if same.shape[-1] == queries else difference
    return difference.abs() > 4 * torch.finfo(scores.dtype).eps * scale


def _blind(scores: Tensor, changed: Tensor, batch: int, seq_len: int) -> Tensor:
    """The queries to which the mask, or the block, leaves nothing; dropped ones among them."""
    if scores.ndim < 3 or scores.shape[-2] != seq_len or scores.shape[0] % batch:
        return torch.zeros(batch, seq_len, dtype=torch.bool, device=scores.device)
    nothing = ((scores <= _MASKED) | changed).all(-1)
    return nothing.reshape(batch, -1, seq_len).any(1)
