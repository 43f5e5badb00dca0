"""A route over several layers: tokens leave at its first layer and return after its last (TREAD, arXiv 2501.04765).

Its layers share one draw, and the hidden states between them are of the kept tokens only.
"""

from typing import Any

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.runtime.records import Draw, Site, Span, version
from ltd_fx.tree import items_of


def hand_over(site: Site, draw: Draw | None, rest: Tensor | None, output: Any, slot: int | None) -> Any:
    """After a layer that is not the route's last: leave to the next the draw, the stream of dropped tokens (after the
    first layer; later ones pass ``None``), and the hidden states in ``slot``; returns ``output``.
    """
    span = site.span
    assert span is not None
    span.open = True
    if draw is not None:
        span.draw = draw if rest is None else draw._replace(rest=rest)
        span.hold(output if isinstance(output, Tensor) else (items_of(output) or [])[slot or 0])
    return output


def take_over(site: Site, hidden: Tensor, leaves: bool) -> Draw | None:
    """In place of a draw of its own, the one that the route's first layer made; ``None`` where that ran dense.

    Raises:
        LTDError: in training, if the first layer did not run before, or ``hidden`` is not what the layer before
            returned.
    """
    span = site.span
    assert span is not None
    draw = span.draw
    if not span.open and site.layer.training:
        raise LTDError(
            f"ltd_fx: {site.name} is called without the layers before it on its route, or again for a recompute by "
            "torch.utils.checkpoint around it alone; checkpoint the whole route, or inside the layers (transformers' "
            "gradient_checkpointing_enable() does)"
        )
    if draw is not None and not _handed_on(span, hidden):
        span.close()
        raise LTDError(
            f"ltd_fx: {site.name} is not given the hidden states as the layer before it on its route returned them: "
            "something is added to them in between, or a layer is skipped, and the dropped tokens would go without; "
            "end the route there, with two of them in transform(..., routes=...)"
        )
    if leaves:
        span.close()
    return draw


def _handed_on(span: Span, hidden: Tensor) -> bool:
    if version(hidden) != span.version:  # It was written into.
        return False
    if hidden is span.hidden:
        return True
    # FSDP's hooks hand on a view of it.
    return not torch.compiler.is_compiling() and span.hidden is not None and _memory(hidden) == _memory(span.hidden)


def _memory(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def rest_of(draw: Draw | None) -> Tensor | None:
    """The stream of dropped tokens that waits for the route's end."""
    return None if draw is None else draw.rest
