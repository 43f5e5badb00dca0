"""The passes by themselves: on modules, in pipelines, in Inductor, and on layers that are no modules."""

import functools
from typing import Any

import torch
from nets import LENGTH, D, Net, words
from test_outline import exported, step
from torch import Tensor, fx, nn
from torch._inductor import config
from torch.nn import functional as F

import ltd_fx
from ltd_fx import LTDScheduler
from ltd_fx.passes import align, check, inductor_pass, locate, mark, outline, put_layers, route, span

NAMES = ["layers.1", "layers.2"]


def test_a_pass_recompiles_a_module_and_says_what_it_changed() -> None:
    model = fx.symbolic_trace(Net())
    before = model.code
    assert list(outline(model, names=NAMES)) == NAMES
    assert model.code != before
    assert 'self.layers, "1"' in model.code or "layers.1" in model.code


def test_a_pipeline_of_partials() -> None:
    """As a training framework would hold it: a list of functions of a module."""
    plain, model = (exported(net).module() for net in (Net(), Net()))
    model.load_state_dict(plain.state_dict())
    pipeline: list[Any] = [functools.partial(outline, names=NAMES)]
    for each in pipeline:
        put_layers(model, each(model))
    called = [node.target for node in model.graph.nodes if node.op == "call_module"]
    assert [name for name in called if name in NAMES] == NAMES
    torch.testing.assert_close(step(model, 16), step(plain, 16))


def test_uuids_tell_passes_apart_and_stay() -> None:
    passes = [outline, mark, locate, align, route, check, span]
    assert len({each.uuid() for each in passes}) == len(passes)
    assert [each.uuid() for each in passes] == [each.uuid() for each in passes]


def test_the_identity_in_inductors_cache() -> None:
    by_name = [inductor_pass(functools.partial(outline, names=names)).uuid() for names in (NAMES, NAMES, NAMES[:1])]
    assert by_name[0] == by_name[1] != by_name[2]
    assert inductor_pass(functools.partial(mark, targets=lambda node: None)).uuid() is None
    assert inductor_pass(lambda module: None).uuid() is None


def test_inductor_runs_passes_before_autograd() -> None:
    """Dynamo's graph has modules' names as its frame found them."""
    model, seen = Net().train(), []

    def outlined(module: fx.GraphModule) -> None:
        path = next(
            name for node in module.graph.nodes for name, _ in (node.meta.get("nn_module_stack") or {}).values()
        )
        names = [f"{path.partition('.')[0]}.{name}" for name in NAMES]
        put_layers(module, outline(module, names=names))
        seen.append([node.target for node in module.graph.find_nodes(op="call_module")])

    ids = words(LENGTH)
    torch._dynamo.mark_dynamic(ids, 0)
    torch._dynamo.mark_dynamic(ids, 1)
    with config.patch(pre_grad_custom_pass=inductor_pass(outlined), fx_graph_cache=False):
        found = torch.compile(model, fullgraph=True)(ids)
    assert len(seen) == 1
    assert len(seen[0]) == 2
    torch.testing.assert_close(found, model(ids))


class Functions(nn.Module):
    """Layers that are functions of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, D)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(3 * D, D) / 4) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for weight in self.weights:
            q, k, v = F.linear(x, weight).chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v)
        return x


def test_functions_are_layers_once_a_matcher_tells_them() -> None:
    model = exported(Functions().train()).module()

    def layer_of(node: fx.Node) -> str | None:
        """Each begins with the product by its weight, and ends with a sum."""
        if node.op != "call_function" or not any(map(is_weight, before(node))):
            return None
        last = next(int(n.target.rpartition(".")[2]) for n in reversed(order) if n in before(node) and is_weight(n))
        return f"layers.{last}"

    order = list(model.graph.nodes)

    @functools.cache
    def before(node: fx.Node) -> frozenset[fx.Node]:
        """What a node is computed from, itself among it."""
        return frozenset({node}).union(*(before(given) for given in node.all_input_nodes))

    def is_weight(node: fx.Node) -> bool:
        return node.op == "get_attr" and str(node.target).startswith("weights.")

    assert mark(model, targets=layer_of) > 8
    scheduler = LTDScheduler(5, LENGTH, 3)
    ltd_fx.transform(model, scheduler, layers=r"layers\.\d")
    assert [site.status for site in ltd_fx.summary(model).sites if site.routed] == ["proven", "proven"]
    step(model, LENGTH)
    assert {name: kept.shape[1] for name, kept in ltd_fx.sampled_indices(model).items()} == {
        "layers.1": 5,
        "layers.2": 5,
    }
    ltd_fx.restore(model)
