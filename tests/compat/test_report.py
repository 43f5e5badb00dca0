"""What the plugin counts as ours, what it reports, and the table made of it."""

import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compat.deprecations import deprecations
from compat.table import result, table

LIBRARY = """
import functools, logging, warnings

def warn():
    warnings.warn("old is deprecated", FutureWarning)

def decorated(function):
    @functools.wraps(function)
    def wrapper():
        warn()
        return function()
    return wrapper

@decorated
def old():
    pass

def removed(stacklevel):
    warnings.warn("removed is deprecated", DeprecationWarning, stacklevel=stacklevel)

def logged():
    logging.getLogger("transformers").warning("logged is deprecated")

def other():
    warnings.warn("slow", UserWarning)
"""
USER = "import library\n\ndef run(name, *args):\n    getattr(library, name)(*args)\n"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A library, and another that uses it."""
    (tmp_path / "library.py").write_text(LIBRARY)
    (tmp_path / "user.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", False)
    yield importlib.import_module("library"), importlib.import_module("user")
    for name in ("library", "user"):
        del sys.modules[name]


def test_of_deprecated_calls_only_ours_count(library: Any) -> None:
    library, user = library
    with deprecations() as found:
        user.run("old")
        user.run("removed", 2)
        user.run("logged")
        library.other()
        assert not found
        library.old()
        library.removed(1)
        library.removed(2)
        library.logged()
    removed = "DeprecationWarning: removed is deprecated"
    assert found == ["FutureWarning: old is deprecated", removed, removed, "logged is deprecated"]


SUITE = """
import warnings, pytest

@pytest.mark.compat("torch")
def test_right(): pass

@pytest.mark.compat("torch")
def test_wrong(): raise ValueError("first line\\nsecond line")

@pytest.mark.compat("timm")
def test_absent(): pytest.skip("no torchvision")

@pytest.fixture(scope="module")
def run():
    warnings.warn("of a fixture", FutureWarning)

@pytest.mark.compat("peft")
def test_deprecated(run): pass

def test_other(): raise ValueError
"""


def test_what_broke_and_in_which_package(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "test_import.py").write_text("import pytest\npytest.importorskip('ltd_fx_that_is_missing')\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = compat(package): x\n")
    tests = str(Path(__file__).parents[1])
    # what the suite calls counts as ours
    start = f"import compat.deprecations as d, pytest; d.OURS += ({str(tmp_path)!r},); raise SystemExit(pytest.main())"
    options = "-p compat.report -p no:cacheprovider -m compat --outcomes out.json"
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": tests, "PYTEST_ADDOPTS": options},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    assert re.search(
        r"\ntorch .* BROKEN +1 failed, 1 passed, 0 skipped\n    test_wrong: ValueError: first line\n", done.stdout
    )
    assert re.search(
        r"\ntimm .* - +0 failed, 0 passed, 1 skipped\n    skipped: test_absent: no torchvision\n", done.stdout
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["passed"] == {"torch": 1}
    assert report["failed"]["torch"] == ["test_wrong: ValueError: first line"]
    assert report["failed"]["peft"] == ["test_deprecated: FutureWarning: of a fixture"]
    (missing,) = report["failed"]["import"]
    assert "ltd_fx_that_is_missing" in missing
    failed = "1 of import failed; 1 of torch failed; 1 of peft failed"
    outcomes = f"1 passed; {failed}; 1 of timm left out (no torchvision)"
    assert result(report) == outcomes
    head, _, row = table([report]).splitlines()
    assert head.startswith("| python | torch | transformers |")
    assert row.endswith(f"| {outcomes} |")
