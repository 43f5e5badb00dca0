"""The verdicts, the intervals behind them, and the page that is made of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

import claims
import short
from claims import CLAIMS, Claim, percent
from config import RUNS, load
from intervals import of_mean, of_next

ROOT = RUNS.parents[1]


def test_intervals() -> None:
    """Against Student's table: 4.303 at two degrees of freedom."""
    mean, following = of_mean([1.0, 2.0, 3.0]), of_next([1.0, 2.0, 3.0])
    assert (mean.mean, mean.seeds) == (2.0, 3)
    assert mean.high - 2 == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert following.high - 2 == pytest.approx(4.303 * (4 / 3) ** 0.5, rel=1e-3)
    assert 2 - mean.low == pytest.approx(mean.high - 2)


@pytest.mark.parametrize(
    ("percents", "verdicts"),
    [
        ([-0.2, -0.21, -0.19], ("shown", "shown", "contradicted")),
        ([0.2, 0.21, 0.19], ("shown", "contradicted", "shown")),
        ([1.0, 1.1, 0.9], ("contradicted", "contradicted", "shown")),
        ([-1.0, 0.0, 1.0], ("not shown", "not shown", "not shown")),
    ],
)
def test_verdicts(percents: list[float], verdicts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a claim to be within 0.5%, to have less, and to have more."""
    losses = {"ours": [2 * (1 + value / 100) for value in percents], "theirs": [2.0] * 3, "none": []}
    runs = {
        name: {seed: {"evaluations": [{"loss": loss}]} for seed, loss in enumerate(values)}
        for name, values in losses.items()
    }
    monkeypatch.setattr(claims, "results", lambda: runs)
    about = ("ours", "theirs", percent("loss"), "%")
    found = [Claim("within", *about, margin=0.5), Claim("less", *about), Claim("more", *about, worse=True)]
    assert tuple(claim.verdict() for claim in found) == verdicts
    assert Claim("", "none", "theirs", percent("loss"), "%").verdict() == "not run yet"


def test_more_can_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {
        name: {seed: {"evaluations": [{"accuracy": value}]} for seed, value in enumerate(values)}
        for name, values in {"ours": [97.9, 98.0, 97.8], "theirs": [98.0, 98.1, 97.9]}.items()
    }
    monkeypatch.setattr(claims, "results", lambda: runs)
    claim = Claim("", "ours", "theirs", claims.points("accuracy"), "points", better=1, margin=0.3)
    assert claim.verdict() == "shown"
    assert Claim("", "ours", "theirs", claims.points("accuracy"), "points", better=1).verdict() == "contradicted"


def test_claims_are_about_runs_that_exist() -> None:
    for claim in CLAIMS:
        assert load(claim.arm).task == load(claim.against).task


def test_the_page_is_made_of_the_results(tmp_path: Path) -> None:
    page = ROOT / "docs" / "learning.md"
    shutil.copy(page, tmp_path)
    subprocess.run([sys.executable, ROOT / "study" / "report.py", tmp_path / page.name], check=True)
    assert (tmp_path / page.name).read_text() == page.read_text()


def test_the_short_study_ends_where_the_published_runs_were_looked_at() -> None:
    for run, _, until in short.jobs():
        assert until in load(run).evaluated()
