"""What torch's private names about Dynamo's frames must mean. A failure says which name a release of torch changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from ltd_fx import torch_private_dynamo

pytestmark = pytest.mark.compat("torch")


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Half()

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x) + 1
        torch._dynamo.graph_break()
        return self.part(x)


def seen(module: nn.Module, x: Tensor, look: Callable[[fx.GraphModule, Any], Any], **options: Any) -> list[Any]:
    """What ``look`` found in each graph of a forward."""
    found = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        found.append(look(graph, inputs))
        return graph

    torch.compile(module, backend=backend, **options)(x)
    return found


def test_frame_in_progress() -> None:
    whole = Whole()
    frames = seen(whole, torch.ones(2, 4), lambda graph, inputs: torch_private_dynamo.frame_in_progress())
    first, second = frames
    assert (first.name, first.resumed, second.resumed, second.broken) == ("forward", False, True, "")
    line = next(i for i, text in enumerate(open(__file__), 1) if "torch._dynamo.graph_break()" in text)  # noqa: SIM115
    assert first.broken == f"{__file__}:{line}"
    assert eval("L['self']", {}, first.scope) is whole
    assert eval("G['Whole']", {}, first.scope) is Whole


def test_sources_of_and_their_names() -> None:
    def look(graph: fx.GraphModule, inputs: Any) -> list[list[str]]:
        names = torch_private_dynamo.source_name
        placeholders = graph.graph.find_nodes(op="placeholder")
        return [[*map(names, torch_private_dynamo.sources_of(node))] for node in placeholders]

    (found,) = seen(Half(), torch.ones(2, 4), look)
    weight = next(chain for chain in found if chain[0].endswith("_parameters['weight']"))
    assert weight[0] == "L['self']._modules['inner']._parameters['weight']"
    assert "L['self']._modules['inner']" in weight
    assert weight[-1] == "L['self']"
    assert ["L['x']"] in found
    assert any(chain[0] == "L['self']._buffers['scale']" for chain in found)


def test_guard_training() -> None:
    """Dynamo does not ask for the mode of a module that does not."""

    def graphs(guarded: bool) -> int:
        torch._dynamo.reset()
        made = []

        def backend(graph: fx.GraphModule, inputs: Any) -> Any:
            made.append(graph)
            for node in graph.graph.find_nodes(op="placeholder"):
                for source in torch_private_dynamo.sources_of(node):
                    if guarded and torch_private_dynamo.source_name(source) == "L['self']._modules['inner']":
                        torch_private_dynamo.guard_training(source)
            return graph

        module = Half()
        run = torch.compile(module, backend=backend)
        for mode in (True, False, True):
            module.inner.train(mode)
            run(torch.ones(2, 4))
        return len(made)

    assert (graphs(False), graphs(True)) == (1, 2)


def test_mark_any_size_and_trace_again() -> None:
    """Each size is a symbol of its own, also where two are equal, and the frame may have broken before."""
    numbers = []

    def look(graph: fx.GraphModule, inputs: Any) -> Any:
        numbers.append(torch_private_dynamo.compile_number())
        for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if (
                isinstance(value, Tensor)
                and not isinstance(value, nn.Parameter)
                and node.meta["example_value"].ndim == 3
            ):
                sizes = node.meta["example_value"].shape
                if not any(isinstance(size, torch.SymInt) for size in sizes):
                    torch_private_dynamo.mark_any_size(value)
                    torch_private_dynamo.trace_again("for the test")
                return sizes
        return None

    first, _ = seen(Whole(), torch.ones(4, 4, 4), look)
    assert numbers[0] == numbers[1] != numbers[2]
    assert len({size.node.expr for size in first[:2]}) == 2
    assert first[2] == 4  # the program fixes it


def test_backend_named() -> None:
    def own(graph: fx.GraphModule, inputs: Any) -> Any:
        return graph

    assert torch_private_dynamo.backend_named(own) is own
    graph = fx.symbolic_trace(nn.Identity())
    assert torch_private_dynamo.backend_named("eager")(graph, [torch.ones(2)])(torch.ones(2)).tolist() == [1, 1]


def test_put_tensor() -> None:
    module = Half()
    weight = torch.zeros(4, 4)
    torch_private_dynamo.put_tensor(module.inner, "weight", weight)
    torch_private_dynamo.put_tensor(module, "scale", None)
    assert module.inner.weight is weight
    assert module.scale is None
    assert list(dict(module.inner.named_parameters())) == ["weight", "bias"]


def test_compiled_in_place() -> None:
    module = Half()
    module.inner.compile(backend="eager")
    assert torch_private_dynamo.compiled_in_place(module.inner)
    assert not torch_private_dynamo.compiled_in_place(module)
    assert vars(module.inner)[torch_private_dynamo.COMPILED_CALL] is not None


def test_custom_graph_pass() -> None:
    """Inductor runs it on Dynamo's graph, and asks for its identity where it caches."""
    ran = []
    made = torch_private_dynamo.custom_graph_pass(ran.append, "an identity")
    assert made.uuid() == "an identity"
    with torch._inductor.config.patch(pre_grad_custom_pass=made, fx_graph_cache=False):
        torch.compile(Half(), backend="inductor")(torch.ones(2, 4))
    assert [type(graph.owning_module).__name__ for graph in ran] == ["GraphModule"]
