"""A layer's graph in words: what is known of each value, and how what is wrong came of the tokens."""

from collections import deque

from torch import fx

from ltd_fx.prove.flow import Flow, line_of, said_name
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
        lines += ["", "from the hidden states to there:"]
        lines += [_line(flow, node) for node in _path(flow, flow.origins[verdict])]
    lines += ["", "its graph:", *(_line(flow, node) for node in flow.values)]
    return "\n".join(lines)


def _line(flow: Flow, node: fx.Node) -> str:
    value = flow.values.get(node)
    known = str(value).replace(str(flow.length), "tokens") if isinstance(value, Value) else ""
    flaw = "  <-" if node in flow.origins.values() else ""
    return f"  {node.name:<24} {said_name(node):<28} {known:<44} {line_of(node)}{flaw}".rstrip()


def _path(flow: Flow, end: fx.Node) -> list[fx.Node]:
    """The shortest way from the hidden states to ``end``."""
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
