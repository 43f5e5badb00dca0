"""Interleaved rounds of several variants, and ratios between them: on a shared machine only these mean anything."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Times:
    """Seconds ``[rounds]`` of each variant: by the process's CPU clock, and by the wall's."""

    cpu: dict[str, Array]
    wall: dict[str, Array]


def interleave(steps: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Time every variant once a round, in an order that changes with the round."""
    names = list(steps)
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    for step in steps.values():
        step()
    for i in range(rounds):
        for name in np.random.default_rng(i).permutation(names):
            start = time.process_time(), time.perf_counter()
            steps[name]()
            cpu[name].append(time.process_time() - start[0])
            wall[name].append(time.perf_counter() - start[1])
    return Times({n: np.array(t) for n, t in cpu.items()}, {n: np.array(t) for n, t in wall.items()})


class Estimate(NamedTuple):
    """A ratio of medians, with the 90% interval of a bootstrap over rounds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def bootstrap(ratio: Callable[[dict[str, float]], float], seconds: Mapping[str, Array], draws: int = 2000) -> Estimate:
    """``ratio`` of the medians; rounds are drawn with replacement, the same ones for all variants (paired)."""
    names = list(seconds)
    table = np.stack([seconds[name] for name in names])
    rounds = table.shape[1]
    picks = np.random.default_rng(0).integers(rounds, size=(draws, rounds))
    medians = np.median(table[:, picks], axis=2)
    values = [ratio(dict(zip(names, column, strict=True))) for column in medians.T]
    low, high = np.quantile(values, [0.05, 0.95])
    return Estimate(ratio(dict(zip(names, np.median(table, axis=1), strict=True))), float(low), float(high))


def efficiency(seconds: Mapping[str, Array], name: str) -> Estimate:
    """Realised efficiency: the time that ``name`` saves over the time that the ideal saves."""
    return bootstrap(lambda t: (t["dense"] - t[name]) / (t["dense"] - t["ideal"]), seconds)


def rounds_wanted(default: int) -> int:
    """``LTD_FX_ROUNDS``, or ``default``."""
    return int(os.environ.get("LTD_FX_ROUNDS", default))
