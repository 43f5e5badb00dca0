"""What the study claims, and what the runs say of each: *shown*, *not shown* or *contradicted*."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from intervals import of_mean
from outcomes import Result, at, at_the_end, results

Runs = dict[int, Result]  # by seed


@dataclass(frozen=True)
class Claim:
    """One comparison of two arms, paired by seed.

    Attributes:
        text: the claim.
        arm: what it is about, ``task/arm``.
        against: what it is compared with.
        effect: of one seed's pair of results.
        unit: of the effect.
        better: -1 where less is better, 1 where more is.
        margin: the claim holds if the arm is worse by no more than this; 0: only if it is better.
        worse: the claim is that the arm is worse.
    """

    text: str
    arm: str
    against: str
    effect: Callable[[Result, Result], float]
    unit: str
    better: int = -1
    margin: float = 0.0
    worse: bool = False

    def effects(self) -> list[float]:
        """One of each seed that both arms have."""
        ours, theirs = results().get(self.arm, {}), results().get(self.against, {})
        return [self.effect(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]

    def verdict(self) -> str:
        """*shown* or *contradicted* where the whole interval says so, *not shown* where it straddles."""
        effects = self.effects()
        if len(effects) < 2:
            return "one seed" if effects else "not run yet"
        interval = of_mean(effects)
        # how much better than claimed, at the least and at the most
        sign = -self.better if self.worse else self.better
        least, most = sorted((sign * interval.low + self.margin, sign * interval.high + self.margin))
        return "shown" if least > 0 else "contradicted" if most < 0 else "not shown"


def percent(metric: str) -> Callable[[Result, Result], float]:
    """By how many percent the metric is higher, both at the end."""
    return lambda ours, theirs: 100 * (at_the_end(ours, metric) / at_the_end(theirs, metric) - 1)


def percent_at_equal(cost: str, metric: str) -> Callable[[Result, Result], float]:
    """The same, the other run looked at where it had cost as much as this one in all."""

    def effect(ours: Result, theirs: Result) -> float:
        return 100 * (at_the_end(ours, metric) / at(theirs, metric, cost, at_the_end(ours, cost)) - 1)

    return effect


def percent_in_seconds(ours: Result, theirs: Result) -> float:
    """The loss against that of dense runs of as many seconds: between the short and the whole one, linearly."""
    short = results()["text/dense-short"][theirs["seed"]]
    seconds = [at_the_end(run, "seconds") for run in (short, theirs)]
    losses = [at_the_end(run, "loss") for run in (short, theirs)]
    share = (at_the_end(ours, "seconds") - seconds[0]) / (seconds[1] - seconds[0])
    return 100 * (at_the_end(ours, "loss") / (losses[0] + share * (losses[1] - losses[0])) - 1)


def points(metric: str) -> Callable[[Result, Result], float]:
    """By how many points the metric is higher, both at the end."""
    return lambda ours, theirs: at_the_end(ours, metric) - at_the_end(theirs, metric)


LOSS = percent("loss")
FRECHET, FRECHET_AT = percent("frechet"), percent_at_equal("layer_tokens", "frechet")
WITHIN: Any = {"unit": "% of loss", "margin": 0.5}
LESS_LOSS: Any = {"unit": "% of loss"}
NEARER: Any = {"unit": "% of Fréchet distance"}
ACCURACY: Any = {"effect": points("accuracy"), "unit": "points", "better": 1, "margin": 0.3}
HALF, QUARTER = "diffusion/route-half", "diffusion/route-quarter"
CLAIMS = [
    Claim("random-LTD equals dense at equal steps (within 0.5%)", "text/random-ltd", "text/dense", LOSS, **WITHIN),
    Claim("random-LTD beats dense at equal layer tokens", "text/random-ltd", "text/dense-short", LOSS, **LESS_LOSS),
    Claim("random-LTD beats dense at equal seconds", "text/random-ltd", "text/dense", percent_in_seconds, **LESS_LOSS),
    Claim("LayerToken LR helps random-LTD", "text/random-ltd-lr", "text/random-ltd", LOSS, **LESS_LOSS),
    Claim("random-LTD composes with length warm-up (within 0.5%)", "text/both", "text/truncation", LOSS, **WITHIN),
    Claim("length warm-up equals dense at equal steps (within 0.5%)", "text/truncation", "text/dense", LOSS, **WITHIN),
    Claim("half of the tokens to the end equals dense (within 0.5%)", "text/half", "text/dense", LOSS, **WITHIN),
    Claim("a TREAD route of half equals dense on text (within 0.5%)", "text/route", "text/dense", LOSS, **WITHIN),
    Claim("a TREAD route of half improves generation at equal steps", HALF, "diffusion/dense", FRECHET, **NEARER),
    Claim("a TREAD route of half improves it at equal layer tokens", HALF, "diffusion/dense", FRECHET_AT, **NEARER),
    Claim("a route that drops 0.75 hurts, against 0.5", QUARTER, HALF, FRECHET, **NEARER, worse=True),
    Claim("a route that drops 0.75 hurts, against dense", QUARTER, "diffusion/dense", FRECHET, **NEARER, worse=True),
    Claim(
        "a route that ends at the last layer hurts", "diffusion/route-to-the-end", HALF, FRECHET, **NEARER, worse=True
    ),
    Claim(
        "random-LTD improves generation at equal steps", "diffusion/random-ltd", "diffusion/dense", FRECHET, **NEARER
    ),
    Claim("ViT on letters: as accurate (within 0.3 points)", "letters/random-ltd", "letters/dense", **ACCURACY),
    Claim("ViT on digits: as accurate (within 0.3 points)", "digits/random-ltd", "digits/dense", **ACCURACY),
]
