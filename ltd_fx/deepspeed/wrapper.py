"""DeepSpeed's wrapper module and helpers on this engine, for scripts that hold those names."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.install import add_root_hook
from ltd_fx.learn import LayerPattern, align_attention_mask, find_layers, find_pattern_maybe, forward_signature
from ltd_fx.ops import register_inductor_decompositions
from ltd_fx.passes import RoutedLayer, routed_class, swap_class
from ltd_fx.runtime import RouteState, Site
from ltd_fx.schedule import LTDScheduler
from ltd_fx.weights import clean_state_dict, unwrapped, without_components

_COMPONENT = "random_ltd_layer"
_ORDERS = {"batch_seq_dim": True, "seq_batch_dim": False}
_TYPES = ("encoder", "decoder")
# These keys are read elsewhere, or mean nothing to one layer; any other key is refused.
_OTHER_KEYS = frozenset(
    (
        "enabled",
        "total_layer_num",
        "random_ltd_layer_num",
        "random_ltd_layer_id",
        "random_ltd_schedule",
        "layer_token_lr_schedule",
        "global_batch_size",
        "micro_batch_size",
    )
)


class RandomLayerTokenDrop(nn.Module):
    """A wrapper around one layer that drops tokens in training while the reserved length is below the sequence length.

    The layer itself is routed as ``ltd_fx.transform`` would. Before :meth:`init_config`, in eval mode and at full
    length the wrapper passes everything through unchanged.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.random_ltd_layer = layer

    def init_config(self, config: Mapping[str, Any], scheduler: LTDScheduler, random_ltd_layer_id: int) -> None:
        """Start dropping tokens.

        Args:
            config: DeepSpeed's ``random_ltd`` section: ``hidden_state_order`` (``"batch_seq_dim"``, the default, or
                ``"seq_batch_dim"``), ``model_mask_name`` (the attention mask's argument, ``[B, 1, S | 1, S]`` or
                ``[B, S]``) and ``model_type`` (``"encoder"`` or ``"decoder"``, routed alike: the mask's kept rows and
                columns are gathered). A layer class with a registered or built-in pattern is routed by that instead.
            scheduler: shared by all wrappers of a model. Each ``scheduler.step()`` brings new draws; so does each
                forward of a model made by :func:`convert_to_random_ltd`.
            random_ltd_layer_id: the layer's number, which makes its draws its own.

        Raises:
            LTDError: an unknown key or value, a mask that the layer does not take, or a scheduler of another model.
        """
        if isinstance(self.random_ltd_layer, RoutedLayer):
            raise LTDError(f"ltd_fx.deepspeed: layer {random_ltd_layer_id} is configured already")
        _check_free(scheduler)
        pattern = _pattern(self.random_ltd_layer, config)
        layer_class = type(self.random_ltd_layer)
        routed = routed_class(layer_class, layer_class, pattern)
        register_inductor_decompositions()
        state = _shared_state(scheduler, config)
        site = Site(f"random_ltd_layer {random_ltd_layer_id}", random_ltd_layer_id, self.random_ltd_layer, state)
        swap_class(self.random_ltd_layer, routed, site)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.random_ltd_layer(*args, **kwargs)


class _WrapperState(RouteState):
    """The state that the wrappers of one scheduler share; a transformed model's is not theirs to join."""


def _shared_state(scheduler: LTDScheduler, config: Mapping[str, Any]) -> RouteState:
    state = scheduler._state
    if state is None:
        routed = config.get("random_ltd_layer_num", 0)
        dense = config.get("total_layer_num", routed) - routed
        state = _WrapperState(scheduler, seed=0, shared=False, routed=routed, dense=dense)
        scheduler._attach(state)
    assert isinstance(state, _WrapperState)  # _check_free
    return state


def _check_free(scheduler: LTDScheduler) -> None:
    if scheduler.attached and not isinstance(scheduler._state, _WrapperState):
        raise LTDError("ltd_fx.deepspeed: the scheduler drives a transformed model; give the wrappers one of their own")


def _pattern(layer: nn.Module, config: Mapping[str, Any]) -> LayerPattern:
    order = config.get("hidden_state_order", "batch_seq_dim")
    kind = config.get("model_type", "decoder")
    for key, value, known in (("hidden_state_order", order, tuple(_ORDERS)), ("model_type", kind, _TYPES)):
        if value not in known:
            raise LTDError(f"ltd_fx.deepspeed: {key} must be one of {', '.join(known)}, got {value!r}")
    unknown = config.keys() - _OTHER_KEYS - {"hidden_state_order", "model_type", "model_mask_name"}
    if unknown:
        raise LTDError(f"ltd_fx.deepspeed: unknown key {min(unknown)!r} in the random_ltd section")
    pattern = find_pattern_maybe(layer)
    if pattern is None:
        hidden = next(iter(forward_signature(type(layer)).parameters))
        mask = config.get("model_mask_name")
        if mask is not None and mask not in forward_signature(type(layer)).parameters:
            raise LTDError(
                f"ltd_fx.deepspeed: {type(layer).__name__} has no argument {mask!r}; correct model_mask_name"
            )
        aligned = {} if mask is None else {mask: align_attention_mask}
        return LayerPattern(hidden=hidden, aligned=aligned, batch_first=_ORDERS[order])
    if pattern.batch_first != _ORDERS[order]:
        raise LTDError(
            f"ltd_fx.deepspeed: hidden_state_order={order!r}, but the pattern of {type(layer).__name__} has "
            f"batch_first={pattern.batch_first}; correct one of them"
        )
    return pattern


def convert_to_random_ltd(
    model: nn.Module,
    layer_class: type[nn.Module],
    scheduler: LTDScheduler | None = None,
    config: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Wrap each ``layer_class`` of ``model`` (which DDP or DeepSpeed's engine may hold), in place.

    Args:
        model: holds the layers.
        layer_class: which to wrap in :class:`RandomLayerTokenDrop`.
        scheduler: if given, :meth:`RandomLayerTokenDrop.init_config` is called on the layers that
            ``config["random_ltd_layer_id"]`` lists (default: all but the first and the last).
        config: DeepSpeed's ``random_ltd`` section.

    Returns:
        ``model``.

    Raises:
        LTDError: no such layer, a layer number out of range, or what ``init_config`` refuses.
    """
    inner = unwrapped(model)
    names = find_layers(inner, layer_class)
    if any(_COMPONENT in name.split(".") for name in names):
        raise LTDError(f"ltd_fx.deepspeed: {names[0]} is converted already")
    config = dict(config or {})
    ids = config.get("random_ltd_layer_id", list(range(1, len(names) - 1)))
    wrong = [i for i in ids if not isinstance(i, int) or not 0 <= i < len(names)]
    if wrong:
        raise LTDError(
            f"ltd_fx.deepspeed: random_ltd_layer_id has {wrong[0]!r}, but the layers are 0 to {len(names) - 1}"
        )
    if scheduler is not None:
        _check_free(scheduler)
        for layer in map(inner.get_submodule, names):  # Whatever is refused is refused before anything is wrapped.
            routed_class(type(layer), type(layer), _pattern(layer, config))
        config.setdefault("random_ltd_layer_num", len(ids))
        config.setdefault("total_layer_num", len(names))
    for i, name in enumerate(names):
        wrapper = RandomLayerTokenDrop(inner.get_submodule(name))
        inner.set_submodule(name, wrapper)
        if scheduler is not None and i in ids:
            wrapper.init_config(config, scheduler, i)
    if scheduler is not None and isinstance(scheduler._state, _WrapperState):
        add_root_hook(inner, scheduler._state.begin_forward)
    return model


def save_without_random_ltd(model: nn.Module) -> dict[str, Any]:
    """The state of ``model`` (which DDP or DeepSpeed's engine may hold) under the keys from before it was wrapped.

    Raises:
        LTDError: two keys become the same.
    """
    return clean_state_dict(model)


def remove_random_ltd_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """``state_dict`` with the path component ``random_ltd_layer`` taken out of its keys.

    Raises:
        LTDError: two keys become the same.
    """
    return without_components(state_dict, frozenset((_COMPONENT,)))
