"""What two runs of a suite say of ltd_fx, and the page that tells it."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

from .by_design import BY_DESIGN
from .suites import Suite

HEAD = """# Other libraries' own tests, with every model transformed

Made by `make peers`, which downloads the source distributions of the installed versions, and runs the tests in them
three times: without ltd_fx; with each model that a test builds transformed at a reserved length that is never reached
(*full*: routed layers in place, all calls dense); and with half of the tokens dropped in training (*half*). Every layer
is routed, the first and the last too (not T5's first, which makes the position bias). Tests that are skipped (no GPU,
no network, not for this model) are not counted; *routed calls* are those of routed layers in training. peft's tests
train models as `from_pretrained` leaves them, in eval mode: in `peft-training` they are put into training mode in every
run.

"""
REFUSED = """The model was transformed, and the forward raised an `LTDError`. (Classifiers of encoder-decoder models
make the decoder's tokens from the encoder's: as many, always. So what belongs to the one seems to belong to the other,
and the proof finds the routing wrong.)
"""
LEFT_ALONE = """`transform` raised an `LTDError`, and the test went on with the model as it was.
"""
FAIL_WITHOUT = """Here, with the models of `tests/peer_suites/transformers_models.py` and without a network.
"""
MODES = ("full", "half")
COLUMNS = [
    "package",
    "version",
    "suite",
    "run",
    "tests",
    "pass without",
    "pass with",
    "fail only with",
    "differ by design",
    "refused",
    "models transformed",
    "models left alone",
    "routed calls",
]


@dataclass(frozen=True)
class Verdict:
    """One suite, one mode, against the run without ltd_fx."""

    suite: Suite
    mode: str
    without: dict[str, Any]
    results: dict[str, Any]

    def _outcomes(self, outcome: str) -> dict[str, str]:
        """The tests that pass without ltd_fx and come to ``outcome`` with it, and why.

        One that is skipped with it, or does not run, has failed.
        """
        found = {}
        for name, before in self.without["tests"].items():
            test = self.results["tests"].get(name, {"outcome": "absent"})
            kind = test["outcome"] if test["outcome"] in ("passed", "refused") else "failed"
            if before["outcome"] == "passed" and kind == outcome:
                found[name] = test.get("why", test["outcome"])
        return found

    @cached_property
    def by_design(self) -> dict[str, str]:
        """Failures that are right, and the reason."""
        reasons = {name: _reason(self.suite.library, self.mode, name) for name in self._outcomes("failed")}
        return {name: reason for name, reason in reasons.items() if reason}

    @cached_property
    def faults(self) -> dict[str, str]:
        """What fails only with ltd_fx, and is not meant to."""
        return {name: why for name, why in self._outcomes("failed").items() if name not in self.by_design}

    @cached_property
    def refused(self) -> dict[str, str]:
        return self._outcomes("refused")

    def count(self, outcome: str) -> int:
        """Of the tests without ltd_fx."""
        return Counter(test["outcome"] for test in self.without["tests"].values())[outcome]

    def summary(self) -> str:
        passed, models = len(self._outcomes("passed")), self.results["models"]
        lines = [
            f"  of {self.count('passed')} that pass without ltd_fx, {passed} pass, {len(self.refused)} are refused, "
            f"{len(self.by_design)} differ by design, {len(self.faults)} fail; {models.get('transformed', 0)} models "
            f"transformed, {models.get('refused', 0)} left alone, {models.get('routed calls', 0)} routed calls",
            *(f"  FAILS {name}: {why}" for name, why in self.faults.items()),
        ]
        return "\n".join(lines)

    def row(self) -> list[Any]:
        ran, models = self.count("passed") + self.count("failed"), self.results["models"]
        counts = [len(self._outcomes("passed")), len(self.faults), len(self.by_design), len(self.refused)]
        models = [models.get(key, 0) for key in ("transformed", "refused", "routed calls")]
        library = self.suite.library
        return [library, version(library), self.suite.name, self.mode, ran, self.count("passed"), *counts, *models]


def page(verdicts: list[Verdict]) -> str:
    """The Markdown page."""
    parts = [
        HEAD + _table([COLUMNS, ["---"] * len(COLUMNS), *(verdict.row() for verdict in verdicts)]),
        _section("Differ by design", "", [(v.suite.name, why, n) for v in verdicts for n, why in v.by_design.items()]),
        _section(
            "Refused in a forward",
            REFUSED,
            [(v.suite.name, _general(why), n) for v in verdicts for n, why in v.refused.items()],
        ),
        _section(
            "Models left alone",
            LEFT_ALONE,
            [(v.suite.name, _general(why), n) for v in verdicts for n, why in v.results["untouched"].items()],
        ),
        _section(
            "Fail without ltd_fx",
            FAIL_WITHOUT,
            [
                (v.suite.name, test["why"], name)
                for v in verdicts[:: len(MODES)]
                for name, test in v.without["tests"].items()
                if test["outcome"] == "failed"
            ],
        ),
    ]
    return "\n".join(parts)


def _table(rows: list[list[Any]]) -> str:
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def _section(title: str, text: str, entries: list[tuple[str, str, str]]) -> str:
    """Entries (suite, reason, test or class), those of one reason together."""
    if not entries:
        return f"## {title}\n\nNone.\n"
    names: dict[tuple[str, str], set[str]] = defaultdict(set)
    for suite, reason, name in entries:
        names[suite, reason].add(name.rpartition("::")[2])
    lines = [f"- {suite}: {_listed(of)}: {reason}\n" for (suite, reason), of in names.items()]
    return "\n".join([f"## {title}\n", *([text] if text else []), "".join(lines)])


def _listed(names: set[str]) -> str:
    first = [f"`{name}`" for name in sorted(names)[:3]]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def _general(message: str) -> str:
    """Without the numbers of layers and of errors, so that what has the same reason is one entry."""
    return re.sub(r"\.\d+\b", ".*", re.sub(r" \(relative error [^)]*\)", "", message))


def _reason(library: str, mode: str, name: str) -> str:
    for entry in BY_DESIGN:
        if entry.library == library and entry.mode == mode and re.search(entry.test, name):
            return entry.reason
    return ""
