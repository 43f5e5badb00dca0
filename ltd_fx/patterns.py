"""What a routed layer's forward looks like: where the hidden states are, which arguments follow the tokens."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ltd_fx.align import Aligned, align
from ltd_fx.draw import Draw
from ltd_fx.errors import LTDError

# Dimensions that carry the sequence, or how to gather an argument for which dimensions are not enough.
Align = tuple[Any, ...] | Callable[[Draw | None, Any], Any]


@dataclass(frozen=True)
class LayerPattern:
    """How to route a layer class.

    Args:
        hidden: the argument holding the hidden states, ``[B, S, D]`` (``[S, B, D]`` with ``batch_first=False``).
        aligned: per argument, the dimensions along which it carries the sequence; each has size S, or 1 to broadcast.
            Dimension 0 is the batch (of size B, 1, or a multiple of B such as batch times heads) unless it is listed.
            A tuple of tensors shares one entry. Instead of dimensions, an :class:`ltd_fx.Aligned`, or a tuple of one
            of them per item, or a callable ``(draw, value) -> value``. ``()`` says that an argument does not carry the
            sequence; one that is not listed is refused when it looks as if it did.
        batch_first: the layout of the hidden states.
        output: the slot of the hidden states in a tuple output; ``None``: the layer returns a bare tensor.
            A layer that returns a bare tensor is accepted with any slot.
        returned: further tensors in a tuple output: by slot, the argument that the layer hands on there (a shared
            position bias), or ``None`` for a tensor that does not carry the sequence and is returned as it is.
        dropped: slots that are ``None`` while the layer is routed: what is computed for the kept tokens only and read
            by nobody (attention weights). Any other further tensor is refused.
        cache: the argument holding a key-value cache, so that decoding in training mode can be refused: the cache of a
            routed layer lacks the dropped tokens.

    """

    hidden: str = "hidden_states"
    aligned: Mapping[str, Align] = field(default_factory=dict)
    batch_first: bool = True
    output: int | None = 0
    returned: Mapping[int, str | None] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("aligned", "returned"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def _plain(self) -> tuple[Any, ...]:
        values = (getattr(self, f.name) for f in fields(self))
        return tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    def __hash__(self) -> int:
        return hash(tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in self._plain()))

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerPattern, self._plain()

    def check(self, layer_class: type[nn.Module]) -> None:
        """Raise :class:`LTDError` if the pattern names an argument that ``layer_class.forward`` does not have.

        A name may also be one of its ``**kwargs``, with dimensions but not with a callable.
        """
        parameters = forward_signature(layer_class).parameters.values()
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [("hidden", self.hidden), ("cache", self.cache)]
        named += [("aligned", name) for name in self.aligned] + [("returned", name) for name in self.returned.values()]
        for role, name in named:
            if name is None or name in names:
                continue
            if role == "aligned" and takes_any and not callable(self.aligned[name]):
                continue
            raise LTDError(
                f"ltd_fx: the pattern of {layer_class.__name__} has {role} argument {name!r}, but its forward "
                f"takes ({', '.join(names)}); correct it with "
                f"ltd_fx.register_pattern({layer_class.__name__}, LayerPattern(...))"
            )


def align_attention_mask(draw: Draw | None, mask: Any) -> Any:
    """Transformers' masks: ``[B | 1, heads | 1, S | 1, S]`` (sdpa, eager) or ``[B, S]`` (flash attention)."""
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return align(draw, mask, "attention_mask", (1,))
    return align(draw, mask, "attention_mask", (2, 3))


def _align_src_mask(draw: Draw | None, mask: Any) -> Any:
    """``nn.TransformerEncoderLayer``'s ``src_mask``: ``[S, S]`` or ``[B * heads, S, S]``."""
    if draw is None or not isinstance(mask, Tensor) or mask.ndim == 3:
        return align(draw, mask, "src_mask", (1, 2))
    gathered = align(draw, mask, "src_mask", (0, 1))
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
    return align(draw, bias[:, :, -draw.seq_len :], "position_bias", Aligned((2,), batch=None))


_DECODER = LayerPattern(
    aligned={"attention_mask": align_attention_mask, "position_ids": (1,), "position_embeddings": (1,)},
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
        },
        cache="past_key_values",
    ),
    ("transformers.models.bert.modeling_bert", "BertLayer"): LayerPattern(
        aligned={
            "attention_mask": align_attention_mask,
            "encoder_hidden_states": (),
            "encoder_attention_mask": (2,),
        },
        cache="past_key_values",
    ),
    ("transformers.models.vit.modeling_vit", "ViTLayer"): _ENCODER,
    ("transformers.models.mpt.modeling_mpt", "MptBlock"): LayerPattern(
        aligned={"attention_mask": (2, 3), "position_bias": _align_mpt_bias}, dropped=(1,), cache="layer_past"
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


def register_pattern(layer_class: type[nn.Module], pattern: Entry) -> None:
    """Teach ltd_fx a layer class; subclasses without a pattern of their own inherit it.

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


def forward_signature(layer_class: type[nn.Module]) -> inspect.Signature:
    """The signature of ``layer_class.forward`` as a caller sees it, without ``self``."""
    signature = inspect.signature(layer_class.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def find_pattern_maybe(layer: nn.Module) -> LayerPattern | None:
    """The pattern registered for the layer's class or its nearest base, else the built-in one, else ``None``.

    Raises:
        LTDError: it names an argument that the layer's ``forward`` does not have.

    """
    for base in type(layer).__mro__:
        entry = _registered.get(base) or _BUILT_IN.get((base.__module__, base.__qualname__))
        if entry is not None:
            pattern = entry if isinstance(entry, LayerPattern) else entry(layer)
            # inherited, or made by a function: it may not fit this very class
            pattern.check(type(layer))
            return pattern
    return None
