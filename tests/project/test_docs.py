"""The pages: links lead somewhere, every page is reached, code is code, and what they name exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def slug(heading: str) -> str:
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def anchors(page: Path) -> set[str]:
    return {slug(line.lstrip("#")) for line in prose(page).splitlines() if line.startswith("#")}


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def links(page: Path) -> list[tuple[Path, str]]:
    """Those to files of the project, with the anchor."""
    found = [link.partition("#") for link in LINK.findall(prose(page)) if not re.match(r"\w+:", link)]
    return [((page.parent / name).resolve() if name else page, anchor) for name, _, anchor in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in links(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


def test_every_page_is_reached_from_the_first() -> None:
    seen, todo = set(), [DOCS / "index.md"]
    while todo:
        page = todo.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            todo += [target for target, _ in links(page)]
    assert {page for page in PAGES if page.is_relative_to(DOCS)} <= seen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_them_is_python(page: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(code)


def sections() -> list[tuple[str, str]]:
    parts = re.split(r"^## ", (DOCS / "internals.md").read_text(), flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part) for part in parts]


@pytest.mark.parametrize(("title", "section"), sections(), ids=[title for title, _ in sections()])
def test_each_fact_about_torch_has_a_test(title: str, section: str) -> None:
    ((path, name),) = re.findall(r"^Test: `(tests/\S+\.py)::(\w+)`$", section, re.MULTILINE)
    names = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in names


def test_the_map_of_the_rooms_is_that_of_the_package() -> None:
    named = set()
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if line.startswith("| `"):
            _, rooms, _, files, _ = line.split("|")
            for name, is_room in re.findall(r"`(\w+)(/?)`", rooms):
                inside = re.findall(r"(?:^ |; |, )`([a-z_]+)`", files)
                named |= {f"{name}/{file}" for file in inside} if is_room else {name}
    package = ROOT / "ltd_fx"
    paths = {path.relative_to(package).with_suffix("") for path in package.rglob("*.py")}
    assert named == {str(path) for path in paths if path.name != "__init__"}
