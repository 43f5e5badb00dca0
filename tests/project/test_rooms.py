"""The rooms of the package: each says what it is for, and is used by its name. Their order is in ``pyproject.toml``."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "ltd_fx"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and module of each import of ours; of ``from ltd_fx import name``, ``ltd_fx.name``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            whole = node.module == "ltd_fx"
            found += [(node.lineno, f"ltd_fx.{a.name}" if whole else node.module) for a in node.names]
    return [(line, module) for line, module in found if module.startswith("ltd_fx.")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_other_rooms_are_used_by_their_names(path: Path) -> None:
    """``from ltd_fx.runtime import Draw``: which of its files has it is the room's own affair."""
    room = path.relative_to(PACKAGE).parts[0]
    inside = [(line, m) for line, m in imports(path) if m.count(".") > 1 and m.split(".")[1] != room]
    assert inside == [], f"{path} imports from within another room"


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_room_says_what_it_is_for(room: Path) -> None:
    tree = ast.parse((room / "__init__.py").read_text())
    charter = ast.get_docstring(tree)
    assert charter is not None
    assert 1 <= len(charter.splitlines()) <= 4


@pytest.mark.parametrize("path", [*FILES, *sorted(PACKAGE.parent.glob("tests/**/*.py"))], ids=str)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
