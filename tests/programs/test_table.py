"""``docs/programs.md`` says how many lines each program needs."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from program import added_lines

pytestmark = pytest.mark.slow
DOCS = Path(__file__).parents[2] / "docs" / "programs.md"
ROWS = sorted(set(re.findall(r"^\|.*?\| (\d) \|.*\| `(test_\w+)\.py` \|$", DOCS.read_text(), re.MULTILINE)))


def test_every_program_has_a_row() -> None:
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).stem}
    assert {name for _, name in ROWS} == files


@pytest.mark.parametrize(("lines", "name"), ROWS)
def test_lines_added(lines: str, name: str) -> None:
    module = importlib.import_module(name)
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == name]
    programs = [f for f in functions if added_lines(f)]
    assert programs
    assert {len(added_lines(f)) for f in programs} == {int(lines)}
    assert int(lines) <= 3
