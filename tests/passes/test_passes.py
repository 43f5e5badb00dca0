"""The passes one by one: what each counts, leaves and refuses; and the graphs they start from."""

import inspect
from typing import Any

import pytest
import torch
from conftest import SEQ, Case, text
from torch import Tensor, fx, nn

from ltd_fx import CallSite, LayerPattern, LTDError
from ltd_fx.learn.observe import describe, observe
from ltd_fx.learn.sandbox import Sandbox
from ltd_fx.passes import Target, align, check, locate, route
from ltd_fx.passes.capture import KWARGS, LAYER, call_graph, layer_graph


def forward(x: Tensor, mask: Tensor | None = None, *rest: Any, gain: float = 1.0, **extras: Any) -> Tensor:
    return x


PATTERN = LayerPattern(hidden="x", aligned={"mask": (2, 3), "bias": (1,)})


def target(pattern: LayerPattern = PATTERN, function: Any = forward, name: str = "layers.1", **options: Any) -> Target:
    layer = CallSite(name, "Layer", "layers", True, pattern=pattern, **options)
    return Target(layer, inspect.signature(function), f"_ltd_site_{name[-1]}")


TARGET = target()


def two_calls() -> fx.Graph:
    """x -> layers.0 -> layers.1 (routed) -> layers.1 again, with a residual around the second call."""
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    first = graph.call_module("layers.0", (x, mask))
    second = graph.call_module("layers.1", (first,), {"mask": mask})
    third = graph.call_module("layers.1", (second, mask))
    graph.output(graph.call_function(torch.add, (second, third)))
    return graph


def names(graph: fx.Graph) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in graph.nodes]


def test_each_pass_counts_and_leaves_a_sound_graph() -> None:
    graph = two_calls()
    assert locate(graph, targets={"layers.1": TARGET}) == 2
    assert names(graph).count("draw_tokens") == 2
    assert names(graph).index("draw_tokens") > names(graph).index("layers.0")
    assert align(graph) == 2
    assert names(graph).count("gather_argument") == 2
    assert route(graph) == 2
    assert check(graph) == 0
    graph.lint()
    calls = [node for node in graph.nodes if node.target == "layers.1"]
    for call in calls:
        (merge,) = call.users
        assert merge.target.__name__ == "merge_output"
        kept, *_ = call.args
        assert kept.args[0].target.__name__ == "split_hidden"
    merges = [node for node in graph.nodes if getattr(node.target, "__name__", "") == "merge_output"]
    (add,) = [node for node in graph.nodes if node.target is torch.add]
    assert add.args == tuple(merges)
    (untouched,) = [node for node in graph.nodes if node.target == "layers.0"]
    assert [arg.name for arg in untouched.args] == ["x", "mask"]


def test_several_arguments_of_a_call_are_gathered_together() -> None:
    def layer(x: Tensor, mask: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        return x

    graph = fx.Graph()
    x, mask, table, bias = (graph.placeholder(name) for name in ("x", "mask", "table", "bias"))
    graph.output(graph.call_module("layers.1", (x, mask), {"table": table, "bias": bias}))
    aligned: Any = {"mask": (2, 3), "table": (1,), "bias": ()}
    locate(graph, targets={"layers.1": target(LayerPattern(hidden="x", aligned=aligned), layer)})
    assert align(graph) == 2
    (node,) = [node for node in graph.nodes if getattr(node.target, "__name__", "") == "gather_arguments"]
    assert node.args[1:] == (("mask", "table"), (mask, table), ((2, 3), (1,)))
    (call,) = [node for node in graph.nodes if node.target == "layers.1"]
    assert [call.args[1].args, call.kwargs["table"].args] == [(node, 0), (node, 1)]
    assert call.kwargs["bias"] is bias


def test_locate_refuses_what_it_cannot_place() -> None:
    graph = two_calls()
    with pytest.raises(LTDError, match=r"layers\.9 is never called"):
        locate(graph, targets={"layers.9": TARGET})
    locate(graph, targets={"layers.1": TARGET})
    with pytest.raises(LTDError, match="rewritten already"):
        locate(graph, targets={"layers.1": TARGET})
    graph = fx.Graph()
    graph.output(graph.call_module("layers.1", (), {"mask": graph.placeholder("mask")}))
    with pytest.raises(LTDError, match="without 'x'"):
        locate(graph, targets={"layers.1": TARGET})


def test_check_catches_a_reader_that_bypasses_the_merge_and_an_unrouted_site() -> None:
    graph = two_calls()
    locate(graph, targets={"layers.1": TARGET})
    with pytest.raises(AssertionError, match="located but not routed"):
        check(graph)
    align(graph)
    route(graph)
    call = next(node for node in graph.nodes if node.target == "layers.1")
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        graph.call_function(torch.relu, (call,))
    with pytest.raises(AssertionError, match="bypass the merge"):
        check(graph)


def test_a_layers_graph_keeps_its_signature() -> None:
    graph = layer_graph(inspect.signature(forward), "x")
    scope: dict[str, Any] = {}
    exec(graph.python_code("self").src, graph.python_code("self").globals, scope)
    assert str(inspect.signature(scope["forward"])) == "(self, x, mask=None, *rest, gain=1.0, **extras)"
    (call,) = [node for node in graph.nodes if node.op == "call_module"]
    assert call.target == LAYER
    assert [str(arg) for arg in call.args] == ["x"]
    assert KWARGS in call.kwargs

    def keyword_only(x: Tensor, *, scale: float) -> Tensor:
        return x * scale

    with pytest.raises(LTDError, match="keyword-only argument 'scale'"):
        layer_graph(inspect.signature(keyword_only), "x")


def test_recording_leaves_the_model_and_the_random_state_alone(llama: Case) -> None:
    model = llama.model()
    layers = {f"model.layers.{i}": model.model.layers[i] for i in (1, 2)}
    buffers = dict(model.named_buffers())
    state = torch.random.get_rng_state()
    graph = call_graph(observe(model, layers, describe((), text()), sandbox=Sandbox(model)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert not any(layer._forward_hooks for layer in layers.values())
    first, second = (node for node in graph.nodes if node.op == "call_module")
    assert second.args[0] is first
    assert first.meta["val"].shape == (3, SEQ, 32)
    assert first.kwargs["attention_mask"] is second.kwargs["attention_mask"]  # a shared value is one node


def test_fake_runs_report_what_fails() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(LTDError, match=r"fake tensors.*reduction dim"):
        observe(model, {}, describe((torch.zeros(2, 4),), {}), sandbox=Sandbox(model))
