"""A pytest plugin: transforms every model that a library's own tests build, and writes down what comes of each test.

pytest -p peer_suites.plugin --ltd-mode=half --ltd-library=transformers --ltd-results=results.json ...
"""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ltd_fx
from ltd_fx.runtime.records import Site

from .construction import watch_timm, watch_transformers

WATCH = {"transformers": watch_transformers, "peft": watch_transformers, "timm": watch_timm}
FULL = 1 << 20  # tokens: more than any test has
# Without: the library alone, for comparison. Full: routed classes are in place, and every call is dense, so nothing
# may change. Half: half of the tokens are dropped in training.
MODES: dict[str, Callable[[], ltd_fx.LTDScheduler | None]] = {
    "full": lambda: ltd_fx.LTDScheduler(FULL, FULL, 1, kind="constant"),
    "half": lambda: None,
}
SECONDS = 180  # for one test: one that never ends is a failure like another
REFUSAL = re.compile(r"ltd_fx\.errors\.LTDError: (.*)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ltd-mode", choices=["without", *MODES], required=True)
    parser.addoption("--ltd-library", choices=list(WATCH), required=True)
    parser.addoption("--ltd-results", type=Path, required=True)
    parser.addoption("--ltd-layers", help="for transform")
    parser.addoption("--ltd-train", action="store_true", help="loaded models are in training mode, in every run")


def pytest_configure(config: pytest.Config) -> None:
    record = Record(config.getoption("--ltd-results"))
    config.pluginmanager.register(record)
    mode, layers, train = (config.getoption(f"--ltd-{name}") for name in ("mode", "layers", "train"))

    def built(model: nn.Module) -> None:
        if mode in MODES:
            record.transform(model, MODES[mode](), layers)
        if train:
            model.train()

    library = config.getoption("--ltd-library")
    WATCH[library](built)
    record.count_routed_calls()
    if library == "peft":
        from .hub import stay_offline  # which takes seconds, and needs transformers

        stay_offline()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    def too_long(*_: Any) -> None:
        raise TimeoutError(f"the test took more than {SECONDS} seconds")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


class Record:
    """What became of each model and of each test."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tests: dict[str, dict[str, Any]] = {}
        self._models: Counter[str] = Counter()
        self._untouched: dict[str, str] = {}

    def transform(self, model: nn.Module, scheduler: ltd_fx.LTDScheduler | None, layers: str | None) -> None:
        """Route every layer: these models have two of them, or fewer."""
        if ltd_fx.is_transformed(model):
            return
        try:
            ltd_fx.transform(model, scheduler, layers=layers, skip_first=0, skip_last=0)
        except ltd_fx.LTDError as refusal:
            self._models["refused"] += 1
            self._untouched[type(model).__name__] = str(refusal)
        else:
            self._models["transformed"] += 1

    def count_routed_calls(self) -> None:
        """Of routed layers in training, outside compiled code: were there none, nothing would have been tested."""
        begin_call = Site.begin_call

        def counted(site: Site) -> None:
            if not torch.compiler.is_compiling():
                self._models["routed calls"] += 1
            begin_call(site)

        Site.begin_call = counted  # type: ignore[method-assign]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test fails if any part of it does: set-up, call, tear-down, a subtest."""
        test = self._tests.setdefault(report.nodeid, {"outcome": "passed"})
        if report.failed and "failed its subtests" not in report.longreprtext:
            refusal = REFUSAL.search(report.longreprtext)
            if refusal is None or test["outcome"] == "passed":
                test["outcome"] = "failed" if refusal is None else "refused"
                test["why"] = _last_error(report.longreprtext) if refusal is None else refusal[1]
        elif report.skipped and test["outcome"] == "passed" and not isinstance(report, pytest.SubtestReport):
            test["outcome"] = "skipped"

    def pytest_sessionfinish(self) -> None:
        result = {"tests": self._tests, "models": self._models, "untouched": self._untouched}
        self._path.write_text(json.dumps(result, indent=1))


def _last_error(text: str) -> str:
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return errors[0] if errors else text.strip().splitlines()[-1]
