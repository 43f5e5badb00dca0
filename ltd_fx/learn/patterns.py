"""The patterns of known layer classes: built in, as hints, and registered by the user."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.learn.layer_pattern import Align, LayerPattern, argument_names, forward_signature
from ltd_fx.runtime import Aligned, Draw, gather_argument

logger = logging.getLogger(__name__)


def align_attention_mask(draw: Draw | None, mask: Any) -> Any:
    """Transformers' masks: ``[B | 1, heads | 1, S | 1, S]`` (sdpa, eager) or ``[B, S]`` (flash attention)."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return gather_argument(draw, mask, "attention_mask", (1,))
    return gather_argument(draw, mask, "attention_mask", (2, 3))


def _align_src_mask(draw: Draw | None, mask: Any) -> Any:
    """``nn.TransformerEncoderLayer``'s ``src_mask``: ``[S, S]`` or ``[B * heads, S, S]``."""
    if draw is None or not isinstance(mask, Tensor) or mask.ndim == 3:
        return gather_argument(draw, mask, "src_mask", (1, 2))
    gathered = gather_argument(draw, mask, "src_mask", (0, 1))
    if gathered.ndim == 2:  # one draw for the batch
        return gathered
    heads: int = draw.site.layer.get_submodule("self_attn").num_heads  # type: ignore[assignment]
    return gathered.repeat_interleave(heads, dim=0)


def _align_mpt_bias(draw: Draw | None, bias: Any) -> Any:
    """MPT's ALiBi ``[heads, 1, longest]``, of which a layer uses the last S; it takes no batch dimension."""
    if draw is None or not isinstance(bias, Tensor):
        return bias
    if draw.indices.shape[0] != 1:
        raise LTDError(
            f"ltd_fx: {draw.site.name}: its position_bias is the same for all sequences, so they must keep the same "
            "tokens: pass sampling='shared' to ltd_fx.transform"
        )
    return gather_argument(draw, bias[:, :, -draw.seq_len :], "position_bias", Aligned((2,), batch=None))


# The tokens' numbers ``[S]``, which layers of older releases take: a built-in pattern may name what a class lacks.
_PLACES: dict[str, Align] = {"cache_position": (0,)}
_DECODER = LayerPattern(
    aligned={"attention_mask": align_attention_mask, "position_ids": (1,), "position_embeddings": (1,), **_PLACES},
    cache="past_key_values",
)
_ENCODER = LayerPattern(aligned={"attention_mask": align_attention_mask})
_TIMM_BLOCK = LayerPattern(hidden="x", aligned={"attn_mask": align_attention_mask})


def _transformer_encoder_layer(layer: nn.Module) -> LayerPattern:
    aligned: dict[str, Align] = {"src_mask": _align_src_mask, "src_key_padding_mask": (1,)}
    attention = layer.self_attn
    assert isinstance(attention, nn.MultiheadAttention)
    return LayerPattern(hidden="src", aligned=aligned, batch_first=attention.batch_first)


Entry = LayerPattern | Callable[[Any], LayerPattern]

# By module and class name, so that knowing a library's layers does not import it.
_BUILT_IN: dict[tuple[str, str], Entry] = {
    ("torch.nn.modules.transformer", "TransformerEncoderLayer"): _transformer_encoder_layer,
    ("transformers.models.gpt2.modeling_gpt2", "GPT2Block"): LayerPattern(
        aligned={
            "attention_mask": align_attention_mask,
            "encoder_hidden_states": (),
            "encoder_attention_mask": (2,),
            "position_ids": (1,),
            **_PLACES,
        },
        cache="past_key_values",
    ),
    ("transformers.models.bert.modeling_bert", "BertLayer"): LayerPattern(
        aligned={
            "attention_mask": align_attention_mask,
            "encoder_hidden_states": (),
            "encoder_attention_mask": (2,),
            **_PLACES,
        },
        cache="past_key_values",
    ),
    ("transformers.models.vit.modeling_vit", "ViTLayer"): _ENCODER,
    ("transformers.models.mpt.modeling_mpt", "MptBlock"): LayerPattern(
        aligned={"attention_mask": (2, 3), "position_bias": _align_mpt_bias, **_PLACES},
        dropped=(1,),
        cache="layer_past",
    ),
    ("timm.models.vision_transformer", "Block"): _TIMM_BLOCK,
    **{
        (f"transformers.models.{family}.modeling_{family}", f"{name}DecoderLayer"): _DECODER
        for family, name in (
            ("llama", "Llama"),
            ("mistral", "Mistral"),
            ("qwen2", "Qwen2"),
            ("qwen3", "Qwen3"),
            ("gemma", "Gemma"),
            ("olmo2", "Olmo2"),
        )
    },
}
_registered: dict[type[nn.Module], Entry] = {}
_logged: set[type[nn.Module]] = set()  # classes of which the log has the line

# What releases of the libraries have called the same cache.
_OTHER_NAMES = {
    "past_key_values": ("cache", "past_key_value", "layer_past"),
    "layer_past": ("past_key_values", "cache"),
}
# Arguments that say how to run, whatever their default.
_FLAGS = frozenset(("use_cache", "output_attentions"))


def register_pattern(layer_class: type[nn.Module], pattern: Entry) -> None:
    """Teach ltd_fx a layer class; subclasses that have neither a pattern nor a ``forward`` of their own inherit it.

    Args:
        layer_class: the class whose instances are routed.
        pattern: a :class:`LayerPattern`, or a function ``layer -> LayerPattern`` where instances differ.

    Raises:
        LTDError: ``layer_class`` is no module class, or the pattern names an argument its ``forward`` lacks.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise LTDError(f"ltd_fx.register_pattern: expected a subclass of nn.Module, got {layer_class!r}")
    if isinstance(pattern, LayerPattern):
        pattern.check(layer_class)
    _registered[layer_class] = pattern


def is_known(layer: nn.Module) -> bool:
    """Whether the layer's class, or a base of it, is registered or built in, whatever its ``forward`` is like."""
    return _find_base_maybe(type(layer)) is not None


def is_registered(layer: nn.Module) -> bool:
    """Whether :func:`find_pattern_maybe` gives a pattern that the user registered, not one that is built in."""
    base = _find_base_maybe(type(layer))
    return base in _registered and not _overrides_forward(type(layer), base)


def find_pattern_maybe(layer: nn.Module) -> LayerPattern | None:
    """The pattern registered for the layer's class or its nearest base, else the built-in one, else ``None``.

    A class that overrides ``forward`` inherits none. A built-in pattern is a hint: one that does not fit the class as
    it is installed is left aside, with one line in the log.

    Raises:
        LTDError: a registered pattern names an argument that the layer's ``forward`` does not have.
    """
    layer_class = type(layer)
    base = _find_base_maybe(layer_class)
    if base is None or _overrides_forward(layer_class, base):
        return None
    entry = _registered.get(base)
    if entry is not None:
        pattern = entry if isinstance(entry, LayerPattern) else entry(layer)
        pattern.check(layer_class)  # inherited, or made by a function: it may not fit this very class
        return pattern
    entry = _BUILT_IN[base.__module__, base.__qualname__]
    pattern = _adapted(entry if isinstance(entry, LayerPattern) else entry(layer), layer_class)
    misfit = _misfit(pattern, layer_class)
    if misfit is not None:
        _log_misfit(layer_class, misfit)
        return None
    return pattern


def _find_base_maybe(layer_class: type[nn.Module]) -> type[nn.Module] | None:
    """The nearest class, from ``layer_class`` up, that has a pattern."""
    known = (b for b in layer_class.__mro__ if b in _registered or (b.__module__, b.__qualname__) in _BUILT_IN)
    return next(known, None)


def _overrides_forward(layer_class: type[nn.Module], base: type[nn.Module]) -> bool:
    # transformers wraps the inherited `forward` of each subclass anew
    return inspect.unwrap(layer_class.forward) is not inspect.unwrap(base.forward)


def _adapted(pattern: LayerPattern, layer_class: type[nn.Module]) -> LayerPattern:
    """``pattern`` with the name that ``layer_class`` has for the cache, less what it cannot be given."""
    names = argument_names(layer_class)
    parameters = forward_signature(layer_class).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    cache = pattern.cache
    if cache is not None and cache not in names:
        cache = next((other for other in _OTHER_NAMES[cache] if other in names), cache)
    aligned = {name: entry for name, entry in pattern.aligned.items() if takes_any or name in names}
    return replace(pattern, aligned=aligned, cache=cache)


def _misfit(pattern: LayerPattern, layer_class: type[nn.Module]) -> str | None:
    """What of ``layer_class.forward`` a built-in pattern does not know, or knows and does not find; else ``None``."""
    unknown = pattern.unknown_argument(layer_class)
    if unknown is not None:
        return f"no {unknown}"
    known = {pattern.hidden, pattern.cache, *pattern.aligned, *_FLAGS}
    for parameter in forward_signature(layer_class).parameters.values():
        is_flag = isinstance(parameter.default, (bool, int, float, str))
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not (variadic or is_flag or parameter.name in known):
            return f"a new argument {parameter.name!r}"
    return None


def _log_misfit(layer_class: type[nn.Module], misfit: str) -> None:
    if layer_class not in _logged:
        _logged.add(layer_class)
        logger.warning(
            "ltd_fx: %s.%s has %s, so its built-in pattern does not fit: how its arguments follow the tokens is learnt "
            "from a forward instead",
            layer_class.__module__,
            layer_class.__qualname__,
            misfit,
        )
