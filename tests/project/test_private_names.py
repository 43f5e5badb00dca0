"""Private and undocumented names of torch are in ``torch_private.py`` and its neighbours of like names alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltd_fx import torch_private, torch_private_dynamo, torch_private_sizes

PACKAGE = Path(__file__).parents[2] / "ltd_fx"
PRIVATE = (torch_private, torch_private_dynamo, torch_private_sizes)
ROOMS = tuple(Path(room.__file__) for room in PRIVATE)
# Without an underscore, and documented no better.
_UNDOCUMENTED = {"experimental", "fake_mode", "recompute"}
# Underscores of Python's own, of an operator of ours, of transformers', and of Lightning's.
_NOT_TORCH = {
    "_replace",
    "_fields",
    "_lru_cache_wrapper",
    "_sample_on_cpu",
    "_attn_implementation",
    "_can_record_outputs",
    "_FabricModule",
    "_original_module",
}


def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def own_names(tree: ast.AST) -> Iterator[str]:
    """What the package itself defines: attributes of ``self``, and names of functions, classes and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def is_private(name: str) -> bool:
    return name in _UNDOCUMENTED or (name.startswith("_") and not name.startswith(("__", "_ltd_")))


def private_names(tree: ast.AST, own: set[str]) -> list[tuple[int, str]]:
    """(line, name) of every private name of torch: imported, reached from ``torch``, of any object, or as a string."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            names = [path] if re.fullmatch(r"torch(\.\w+)+", path) else [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            names = [node.value]
        for name in names:
            parts = name.split(".")
            if parts[0] == "torch" or len(parts) == 1:
                known = _NOT_TORCH if parts[0] == "torch" else own | _NOT_TORCH
                found += [(node.lineno, name)] * any(is_private(part) and part not in known for part in parts)
    return found


def test_no_other_file_names_one() -> None:
    trees = sources()
    own = {name for tree in trees.values() for name in own_names(tree)}
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}"
        for path, tree in trees.items()
        if path not in ROOMS
        for line, name in private_names(tree, own)
    ]
    assert not found, "\n".join(["name these in ltd_fx/torch_private.py:", *found])


def test_each_name_has_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_torch_private*.py"))
    for room in PRIVATE:
        assert [name for name in room.__all__ if f"{room.__name__.split('.')[-1]}.{name}" not in tests] == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "from torch._subclasses import FakeTensorMode",
        "from torch.utils import _pytree as pytree",
        "from torch.fx.experimental.proxy_tensor import get_proxy_mode",
        "torch._C._current_graph_task_id()",
        "torch.ops.aten._softmax.default",
        "len(module._forward_hooks)",
        "module._modules = {}",
        'hasattr(model, "_orig_mod")',
        'logging.getLogger("torch._subclasses.fake_tensor")',
        "with tensor.fake_mode:\n    pass",
        'node.meta["recompute"] = True',
    ],
)
def test_each_way_to_name_one_is_seen(source: str) -> None:
    assert [line for line, _ in private_names(ast.parse(source), {"_own"})]


@pytest.mark.parametrize(
    "source",
    ["self._own", 'getattr(x, "_own")', "pair._replace(left=1)", "torch.ops.ltd_fx._sample_on_cpu", "x._ltd_site"],
)
def test_what_is_not_torch_is_left_alone(source: str) -> None:
    assert private_names(ast.parse(source), {"_own"}) == []
