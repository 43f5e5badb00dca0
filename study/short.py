"""The study in 20 minutes on two cores, with another seed: ``make study``. Does it fall where the published runs say?

Each run has the settings of the published one and goes through its first part; there its held-out metric is compared
with the interval in which one more seed must lie, with 95% certainty, by the published seeds at the same step.
"""

import sys

from all import run_all
from config import load
from files import SCRATCH
from intervals import of_next
from outcomes import Result, results

SEED = 10
# run, share of its steps, metric
PARTS = [
    ("text/dense", 0.25, "loss"),
    ("text/random-ltd", 0.25, "loss"),
    ("text/half", 0.25, "loss"),
    ("text/route", 0.25, "loss"),
    ("text/truncation", 0.25, "loss"),
    ("diffusion/dense", 0.2, "frechet"),
    ("diffusion/route-half", 0.2, "frechet"),
    ("digits/dense", 1.0, "loss"),
    ("digits/random-ltd", 1.0, "loss"),
]
OUT = SCRATCH / "short"


def main() -> None:
    steps = {run: round(share * load(run).steps) for run, share, _ in PARTS}
    run_all([(run, SEED, until) for run, until in steps.items()], OUT)
    ours = results(OUT)
    outside = 0
    print(f"{'run':24} {'step':>5} {'metric':>8} {'this run':>9}  published, one more seed")
    for run, _, metric in PARTS:
        value = row_at(ours[run][SEED], steps[run])[metric]
        published = of_next([row_at(result, steps[run])[metric] for result in results()[run].values()])
        inside = published.low <= value <= published.high
        outside += not inside
        where = f"{published.low:.4f} to {published.high:.4f}"
        print(f"{run:24} {steps[run]:5} {metric:>8} {value:9.4f}  {where}, {'inside' if inside else 'OUTSIDE'}")
    # one of twenty lies outside by chance
    sys.exit(f"{outside} of {len(PARTS)} outside" if outside > 1 else 0)


def row_at(result: Result, step: int) -> dict[str, float]:
    return next(row for row in result["evaluations"] if row["step"] == step)


if __name__ == "__main__":
    main()
