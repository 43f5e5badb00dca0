"""A layer's graph in words: what is known of each value, and how what is wrong came of the tokens."""

import re
from collections import deque
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from torch import fx

from ltd_fx.prove.flow import Flow
from ltd_fx.prove.nodes import line_of, said_name
from ltd_fx.prove.values import Value
from ltd_fx.prove.verdict import Verdict


def explain(verdict: Verdict, flow: Flow | None) -> str:
    """What token flow found of a layer, for a person.

    Args:
        verdict: of the layer.
        flow: through its graph, or ``None`` where there is none.
    """
    unknown = f"not known: {verdict.unknown}" if verdict.unknown else "right: tokens meet in attention only"
    lines = [f"by token flow {f'wrong: {verdict.mixes}' if verdict.mixes else unknown}"]
    if flow is None:
        return lines[0]
    if verdict in flow.origins:
        path = _path(flow, flow.origins[verdict])
        lines += ["", "from the hidden states to there:" if len(path) > 1 else "there:", *_table(flow, path)]
    seen = dict.fromkeys([*flow.values, *flow.origins.values()])
    return "\n".join([*lines, "", "its graph:", *_table(flow, seen)])


def _table(flow: Flow, nodes: Iterable[fx.Node]) -> list[str]:
    """A line for each node; the user's line of code where it is another than that of the node before."""
    rows, before = [], None
    for node in nodes:
        line = line_of(node)
        place = f"{PurePath(line[0]).name}:{line[1]}  {line[2]}" if line and line != before else ""
        mark = "->" if node in flow.origins.values() else "  "
        rows.append((mark, node.meta.get("name", node.name), said_name(node), _known(flow, node), place))
        before = line
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _known(flow: Flow, node: fx.Node) -> str:
    known: Any = flow.values.get(node)
    said = ", ".join(map(str, known if isinstance(known, (list, tuple)) else [known or ""]))
    if node in flow.flaws:  # What is held of its kind is a stand-in.
        kind = "wrong" if flow.flaws[node].mixes else "not known"
        said = f"{kind} {said.removeprefix(known.kind.value).strip()}" if isinstance(known, Value) else kind
    return re.sub(rf"\b{re.escape(str(flow.length))}\b", "tokens", said)


def _path(flow: Flow, end: fx.Node) -> list[fx.Node]:
    """The shortest way from the hidden states to ``end``, or ``end`` alone, where there is none."""
    paths, waiting = {end: [end]}, deque([end])
    while waiting:
        node = waiting.popleft()
        value = flow.values.get(node)
        if node.op == "placeholder" and isinstance(value, Value) and value.hidden:
            return paths[node]
        for earlier in node.all_input_nodes:
            if earlier not in paths:
                paths[earlier] = [earlier, *paths[node]]
                waiting.append(earlier)
    return [end]
