"""Every public name has a page, whose docstring says what it takes and what it raises."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ltd_fx

PAGES = (Path(__file__).parents[2] / "docs" / "reference").glob("*.md")
SHOWN = {name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)}
NAMES = [f"ltd_fx.{name}" for name in ltd_fx.__all__ if name != "__version__"]
NAMES += [f"ltd_fx.deepspeed.{name}" for name in importlib.import_module("ltd_fx.deepspeed").__all__]
NAMES += ["ltd_fx.huggingface.LTDCallback", "ltd_fx.huggingface.add_callback", "ltd_fx.lightning.LTDCallback"]
NAMES += [f"ltd_fx.passes.{name}.{name}" for name in ("locate", "align", "route", "check", "span", "rewrite")]
OPERATORS = ["sample_tokens", "gather_tokens", "scatter_tokens", "gather_aligned", "gather_mask"]


def resolve(name: str) -> Any:
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        value: Any = module
        for part in parts[i:]:
            value = getattr(value, part)
        return value
    raise LookupError(name)


def functions(value: Any) -> Iterator[tuple[Any, str]]:
    """It, or how it is made and the methods that it adds to its bases; with the docstring that has the arguments."""
    if not inspect.isclass(value):
        yield value, inspect.getdoc(value) or ""
        return
    if "__init__" in vars(value):
        yield value.__init__, inspect.getdoc(value) or ""
    for name, method in vars(value).items():
        inherited = any(hasattr(base, name) for base in value.__mro__[1:])
        if inspect.isfunction(method) and not name.startswith("_") and not inherited:
            yield method, inspect.getdoc(method) or ""


def entries(section: str, doc: str) -> set[str] | None:
    """What a section of a docstring lists; ``None`` where there is no such section."""
    found = re.search(rf"^{section}:\n((?: .*\n?|\n)+)", doc, re.MULTILINE)
    if found is None:
        return None
    heads = re.findall(r"^    (\w[\w, ]*):", found[1], re.MULTILINE)
    return {name.strip() for head in heads for name in head.split(",")}


def refuses(function: Any) -> bool:
    """Whether it raises LTDError, or a function of ours that it calls by name does."""
    seen, todo = set(), [inspect.unwrap(function)]
    while todo:
        function = todo.pop()
        if function in seen or function.__code__.co_filename == "<string>":  # the latter: a dataclass's
            continue
        seen.add(function)
        source = textwrap.dedent(inspect.getsource(function))
        if "raise LTDError" in source:
            return True
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        called = [function.__globals__.get(call.id) for call in calls if isinstance(call, ast.Name)]
        todo += [f for f in called if inspect.isfunction(f) and f.__module__.startswith("ltd_fx")]
    return False


@pytest.mark.parametrize("name", NAMES)
def test_it_has_a_page_and_a_docstring(name: str) -> None:
    assert name in SHOWN
    assert inspect.getdoc(resolve(name))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_errors_are_documented(name: str) -> None:
    for function, doc in functions(resolve(name)):
        what = f"{name}, {function.__name__}:"
        arguments = [p for p in inspect.signature(function).parameters if p not in ("self", "args", "kwargs")]
        listed = entries("Args", doc) or entries("Attributes", doc) or set(re.findall(r"\w+", doc))
        missing = [argument for argument in arguments if argument not in listed]
        assert not missing, f"{what} what are {missing}?"
        if refuses(function):
            assert "LTDError" in (entries("Raises", doc) or ()), f"{what} what does it refuse?"


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_on_their_page_as_they_are_registered(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "operators.md").read_text()
    schema = str(getattr(torch.ops.ltd_fx, name).default._schema).removeprefix("ltd_fx::")
    assert f"## {name}\n`{schema}`\n" in page
