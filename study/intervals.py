"""Intervals over seeds, by Student's t."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its bounds over ``seeds`` seeds."""

    mean: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def of_mean(values: Sequence[float]) -> Interval:
    """Where the mean of all seeds lies, were there many; paired differences come in as one value a seed."""
    return _around(values, sqrt(1 / len(values)))


def of_next(values: Sequence[float]) -> Interval:
    """Where the value of one more seed will lie."""
    return _around(values, sqrt(1 + 1 / len(values)))


def _around(values: Sequence[float], scale: float) -> Interval:
    assert len(values) > 1, "one seed has no interval"
    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * stdev(values) * scale
    centre = mean(values)
    return Interval(centre, centre - half, centre + half, len(values))
