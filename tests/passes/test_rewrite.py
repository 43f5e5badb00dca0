"""The passes together: what they leave in the nodes of a graph, and on which graphs they refuse a route."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Case
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import ltd_fx
from ltd_fx import CallSite, LayerPattern, LTDError
from ltd_fx.learn.observe import describe, observe
from ltd_fx.learn.sandbox import Sandbox
from ltd_fx.passes import Target, align, locate, rewrite, route, span
from ltd_fx.passes.capture import call_graph

ORIGIN = {"nn_module_stack": {"layers": ("layers.1", nn.Module)}, "stack_trace": "in forward"}


def layer(x: Tensor, mask: Tensor | None = None) -> Tensor:
    return x


def target(name: str, **options: Any) -> Target:
    pattern = LayerPattern(hidden="x", aligned={"mask": (2, 3)})
    site = CallSite(name, "Layer", "layers", True, pattern=pattern, **options)
    return Target(site, inspect.signature(layer), f"_ltd_site_{name[-1]}")


def chain(count: int = 2) -> fx.Graph:
    """x -> layers.1 -> layers.2 ..., each with the mask; with a value and an origin in each node."""
    graph = fx.Graph()
    with FakeTensorMode():
        hidden, mask = torch.empty(2, 6, 8), torch.empty(2, 1, 6, 6)
    node, masked = graph.placeholder("x"), graph.placeholder("mask")
    node.meta["val"], masked.meta["val"] = hidden, mask
    for i in range(1, count + 1):
        node = graph.call_module(f"layers.{i}", (node, masked))
        node.meta.update(val=hidden.clone(), **ORIGIN)
    graph.output(node)
    return graph


def routed(*names: str) -> dict[str, Target]:
    return {name: target(name) for name in names}


def on_a_route(*names: str) -> dict[str, Target]:
    return {name: target(name, route=names[0], leaves=name == names[-1]) for name in names}


def named(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [node for node in graph.nodes if getattr(node.target, "__name__", node.target) == name]


@pytest.mark.parametrize("targets", [routed("layers.1", "layers.2"), on_a_route("layers.1", "layers.2")])
def test_new_nodes_say_where_they_come_from(targets: dict[str, Target]) -> None:
    graph = chain()
    old = set(graph.nodes)
    rewrite(graph, targets=targets)
    new = [node for node in graph.nodes if node not in old]
    assert len(new) >= 6
    for node in new:
        assert {key: node.meta.get(key) for key in ORIGIN} == ORIGIN, node.format_node()


def test_values_are_those_of_full_length_and_no_other_is_kept() -> None:
    graph = chain()
    first, second = (node.meta["val"] for node in named(graph, "layers.1") + named(graph, "layers.2"))
    rewrite(graph, targets=routed("layers.1", "layers.2"))
    assert [node.meta["val"] for node in named(graph, "merge_output")] == [first, second]
    rest, kept = (node for node in named(graph, "split_hidden")[1].users)
    assert rest.meta["val"] is first
    for node in (kept, *named(graph, "layers.1"), *named(graph, "gather_argument")):
        assert "val" not in node.meta

    graph = chain(3)
    rewrite(graph, targets=on_a_route("layers.1", "layers.2", "layers.3"))
    assert ["val" in node.meta for node in named(graph, "merge_output")] == [False, False, True]


@pytest.mark.parametrize("key", ["val", "example_value", "tensor_meta"])
def test_values_of_each_tracer_follow_the_shape(key: str) -> None:
    graph = chain()
    for node in graph.nodes:
        node.meta = {key: node.name}
    rewrite(graph, targets=on_a_route("layers.1", "layers.2"))
    inner, last = named(graph, "merge_output")
    (rest, *_) = named(graph, "split_hidden")[0].users
    assert (rest.meta[key], last.meta[key]) == ("x", "layers_2")
    for node in (inner, *named(graph, "layers.1"), *named(graph, "layers.2")):
        assert key not in node.meta


def test_a_route_gathers_an_argument_once() -> None:
    graph = chain(3)
    rewrite(graph, targets=on_a_route("layers.1", "layers.2", "layers.3"))
    assert len(named(graph, "gather_argument")) == len(named(graph, "split_hidden")) == 1


def test_what_is_gathered_once_is_one_node_not_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    x, mask, other = (graph.placeholder(name) for name in ("x", "mask", "other"))
    hidden = graph.call_module("layers.1", (x, mask))
    graph.output(graph.call_module("layers.2", (hidden, other)))
    monkeypatch.setattr(fx.Node, "__repr__", lambda self: "mask")
    rewrite(graph, targets=on_a_route("layers.1", "layers.2"))
    assert [node.args[1] for node in named(graph, "gather_argument")] == [mask, other]


@pytest.mark.parametrize("order", [("1", "1", "2"), ("2", "1"), ("1", "2", "2")])
def test_layers_of_a_route_called_out_of_order(order: tuple[str, ...]) -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for i in order:
        node = graph.call_module(f"layers.{i}", (node,))
    graph.output(node)
    with pytest.raises(LTDError, match=r"layers\.\d is called out of order on the route that starts at layers\.1"):
        rewrite(graph, targets=on_a_route("layers.1", "layers.2"))


def test_a_route_may_be_run_again() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for i in (1, 2, 1, 2):
        node = graph.call_module(f"layers.{i}", (node,))
    graph.output(node)
    rewrite(graph, targets=on_a_route("layers.1", "layers.2"))
    assert len(named(graph, "split_hidden")) == len(named(graph, "draw_tokens")) == 2


def test_only_what_changed_is_linted(monkeypatch: pytest.MonkeyPatch) -> None:
    linted = []
    monkeypatch.setattr(fx.Graph, "lint", lambda self: linted.append(len(self.nodes)))
    graph = chain()
    rewrite(graph, targets=routed("layers.1", "layers.2"))
    assert len(linted) == 3  # locate, align, route; check and, without a route, span change nothing


def reads_again(graph: fx.Graph, call: fx.Node) -> fx.Node:
    """As traced from code that takes ``out[0]`` in two places."""
    return graph.call_function(torch.mean, (graph.call_function(operator.getitem, (call, 0)),))


def reads_from_the_end(graph: fx.Graph, call: fx.Node) -> fx.Node:
    return graph.call_function(operator.getitem, (call, -2))


def reads_the_whole(graph: fx.Graph, call: fx.Node) -> fx.Node:
    return graph.call_function(len, (call,))


def reads_another_slot(graph: fx.Graph, call: fx.Node) -> fx.Node:
    return graph.call_function(operator.getitem, (call, 1))


def pairs(read: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.Graph:
    """x -> layers.1 -> layers.2, which return pairs; the output also has what ``read`` takes of the first."""
    graph = fx.Graph()
    first = graph.call_module("layers.1", (graph.placeholder("x"),))
    hidden = graph.call_function(operator.getitem, (first, 0))
    second = graph.call_module("layers.2", (hidden,))
    graph.output((second, read(graph, first)))
    return graph


@pytest.mark.parametrize("read", [reads_again, reads_from_the_end, reads_the_whole])
def test_hidden_states_within_a_route_are_read_by_its_layers_alone(
    read: Callable[[fx.Graph, fx.Node], fx.Node],
) -> None:
    with pytest.raises(LTDError, match=r"layers\.2 follows layers\.1 on a route, but others take the hidden states"):
        rewrite(pairs(read), targets=on_a_route("layers.1", "layers.2"))
    rewrite(pairs(read), targets=routed("layers.1", "layers.2"))


def test_another_slot_within_a_route_may_be_read() -> None:
    graph = pairs(reads_another_slot)
    rewrite(graph, targets=on_a_route("layers.1", "layers.2"))
    assert len(named(graph, "split_hidden")) == 1


@pytest.mark.parametrize("enters", [True, False])
@pytest.mark.parametrize("leaves", [True, False])
def test_span_counts_both_ends_of_a_layers_graph(enters: bool, leaves: bool) -> None:
    graph = chain(1)
    locate(graph, targets={"layers.1": target("layers.1", route=None if enters else "", leaves=leaves)})
    route(graph)
    before = str(graph)
    changed = span(graph)
    assert changed == 2 - enters - leaves
    assert (str(graph) != before) == (changed > 0)


def test_a_models_calls_are_joined_by_what_they_hand_on(case: Case) -> None:
    model = case.model()
    names = [f"{case.layers}.{i}" for i in (1, 2)]
    slots = {name: model.get_submodule(name) for name in names}
    transformed = ltd_fx.transform(case.model(), example_inputs=case.inputs())
    sites = {site.name: site for site in ltd_fx.summary(transformed).sites}
    signatures = {name: inspect.signature(type(slot).forward) for name, slot in slots.items()}
    targets = {
        name: Target(sites[name], s.replace(parameters=[*s.parameters.values()][1:]), "_ltd_site")
        for name, s in signatures.items()
    }
    graph = call_graph(observe(model, slots, describe((), case.inputs()), sandbox=Sandbox(model)))
    locate(graph, targets=targets)
    align(graph)
    route(graph)
    assert named(graph, "split_hidden")[1].args[1] is named(graph, "merge_output")[0]
