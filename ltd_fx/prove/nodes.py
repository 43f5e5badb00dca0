"""The nodes of a layer's traced graph: what they are called, what they write into, which line they come of."""

import re

from torch import fx

from ltd_fx.torch_private import TO_COPY, OpOverload, schema_of


def writes(node: fx.Node) -> bool:
    """Whether it is an operator that writes into what it is given."""
    return isinstance(node.target, OpOverload) and bool(schema_of(node.target).is_mutable)


def written_maybe(node: fx.Node) -> fx.Node | None:
    """The tensor that an operator writes into, where it is its first argument."""
    first = node.args[0] if node.args and writes(node) else None
    return first if isinstance(first, fx.Node) else None


def operator_name(node: fx.Node) -> str:
    """``add`` for ``aten.add_.Tensor``, and ``to`` for a cast below it; empty for what is no operator of aten."""
    if not isinstance(node.target, OpOverload):
        return ""
    namespace, _, name = str(schema_of(node.target).name).partition("::")
    if namespace != "aten":
        return ""
    name = name if name.startswith("__") else name.removesuffix("_")
    return "to" if name == TO_COPY.name().split("::")[1].partition(".")[0] else name


def where(node: fx.Node) -> str:
    """The operator, and the user's line that calls it."""
    name, line = said_name(node), line_of(node)
    return f"{name}, in {line[2]!r} ({line[0]}:{line[1]})" if line else name


def said_name(node: fx.Node) -> str:
    """The operator's name, for a person."""
    if node.op != "call_function" or isinstance(node.target, OpOverload):
        return operator_name(node) or (node.op if isinstance(node.target, str) else str(node.target))
    return getattr(node.target, "__name__", str(node.target))


def line_of(node: fx.Node) -> tuple[str, str, str] | None:
    """The line of the user's that a node comes of: file, number and code; ``None`` where that is not known."""
    frames = re.findall(r'File "(.+?)", line (\d+), in .+\n\s+(.+)', node.stack_trace or "")
    outside = [(file, line, code.strip()) for file, line, code in frames if "/torch/" not in file]
    return outside[-1] if outside else None
