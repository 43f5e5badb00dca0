"""A pytest plugin (``-p compat.report``): what of the compatibility suite broke, and in which package."""

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from compat import PACKAGES
from compat.deprecations import deprecations


class Report:
    """Outcomes by package: how many tests passed, and of each other one its name and the first line of its reason."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.failed: dict[str, list[str]] = defaultdict(list)
        self.skipped: dict[str, list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        package = dict(report.user_properties).get("package", "?")
        name = report.nodeid.partition("::")[2]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[package].append(f"{name}: {_first_line(crash.message if crash else report.longreprtext)}")
        elif report.skipped:
            self.skipped[package].append(f"{name}: {_first_line(report.longrepr[2])}")
        elif report.when == "call":
            self.passed[package] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
        last = (reason.strip().splitlines() or [""])[-1].removeprefix("E").strip()
        # a module that skips itself where a package is missing would hide a package that is broken
        if report.failed or (report.skipped and any(name in last for name in ("ltd_fx", *PACKAGES))):
            self.failed["import"].append(f"{report.nodeid}: {last}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if any(self.failed.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def as_dict(self) -> dict[str, Any]:
        versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        return {"versions": versions, "passed": self.passed, "failed": self.failed, "skipped": self.skipped}

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        terminalreporter.section("compatibility")
        for package in sorted({*PACKAGES, *self.passed, *self.failed, *self.skipped}):
            failed, passed, skipped = self.failed.get(package, []), self.passed[package], self.skipped.get(package, [])
            state = "BROKEN" if failed else "ok" if passed else "-"
            outcomes = f"{len(failed)} failed, {passed} passed, {len(skipped)} skipped"
            terminalreporter.line(f"{package:13} {_version(package):12} {state:7} {outcomes}")
            for line in [*failed, *(f"skipped: {line}" for line in skipped)]:
                terminalreporter.line(f"    {line}")
        if path := config.getoption("--outcomes"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(json.dumps(self.as_dict(), indent=1))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].removeprefix("Failed: ").removeprefix("Skipped: ")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", help="also write the outcomes to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Report())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if marker := item.get_closest_marker("compat"):
            item.user_properties.append(("package", marker.args[0]))


# of setup and call: the runs of Trainers are fixtures
@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    with deprecations() as item.stash[_found]:
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    if item.stash[_found]:
        pytest.fail("\n".join(item.stash[_found]), pytrace=False)
    return result


_found = pytest.StashKey[list[str]]()
