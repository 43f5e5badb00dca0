"""What attention kernels compute, as matrix products and a softmax, by the arguments that the kernels take.

An argument that changes the result, and is not known here, is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from ltd_fx.runtime import window_of
from ltd_fx.torch_private import safe_softmax


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    documents: tuple[Tensor, Tensor] | None = None,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    rescored: Callable[[Tensor], Tensor] | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``[B, heads, S, D]`` each. ``documents`` of queries and keys, ``allowed`` and ``bias`` broadcast to scores, which
    ``rescored`` makes others of.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if rescored is not None:
        scores = rescored(scores)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    places = torch.arange(query.shape[2], device=query.device)[:, None], torch.arange(key.shape[2], device=query.device)
    masks = [] if allowed is None else [allowed]
    if causal:
        masks.append(places[0] >= places[1])
    if window[0] >= 0:
        masks.append(places[0] - places[1] <= window[0])
    if window[1] > 0 or (window[1] == 0 and not causal):
        masks.append(places[1] - places[0] <= window[1])
    if documents is not None:
        masks.append(documents[0][..., :, None] == documents[1][..., None, :])
    if bias is not None:
        scores = scores + bias
    if slopes is not None:
        scores = scores - slopes.view(-1, query.shape[1], 1, 1) * (places[0] - places[1]).abs()
    for mask in masks:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights: Tensor = safe_softmax(scores, -1)
    return (weights if sinks is None else weights[..., :-1]) @ value


def _numbers(ends: Tensor, tokens: int) -> Tensor:
    """``[T]``, the document of each token, of cumulative lengths ``[documents + 1]``."""
    rows = torch.arange(tokens, device=ends.device)
    return torch.searchsorted(ends.to(torch.int64)[1:].contiguous(), rows, right=True)


def _of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' flash attention, ``[B, heads, S, D]`` to ``[B, S, heads, D]``.

    A window that ``runtime.kernels`` knows of is left out, for it is refused there by the length of a forward.
    """
    causal: bool = is_causal if is_causal is not None else module.is_causal  # type: ignore[assignment]
    how: dict[str, Any] = {"scale": scaling, "causal": causal, "softcap": softcap, "sinks": s_aux}
    if sliding_window is not None and sliding_window != window_of(module):
        how["window"] = (sliding_window - 1, sliding_window - 1)
    batch, _, length, _ = query.shape
    if attention_mask is not None:
        mask = attention_mask[:, -length:].bool()
        out = _attend(query, key, value, allowed=mask[:, None, None], **how).transpose(1, 2)
        return out * mask[..., None, None], None
    longest = max_length_q is not None and max_length_k is not None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None and longest:
        rows = (t.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for t in (query, key, value))
        documents = _numbers(cu_seq_lens_q, batch * length), _numbers(cu_seq_lens_k, batch * length)
        out = _attend(*rows, documents=documents, **how)[0].transpose(0, 1)
        return out.unflatten(0, (batch, length)), None
    if batch == 1 and position_ids is not None and position_ids.ndim == 2:
        number = (position_ids == position_ids.min()).cumsum(1)[0]
        how["documents"] = number, number
    return _attend(query, key, value, **how).transpose(1, 2), None


# What changes how a kernel runs, and not what it computes.
_INDIFFERENT = frozenset(("deterministic", "num_splits", "pack_gqa", "sm_margin", "enable_gqa", "kernel_options"))


def _refuse_others(others: dict[str, Any]) -> None:
    """Raise :class:`NotImplementedError` for an argument whose meaning is not known here."""
    for name, value in others.items():
        if name not in _INDIFFERENT and (isinstance(value, Tensor) or value):
            raise NotImplementedError(f"ltd_fx does not know what {name}={value!r} means to an attention kernel")


def _said_to_flash(
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    **others: Any,
) -> dict[str, Any]:
    """What flash-attn's functions take after tensors and boundaries, in the words of :func:`_attend`."""
    _refuse_others(others)
    how: dict[str, Any] = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
    return {**how, "slopes": alibi_slopes}


def _flash(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``flash_attn_func``, ``[B, S, heads, D]``."""
    rows = (t.transpose(1, 2) for t in (query, key, value))
    return _attend(*rows, **_said_to_flash(*args, **kwargs)).transpose(1, 2)


def _flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """``flash_attn_varlen_func``, ``[T, heads, D]``."""
    documents = _numbers(cu_seqlens_q, query.shape[0]), _numbers(cu_seqlens_k, key.shape[0])
    rows = (t.transpose(0, 1)[None] for t in (query, key, value))
    return _attend(*rows, documents=documents, **_said_to_flash(*args, **kwargs))[0].transpose(0, 1)


def _flash3(
    query: Tensor, key: Tensor, value: Tensor, softmax_scale: Any = None, causal: bool = False, **kwargs: Any
) -> Tensor:
    """That of FlashAttention 3, whose arguments have another order."""
    return _flash(query, key, value, softmax_scale=softmax_scale, causal=causal, **kwargs)


def _torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: Any,
    max_k: Any,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    **others: Any,
) -> Tensor:
    """``torch.nn.attention.varlen.varlen_attn``, whose window ``(-1, 0)`` is the causal mask."""
    how = {"softmax_scale": scale, "causal": tuple(window_size)[1] == 0, "window_size": window_size, **others}
    return _flash_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **how)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    **others: Any,
) -> Tensor:
    """``torch.nn.attention.flex_attention.flex_attention``, ``[B, heads, S, D]``."""
    _refuse_others(others)
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    allowed = None
    if block_mask is not None:
        allowed = create_mask(block_mask.mask_mod, batch, heads, queries, keys, device=str(query.device))

    def rescored(scores: Tensor) -> Tensor:
        each: Any = score_mod
        for dim in (4, 3, 2, 1):  # The score's last dimension first, each with its own number.
            each = torch.func.vmap(each, in_dims=(0, *(0 if i == dim else None for i in range(1, 5))))
        return each(scores, *(torch.arange(n, device=query.device) for n in scores.shape))  # type: ignore[no-any-return]

    how: dict[str, Any] = {"scale": scale, "allowed": allowed}
    return _attend(query, key, value, rescored=None if score_mod is None else rescored, **how)


def _flex_of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' FlexAttention, ``[B, heads, S, D]`` to ``[B, S, heads, D]``."""
    how: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if isinstance(attention_mask, BlockMask):
        shape = (query.shape[0], 1, query.shape[2], key.shape[2])
        how["allowed"] = create_mask(attention_mask.mask_mod, *shape, device=str(query.device))
    elif attention_mask is not None:
        how["bias"] = attention_mask[..., : key.shape[2]]
    return _attend(query, key, value, **how).transpose(1, 2), None


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None
) -> Any:
    """``xformers.ops.memory_efficient_attention``, ``[B, S, heads, D]``.

    Raises:
        NotImplementedError: for a bias that is no tensor and no triangle.
    """
    causal = type(attn_bias).__name__ == "LowerTriangularMask"
    if attn_bias is not None and not causal and not isinstance(attn_bias, Tensor):
        raise NotImplementedError(f"ltd_fx does not know the bias {type(attn_bias).__name__} of xformers")
    rows = (t.transpose(1, 2) for t in (query, key, value))
    return _attend(*rows, scale=scale, causal=causal, bias=None if causal else attn_bias).transpose(1, 2)


FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("flash_attn", "flash_attn_func"): _flash,
    ("flash_attn", "flash_attn_varlen_func"): _flash_varlen,
    ("flash_attn_interface", "flash_attn_func"): _flash3,
    ("flash_attn_interface", "flash_attn_varlen_func"): _flash_varlen,
    ("torch.nn.attention.flex_attention", "flex_attention"): _flex,
    ("torch.nn.attention.varlen", "varlen_attn"): _torch_varlen,
    ("xformers.ops", "memory_efficient_attention"): _xformers,
}
# What transformers has behind all names of flash attention, those of the hub too, and behind its FlexAttention.
OF_TRANSFORMERS: dict[str, Callable[..., Any]] = {
    "transformers.integrations.flash_attention.flash_attention_forward": _of_transformers,
    "transformers.integrations.flex_attention.flex_attention_forward": _flex_of_transformers,
}
