"""The runs that were done, as their JSON files say."""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from files import RESULTS

Result = dict[str, Any]


@cache
def results(folder: Path = RESULTS) -> dict[str, dict[int, Result]]:
    """By ``task/arm``, then by seed."""
    found: dict[str, dict[int, Result]] = defaultdict(dict)
    for path in sorted(folder.rglob("*.json")):
        result = json.loads(path.read_text(encoding="ascii"))
        found[result["config"]["name"]][result["seed"]] = result
    return dict(found)


def at_the_end(result: Result, metric: str) -> float:
    """What the last evaluation says."""
    return float(result["evaluations"][-1][metric])


def at(result: Result, metric: str, cost: str, value: float) -> float:
    """What evaluations say where the run's ``cost`` (step, layer tokens, seconds) was ``value``, linearly between."""
    rows = result["evaluations"]
    return float(np.interp(value, [row[cost] for row in rows], [row[metric] for row in rows]))
