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


def count_layers(layers: Sequence[TargetLayer], calls: Mapping[str, int]) -> tuple[dict[float | None, int], int]:
    """The routed layers by share (``None``: as scheduled), and the dense ones.

    A layer that a forward calls several times counts as often, and so do the dense layers of its stack.

    Args:
        layers: all target layers.
        calls: of routed layers, by name; those left out are called once.
    """
    times: dict[str, int] = {}
    for layer in layers:
        times[layer.stack] = max(times.get(layer.stack, 1), calls.get(layer.name, 1))
    shares: Counter[float | None] = Counter({None: 0})
    for layer in layers:
        if layer.routed:
            shares[layer.share] += calls.get(layer.name, 1)
    return dict(shares), sum(times[layer.stack] for layer in layers if not layer.routed)
