"""Whether a recompute in the backward pass draws what its forward drew."""

from torch import Tensor

from ltd_fx.errors import LTDError


class Recomputes:
    """Refuses a recompute that would draw other tokens.

    ``torch.utils.checkpoint`` around a routed layer calls it again in the backward pass, where the key must still be
    that of the original forward. It is, unless another forward came between; then nothing tells the two apart.
    """

    def __init__(self) -> None:
        self._latest: tuple[Tensor, int] | None = None
        self._ambiguous = False

    def expect(self, key: Tensor, step: int) -> None:
        """A routed layer runs, in a forward whose backward may call it again."""
        if self._latest is None or self._latest[0] is not key:
            self._ambiguous = self._latest is not None and self._latest[1] == step
            self._latest = key, step

    def check(self, key: Tensor) -> None:
        """A routed layer runs again.

        Raises:
            LTDError: there was another forward since, or the scheduler stepped.
        """
        if self._latest is None or self._latest[0] is not key or self._ambiguous:
            raise LTDError(
                "ltd_fx: activation checkpointing recomputes a routed layer, but the model ran another training "
                "forward since (or the scheduler stepped), so the layer would draw other tokens. Call backward() after "
                "each forward, or checkpoint inside the layer (transformers' gradient_checkpointing_enable() does)."
            )
        # The backward of this forward has begun, so the next forward is the only one that awaits a recompute.
        self._latest = key, -1
