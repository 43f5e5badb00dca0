"""A route over several layers: tokens leave at its first layer and return after its last (TREAD, arXiv 2501.04765).

Its layers share one draw, and the hidden states between them are of the kept tokens only.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ltd_fx.errors import LTDError

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

    def __getstate__(self) -> dict[str, Any]:
        """For copies and ``torch.save(model)``: no forward is in progress there."""
        return {"open": False, "draw": None}


def hand_over(site: "Site", draw: "Draw | None", rest: Tensor, output: Any) -> Any:
    """After the first layer: leave the draw, and the stream of dropped tokens, to the next; returns ``output``."""
    assert site.span is not None
    site.span.open = True
    site.span.draw = None if draw is None else draw._replace(rest=rest)
    return output


def take_over(site: "Site", leaves: bool) -> "Draw | None":
    """In place of a draw of its own, the one that the route's first layer made; ``None`` where that ran dense.

    Raises:
        LTDError: in training, if the first layer did not run before.

    """
    span = site.span
    assert span is not None
    draw = span.draw
    if not span.open and site.layer.training and site.state.observed is None:
        raise LTDError(
            f"ltd_fx: {site.name} is called without the layers before it on its route, or again for a recompute by "
            "torch.utils.checkpoint around it alone; checkpoint the whole route, or inside the layers (transformers' "
            "gradient_checkpointing_enable() does)"
        )
    if leaves:
        span.close()
    return draw


def rest_of(draw: "Draw | None") -> Tensor | None:
    """The stream of dropped tokens that waits for the route's end."""
    return None if draw is None else draw.rest
