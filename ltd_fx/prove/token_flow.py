"""The static proof of a layer: traced once, and judged by how tokens flow through it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ltd_fx.learn import Call, LayerPattern, Sandbox, leaves_hooks_out
from ltd_fx.prove import rules, rules_lookups, rules_sums, rules_views  # noqa: F401 (they register the rules)
from ltd_fx.prove.flow import Flow
from ltd_fx.prove.trace import trace
from ltd_fx.prove.verdict import Verdict
from ltd_fx.tree import items_of


def judge(
    layer: nn.Module, pattern: LayerPattern, call: Call, sandbox: Sandbox, *, shared: bool = False, protected: int = 0
) -> Verdict:
    """Whether ``layer`` may see a subset of the tokens, by what it does in training.

    Args:
        layer: stays as it is.
        pattern: which of its arguments follow the tokens.
        call: how it is called; tensors may be fake, and of any size.
        sandbox: of the model.
        shared: one draw for the batch.
        protected: so many first tokens are always kept.

    Returns:
        Where it is shown wrong, the reason and the operator; where it is neither shown wrong nor right, why.
    """
    return analyse(layer, pattern, call, sandbox, shared=shared, protected=protected)[0]


def analyse(
    layer: nn.Module, pattern: LayerPattern, call: Call, sandbox: Sandbox, *, shared: bool = False, protected: int = 0
) -> tuple[Verdict, Flow | None]:
    """As :func:`judge`, with what is known of each value in the layer's graph; ``None`` where there is no graph."""
    if leaves_hooks_out(layer):
        return Verdict(unknown="it has forward hooks, which are not called while it is learnt"), None
    try:
        traced = trace(layer, pattern, call, sandbox, shared=shared, protected=protected)
    except Exception as error:
        said = f"it cannot be traced: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Verdict(unknown=said), None
    flow = Flow(traced.graph, traced.length, traced.inputs, protected)
    verdict = flow.judge(lambda made: _hidden(made, pattern), traced.hidden)
    if traced.fixed:
        return Verdict(unknown="it makes a plain number of the number of tokens"), flow
    if traced.bound and not verdict.mixes:
        return Verdict(mixes=traced.bound), flow
    return Verdict(unknown=traced.unsure) if verdict == Verdict() and traced.unsure else verdict, flow


def _hidden(made: Any, pattern: LayerPattern) -> Any:
    """Of what the layer returns, the hidden states."""
    if isinstance(made, Mapping) or not isinstance(made, (tuple, list)):
        items = items_of(made)
        return made if items is None else items[pattern.output or 0]
    return made[pattern.output or 0]
