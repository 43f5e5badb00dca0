"""A route over several layers: tokens leave at its first layer and return after its last (TREAD, arXiv 2501.04765).

Its layers share one draw, and the hidden states between them are of the kept tokens only.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltd_fx.errors import LTDError
from ltd_fx.tree import items_of

if TYPE_CHECKING:
    from ltd_fx.draw import Draw, Site


class Span:
    """What the layers of one route hand on during a forward; kept by their sites."""

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget the forward."""
        self.open = False
        self.draw: Draw | None = None
        self.hidden: Tensor | None = None  # of the kept tokens, as the layer before returned them
        self.version = 0

    def hold(self, hidden: Tensor) -> None:
        """Remember what the next layer must be given."""
        self.hidden, self.version = hidden, _version(hidden)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and ``torch.save(model)``: no forward is in progress there."""
        return vars(Span())


def hand_over(site: "Site", draw: "Draw | None", rest: Tensor | None, output: Any, slot: int | None) -> Any:
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


def take_over(site: "Site", hidden: Tensor, leaves: bool) -> "Draw | None":
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
    if _version(hidden) != span.version:  # written into
        return False
    if hidden is span.hidden:
        return True
    # FSDP's hooks hand on a view of it
    return not torch.compiler.is_compiling() and span.hidden is not None and _memory(hidden) == _memory(span.hidden)


def _version(value: Tensor) -> int:
    """How many times it was written into, where that is known."""
    return 0 if torch.compiler.is_compiling() or value.is_inference() else value._version


def _memory(value: Tensor) -> tuple[Any, ...]:
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def rest_of(draw: "Draw | None") -> Tensor | None:
    """The stream of dropped tokens that waits for the route's end."""
    return None if draw is None else draw.rest
