"""Learn a layer's pattern from how the model calls it at several lengths and batch sizes.

A dimension carries the sequence if it changed exactly when the layer's hidden states did, and to the same length; of a
forward at symbolic sizes, if its expression is that of their length.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.learn.layer_pattern import Align, LayerPattern, forward_signature
from ltd_fx.learn.observe import Call, is_stream
from ltd_fx.learn.probe import Probe
from ltd_fx.learn.sizes import SizeReader
from ltd_fx.runtime import PACKED, Aligned, Draw, gather_argument
from ltd_fx.tree import item_of, items_of, leaves

_POSITIONS = ("positions", "position_ids")


def infer_pattern(
    name: str,
    layer_class: type[nn.Module],
    call: Call,
    lengths: list[Probe],
    batch: Probe | None,
    seq_dim: int,
    *,
    near: int = 0,
) -> LayerPattern:
    """The pattern of a layer.

    Args:
        name: the layer's.
        layer_class: whose ``forward`` names the arguments.
        call: as the example inputs have it.
        lengths: forwards at other sequence lengths, or one at symbolic sizes; where the layer's stays the same in all,
            sizes equal to the sequence length follow it.
        batch: a forward at another batch size, or one at symbolic sizes.
        seq_dim: the dimension of the hidden states that carries the sequence, 0 or 1.
        near: where its length stays the same, also take tables of so many rows more than tokens to follow them.

    Raises:
        LTDError: no argument looks like hidden states that the layer returns, or one follows the tokens in a way that
            cannot be gathered.
    """
    signature = forward_signature(layer_class)
    moved = [probe.calls[name] for probe in lengths]
    base, *others = (_arguments(signature, c) for c in (call, *moved))
    rebatched = _arguments(signature, batch.calls[name]) if batch is not None else None
    hidden = _find_hidden(name, base, call.output)
    sizes, batches = (
        [arguments[hidden].shape[dim] for arguments in (base, *probed)]
        for dim, probed in ((seq_dim, others), (1 - seq_dim, [rebatched] if rebatched else []))
    )
    reader = SizeReader(name, sizes, batches, near)
    aligned: dict[str, Align] = {}
    cache = None
    for argument, value in base.items():
        if argument == hidden or argument in PACKED:  # These follow the tokens in a way of their own.
            continue
        if hasattr(value, "get_seq_length"):
            cache = argument
            continue
        across = [arguments.get(argument) for arguments in others]
        if any(leaf is not None for leaf in leaves(value)):
            aligned[argument] = reader.entry(argument, value, across, rebatched.get(argument) if rebatched else None)
    outputs = [(arguments[hidden].shape, c.output) for arguments, c in zip(others, moved, strict=True)]
    slot, returned, dropped = _outputs(base, hidden, call, outputs, reader)
    return LayerPattern(hidden, aligned, seq_dim == 1, slot, returned, dropped, cache)


def per_head(pattern: LayerPattern) -> LayerPattern:
    """The pattern whose tables without batch and heads (rotary ``[S, D]``) get a dimension for each, to broadcast."""

    def changed(entry: Any) -> Any:
        if isinstance(entry, Aligned):
            return entry._replace(per_head=True) if entry.batch is None else entry
        if isinstance(entry, tuple) and any(isinstance(e, tuple) for e in entry):
            return tuple(e and changed(e) for e in entry)
        return Aligned(entry, None, per_head=True) if isinstance(entry, tuple) and 0 in entry else entry

    return replace(pattern, aligned={name: changed(entry) for name, entry in pattern.aligned.items()})


def with_positions(pattern: LayerPattern, layer_class: type[nn.Module]) -> LayerPattern:
    """The pattern that passes the kept positions to a layer which takes positions, and counts them itself otherwise."""
    names = [n for n in forward_signature(layer_class).parameters if n in _POSITIONS and n not in pattern.aligned]
    return replace(pattern, aligned={**pattern.aligned, **dict.fromkeys(names, kept_positions)})


def kept_positions(draw: Draw | None, value: Any) -> Any:
    """``[B, k]`` positions: those of the kept tokens where the layer is called without."""
    if draw is None or value is not None:
        return gather_argument(draw, value, "positions", (1,))
    return draw.indices.expand(draw.batch, -1)


def _arguments(signature: Any, call: Call) -> dict[str, Any]:
    bound = dict(signature.bind(*call.args, **call.kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound.update(bound.pop(parameter.name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL and parameter.name in bound:
            bound["*args"] = bound.pop(parameter.name)
    return bound


def _find_hidden(name: str, arguments: Mapping[str, Any], output: Any) -> str:
    shapes = [leaf.shape for leaf in leaves(output) if isinstance(leaf, Tensor)]
    for argument, value in arguments.items():
        if is_stream(value) and value.shape in shapes:
            return argument
    given = ", ".join(f"{n} {tuple(v.shape)}" for n, v in arguments.items() if isinstance(v, Tensor))
    raise LTDError(
        f"ltd_fx: {name}: no argument holds 3-D floating-point hidden states [B, S, D] that the layer returns at the "
        f"same shape (it takes {given or 'no tensor'}); leave it out with transform(..., layers=...)"
    )


def _outputs(
    arguments: Mapping[str, Any], hidden: str, call: Call, moved: list[tuple[Any, Any]], reader: SizeReader
) -> tuple[int | None, dict[int, str | None], tuple[int, ...]]:
    """The slot of the hidden states, what is in the other slots that hold tensors, and which of them to drop."""
    items = items_of(call.output)
    if items is None:
        return 0, {}, ()
    shape = arguments[hidden].shape
    given = {id(value) for value in arguments.values()}
    slots = [i for i, t in enumerate(items) if isinstance(t, Tensor) and t.shape == shape and id(t) not in given]
    slots = [i for i in slots if all(getattr(item_of(output, i), "shape", size) == size for size, output in moved)]
    if len(slots) > 1:
        raise LTDError(
            f"ltd_fx: {call.name}: slots {slots} of its output are all as large as the hidden states; say which "
            "holds them with register_pattern(..., LayerPattern(output=...))"
        )
    slot = slots[0] if slots else 0
    returned: dict[int, str | None] = {}
    dropped: list[int] = []
    for i, item in enumerate(items):
        if i == slot or not isinstance(item, Tensor):
            continue
        source = next((name for name, value in arguments.items() if value is item), None)
        if source is not None:
            returned[i] = source
        elif all(not reader.moves(item, item_of(output, i)) for _, output in moved) and (
            moved or shape[1] not in item.shape
        ):
            returned[i] = None
        else:
            dropped.append(i)
    return slot, returned, tuple(dropped)
