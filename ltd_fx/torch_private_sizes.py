"""The private and undocumented names of torch that are about symbolic sizes; for the others, see ``torch_private``."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ltd_fx.torch_private import FakeTensorMode

__all__ = [
    "decided_by",
    "own_symbols",
    "replaced",
    "simplified",
    "size_expr",
    "symbolic_mode",
    "symbolic_products",
    "symbolic_sizes",
]


def symbolic_mode() -> FakeTensorMode:
    """A fake mode whose tensors may have symbols for sizes; two that are equal by chance are two symbols."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)


def symbolic_products() -> AbstractContextManager[Any]:
    """Within, ``matmul`` leaves symbols what they are: before torch 2.13, its C++ makes plain numbers of them."""
    from torch._dispatch.python import enable_python_dispatcher

    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return enable_python_dispatcher() if version < (2, 13) else nullcontext()


def symbolic_sizes(mode: FakeTensorMode, shape: Sequence[int], name: str) -> torch.Size:
    """``shape`` with a symbol for each size, known to be more than 1; sizes of 0 and 1 stay.

    Args:
        mode: which the symbols belong to, from :func:`symbolic_mode`.
        shape: what the symbols stand for.
        name: of its own for each call.
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    how = [DimDynamic.DYNAMIC if size > 1 else DimDynamic.STATIC for size in shape]
    context: Any = StatelessSymbolicContext(dynamic_sizes=how)
    empty = torch.empty(tuple(shape), device="meta")
    made: Any = mode.from_tensor(empty, source=ConstantSource(name), symbolic_context=context)
    return made.shape  # type: ignore[no-any-return]


def simplified(mode: FakeTensorMode, size: Any) -> Any:
    """The expression of a size, with what is known by now to be equal replaced by one symbol."""
    env: Any = mode.shape_env
    return env.simplify(size_expr(size))


def replaced(mode: FakeTensorMode) -> list[tuple[Any, Any]]:
    """The symbols that are known to be equal to an expression of others, and that expression."""
    env: Any = mode.shape_env
    return list(env.replacements.items())


def own_symbols(size: Any) -> set[Any]:
    """The symbols of a size as it was made, whatever is known to be equal to them since."""
    expr: Any = size.node._expr if isinstance(size, torch.SymInt) else None
    return set() if expr is None else set(expr.free_symbols)


def size_expr(size: Any) -> Any:
    """The sympy expression of a symbolic or plain number."""
    import sympy

    return size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat)) else sympy.sympify(size)


def decided_by(mode: FakeTensorMode, symbol: Any) -> tuple[list[tuple[Any, str]], bool]:
    """The conditions on symbolic sizes so far, each with its place; and whether ``symbol`` became a plain number."""
    env: Any = mode.shape_env
    places = [(g.expr, g.sloc.maybe_user_loc or g.sloc.framework_loc) for g in env.guards]
    said = [(expr, f"{at.filename}:{at.lineno}" if hasattr(at, "lineno") else str(at)) for expr, at in places]
    return said, symbol in env.replacements
