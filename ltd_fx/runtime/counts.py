"""How many layers a forward runs, routed and dense: what layer tokens are counted by."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol


class TargetLayer(Protocol):
    """A target layer, as far as it is counted."""

    @property
    def name(self) -> str: ...
    @property
    def stack(self) -> str: ...
    @property
    def routed(self) -> bool: ...
    @property
    def share(self) -> float | None: ...


def count_layers(entries: Sequence[TargetLayer], calls: Mapping[str, int]) -> tuple[dict[float | None, int], int]:
    """The routed layers by share (``None``: as scheduled), and the dense ones.

    A layer that a forward calls several times counts as often, and so do the dense layers of its stack.

    Args:
        entries: all target layers.
        calls: of routed layers, by name; those left out are called once.

    """
    times: dict[str, int] = {}
    for entry in entries:
        times[entry.stack] = max(times.get(entry.stack, 1), calls.get(entry.name, 1))
    shares: Counter[float | None] = Counter({None: 0})
    for entry in entries:
        if entry.routed:
            shares[entry.share] += calls.get(entry.name, 1)
    return dict(shares), sum(times[entry.stack] for entry in entries if not entry.routed)
