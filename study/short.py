"""The study in 20 minutes on two cores, with another seed: ``make study``. Does it fall where the published runs say?

Each run has the settings of the published one and goes through its first part. There its held-out metric, over that of
the dense run of the same seed, is compared with the interval in which one more seed must lie by the published ones at
the same step. (The metrics themselves depend on the version of Python, whose library is the text.)
"""

import sys

from all import Job, run_all
from config import load
from files import SCRATCH
from intervals import of_next
from outcomes import Result, results

SEED = 10
# task, share of the steps, metric, arms to compare with the dense one
PARTS = [
    ("text", 0.25, "loss", ["random-ltd", "half", "route", "truncation"]),
    ("diffusion", 0.2, "frechet", ["route-half"]),
    ("digits", 1.0, "loss", ["random-ltd"]),
]
OUT = SCRATCH / "short"
ALLOWED = 1  # outside: of 20 intervals of 95% one misses by chance


def main() -> None:
    published = results()
    if missing := [run for run, *_ in jobs() if len(published.get(run, {})) < 2]:
        sys.exit(f"two seeds of these are not published yet: {', '.join(missing)}; see study/results")
    run_all(jobs(), OUT)
    ours = results(OUT)
    outside = 0
    print(f"{'run':24} {'step':>5} {'metric':>8} {'dense':>8}  over dense, %; one more published seed, %")
    for task, share, metric, arms in PARTS:
        dense, step = f"{task}/dense", last_step(task, share)
        for arm in (f"{task}/{name}" for name in arms):
            value = effect(ours[arm][SEED], ours[dense][SEED], metric, step)
            seeds = sorted(published[arm].keys() & published[dense].keys())
            expected = of_next([effect(published[arm][s], published[dense][s], metric, step) for s in seeds])
            inside = expected.low <= value <= expected.high
            outside += not inside
            here = row_at(ours[dense][SEED], step)[metric]
            where = f"{expected.low:+.2f} to {expected.high:+.2f}, {'inside' if inside else 'OUTSIDE'}"
            print(f"{arm:24} {step:5} {metric:>8} {here:8.4f}  {value:+.2f}; {where}")
    sys.exit(f"{outside} outside" if outside > ALLOWED else 0)


def jobs() -> list[Job]:
    return [
        (f"{task}/{arm}", SEED, last_step(task, share)) for task, share, _, arms in PARTS for arm in ("dense", *arms)
    ]


def last_step(task: str, share: float) -> int:
    return round(share * load(f"{task}/dense").steps)


def effect(ours: Result, dense: Result, metric: str, step: int) -> float:
    """By how many percent the metric is above the dense run's."""
    return 100 * (row_at(ours, step)[metric] / row_at(dense, step)[metric] - 1)


def row_at(result: Result, step: int) -> dict[str, float]:
    return next(row for row in result["evaluations"] if row["step"] == step)


if __name__ == "__main__":
    main()
