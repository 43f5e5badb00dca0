"""What a scheduler drives, as far as it knows: the draws and layer counts of one transformed model."""

from collections.abc import Mapping
from typing import Any, Protocol

from ltd_fx.schedule.length import ReservedLength


class Driven(Protocol):
    """A transformed model's side of its scheduler; ``runtime.state.RouteState`` is the one implementation."""

    shares: dict[float | None, int]  # How many routed layers have which share of their own, or none.
    dense: int  # How many target layers are dense.
    lengths: dict[float | None, ReservedLength]  # What the routed layers read, by share.

    @property
    def spans_ranks(self) -> bool:
        """Whether ranks must agree at each load."""
        ...

    def refuse_step(self) -> None:
        """Raise ``LTDError`` where draws are to stay the same."""
        ...

    def begin_step(self, step: int) -> None:
        """New draws, for the first forward of ``step``."""
        ...

    def count_calls(self) -> None:
        """Bring ``shares`` and ``dense`` up to date."""
        ...

    def position(self) -> dict[str, int]:
        """Where in the sequence of draws the model is."""
        ...

    def check_position(self, position: Any) -> None:
        """Raise ``LTDError`` unless ``position`` is one of this model's."""
        ...

    def resume(self, position: Mapping[str, int]) -> None:
        """Go to ``position`` within the current step."""
        ...

    def check_ranks(self) -> None:
        """Raise ``LTDError`` unless all ranks are at the same place of the same schedule; a collective."""
        ...
