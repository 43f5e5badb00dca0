"""Flat traced graphs: each layer's nodes become one call, are routed as the module is, and are put back."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import LENGTH, Block, D, Net, TakesBoth, TwoResults, words
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export, unflatten
from torch.fx.experimental.proxy_tensor import make_fx

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.passes import outline


def exported(model: nn.Module, strict: bool = False) -> Any:
    sizes = {"ids": {0: Dim("batch", max=64), 1: Dim("length", max=4096)}}
    return export(model, (words(LENGTH),), dynamic_shapes=sizes, strict=strict)


def with_stack(model: nn.Module, **how: Any) -> fx.GraphModule:
    def run(ids: Tensor) -> Any:
        return model(ids)

    run._orig_mod = model  # type: ignore[attr-defined]
    how = {"tracing_mode": "symbolic", **how}
    traced = make_fx(run, record_module_stack=True, pre_dispatch=True, _allow_non_fake_inputs=True, **how)
    return traced(words(LENGTH))  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[nn.Module], fx.GraphModule]] = {
    "export": lambda model: exported(model).module(),
    "strict export": lambda model: exported(model, strict=True).module(),
    "symbolic_trace": fx.symbolic_trace,
    "make_fx": with_stack,
    "unflatten": lambda model: unflatten(exported(model)),
}


def step(model: nn.Module, length: int) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(words(length)).pow(2).mean()
    loss.backward()
    grads = sorted(
        (p.grad.clone() for p in model.parameters() if p.grad is not None), key=lambda g: float(g.abs().sum())
    )
    return loss.detach(), grads


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_as_the_module_does(way: str) -> None:
    """Over lengths, the width and the length of the trace among them, to the end of the schedule."""
    torch.manual_seed(0)
    model = Net().train()
    traced, twin = WAYS[way](model), copy.deepcopy(model)
    keys, code, cls = list(traced.state_dict()), str(traced.graph), type(traced).__bases__
    given = {} if way != "symbolic_trace" else {"example_inputs": (words(LENGTH),)}
    schedules = [LTDScheduler(5, 24, 3, multiple_of=1) for _ in range(2)]
    ltd_fx.transform(twin, schedules[0], layers=Block, example_inputs=(words(LENGTH),))
    ltd_fx.transform(traced, schedules[1], layers=Block, **given)
    assert [site.status for site in ltd_fx.summary(traced).sites[1:-1]] == ["proven", "proven"]
    assert [site.layer_class for site in ltd_fx.summary(traced).sites] == ["Block"] * 4
    for length in (24, 16, 9, 24):
        torch.testing.assert_close(step(traced, length), step(twin, length), rtol=1e-5, atol=1e-7)
        drawn = ltd_fx.sampled_indices(traced), ltd_fx.sampled_indices(twin)
        torch.testing.assert_close(*drawn, rtol=0, atol=0)
        for scheduler in schedules:
            scheduler.step()
    assert list(traced.state_dict()) == keys
    assert list(ltd_fx.clean_state_dict(traced)) == keys
    assert type(traced).__bases__ == cls
    ltd_fx.restore(traced)
    assert str(traced.graph) == code
    assert list(traced.state_dict()) == keys


@pytest.mark.parametrize("way", [way for way in WAYS if way != "unflatten"])  # whose modules torch cannot copy
def test_copies_are_routed_and_restored_too(way: str) -> None:
    model = WAYS[way](Net().train())
    code, scheduler = str(model.graph), LTDScheduler(5, 24, 3)
    ltd_fx.transform(model, scheduler, layers=Block, example_inputs=(words(LENGTH),))
    copied, results = copy.deepcopy(model), []
    for each in (model, copied):
        scheduler.set_step(0)  # The copy follows the same scheduler, and so the same draws.
        results.append(step(each, LENGTH))
    torch.testing.assert_close(*results)
    ltd_fx.restore(copied)
    assert str(copied.graph) == code
    assert ltd_fx.is_transformed(model)
    step(model, LENGTH)


def test_it_is_saved_and_loaded() -> None:
    """Where torch can pickle the graph."""
    model = fx.symbolic_trace(Net().train())
    ltd_fx.transform(model, layers=Block, example_inputs=(words(LENGTH),))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert list(loaded.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(step(loaded, LENGTH), step(model, LENGTH))


@pytest.mark.parametrize("way", ["export", "symbolic_trace", "unflatten"])
def test_a_refused_transform_changes_nothing(way: str) -> None:
    class Mixed(Block):
        def forward(self, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, rope, mask) + x.roll(1, 1)

    model = WAYS[way](Net(Mixed).train())
    before, modules = str(model.graph), dict(model.named_modules())
    with pytest.raises(LTDError, match=r"layers.1 .*cannot be routed"):
        ltd_fx.transform(model, layers=r"layers\.\d", example_inputs=(words(LENGTH),))
    assert str(model.graph) == before
    assert dict(model.named_modules()) == modules


def test_routes_are_cancelled_in_the_graph() -> None:
    model = Net().train()
    traced = WAYS["export"](model)
    for each in (traced, model):
        ltd_fx.transform(each, layers=Block, routes=[(1, 2, None)], example_inputs=(words(LENGTH),))
    assert sum("split_hidden" in str(node.target) for node in traced.graph.nodes) == 1
    torch.testing.assert_close(step(traced, LENGTH), step(model, LENGTH))


class Again(Net):
    """Each layer is called twice in a row, or once in each of two passes over all."""

    in_a_row = True

    def forward(self, ids: Tensor) -> Tensor:
        x, one = self.embed(ids), torch.ones(1, 1, 1)
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        for layer in self.layers:
            x = layer(x, one, mask)
            x = layer(x, one, mask) if self.in_a_row else x
        for layer in self.layers:
            x = x if self.in_a_row else layer(x, one, mask)
        return self.head(x)


@pytest.mark.parametrize("in_a_row", [True, False])
@pytest.mark.parametrize("way", ["export", "symbolic_trace"])
def test_layers_that_are_called_again(way: str, in_a_row: bool) -> None:
    model = Again().train()
    model.in_a_row = in_a_row
    traced = WAYS[way](model)
    for each in (traced, model):
        ltd_fx.transform(each, layers=Block, example_inputs=(words(LENGTH),))
    torch.testing.assert_close(step(traced, LENGTH), step(model, LENGTH))
    drawn = ltd_fx.sampled_indices(traced)
    assert list(drawn) == ["layers.1", "layers.1#1", "layers.2", "layers.2#1"]
    torch.testing.assert_close(drawn, ltd_fx.sampled_indices(model), rtol=0, atol=0)


def test_what_cannot_be_a_layer_is_refused() -> None:
    model = fx.symbolic_trace(TakesBoth(TwoResults).train())
    with pytest.raises(LTDError, match=r"layers.1 cannot be routed in this graph: .* used outside"):
        ltd_fx.transform(model, layers=TwoResults, example_inputs=(words(LENGTH),))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "one length": (lambda: export(Net().train(), (words(LENGTH),)).module(), "dynamic sequence dimension"),
    "one length, make_fx": (lambda: with_stack(Net().train(), tracing_mode="real"), "dynamic sequence dimension"),
    "eval": (lambda: WAYS["export"](Net().eval()), "traced in eval mode"),
    "no shapes": (lambda: fx.symbolic_trace(Net().train()), "pass example_inputs"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_trained_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(LTDError, match=message):
        ltd_fx.transform(make(), layers=Block)


def test_outline_by_itself() -> None:
    """Sizes that come from outside are computed anew, from the hidden states."""
    graph = copy.deepcopy(WAYS["export"](Net()).graph)
    (layer,) = outline(graph, names=["layers.2"]).values()
    called = [node for node in graph.nodes if node.op == "call_module" and node.target == "layers.2"]
    assert len(called) == 1
    assert len(called[0].args) == 3
    names = [node.target for node in layer.find_nodes(op="placeholder")]
    assert names == ["hidden_states", "input_1", "input_2"]
    sizes = layer.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert {(node.args[0].name, node.args[1]) for node in sizes} == {("hidden_states", 0), ("hidden_states", 1)}
    assert {node.target for node in layer.find_nodes(op="get_attr")} == {
        f"{name}.{kind}" for name in ("norm", "qkv", "o") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    "way", ["export", *(pytest.param(w, marks=pytest.mark.slow) for w in ("symbolic_trace", "unflatten"))]
)
def test_a_whole_schedule_is_two_graphs(way: str) -> None:
    model, scheduler = WAYS[way](Net().train()), LTDScheduler(4, LENGTH, 20, multiple_of=1)
    ltd_fx.transform(model, scheduler, layers=Block, example_inputs=(words(LENGTH),))
    counter = CompileCounterWithBackend("aot_eager")
    whole = way != "unflatten"  # which has torch.compile leave its arguments alone
    compiled = torch.compile(model, backend=counter, fullgraph=whole)
    for number in range(0, 24, 2):
        steps = []
        for each in (compiled, model):
            scheduler.set_step(number)
            steps.append(step(each, LENGTH))
        torch.testing.assert_close(*steps)
    assert counter.frame_count == 2


def test_shapes_of_the_trace_take_no_random_number() -> None:
    class Streams(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, torch.ones(1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool))
            return x

    x, sizes = torch.randn(3, LENGTH, D), {"x": {0: Dim("batch", max=64), 1: Dim("length", max=4096)}}
    model = export(Streams().train(), (x,), dynamic_shapes=sizes).module()
    before = torch.get_rng_state()
    ltd_fx.transform(model, layers=Block)
    assert torch.equal(torch.get_rng_state(), before)
