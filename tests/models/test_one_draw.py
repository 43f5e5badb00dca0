"""A compiled model draws for all of its layers in one operator."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

import ltd_fx
from ltd_fx import LTDScheduler

transformers = pytest.importorskip("transformers")

B, S = 2, 16
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "use_cache": False}


def model_of(**options: Any) -> tuple[nn.Module, LTDScheduler, Tensor]:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=6)).train()
    scheduler, ids = LTDScheduler(4, S, 4), torch.randint(0, 64, (B, S))
    return ltd_fx.transform(model, scheduler, **options, example_inputs={"input_ids": ids}), scheduler, ids


class Draws:
    """A backend that counts, of each graph that draws, in how many operators."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        how = {"fw_compiler": self._count, "bw_compiler": self._count}
        self.backend = aot_autograd(**how, partition_fn=min_cut_rematerialization_partition)

    def _count(self, graph: fx.GraphModule, inputs: Any) -> Any:
        count = sum(node.target is torch.ops.ltd_fx.sample_tokens.default for node in graph.graph.nodes)
        self.counts += [count] if count else []
        return make_boxed_func(graph.forward)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 1),
        pytest.param({"keep": {"model.layers.2": 0.5}}, 2, marks=pytest.mark.slow),
        pytest.param({"sampling": "shared"}, 1, marks=pytest.mark.slow),
        pytest.param({"protect": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"sampling": "per_document"}, 4, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_graph_of_the_whole_model(options: Any, wanted: int) -> None:
    """It draws as the eager model does, over a schedule."""
    eager, scheduler, ids = model_of(**options)
    inputs = {"input_ids": ids}
    if options.get("sampling") == "per_document":
        inputs["position_ids"] = torch.arange(S // 2).repeat(2).expand(B, S)
    compiled, other, _ = model_of(**options)
    compiled.load_state_dict(eager.state_dict())
    draws = Draws()
    step = torch.compile(compiled, backend=draws.backend, fullgraph=True)
    for _ in range(3):
        ours, theirs = step(**inputs).logits, eager(**inputs).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ours.sum().backward()
        found, wants = ltd_fx.sampled_indices(compiled), ltd_fx.sampled_indices(eager)
        assert all(torch.equal(rows, wants[name]) for name, rows in found.items())
        scheduler.step()
        other.step()
    assert draws.counts == [wanted]


def test_layers_that_are_compiled_one_by_one_draw_alone() -> None:
    model, scheduler, ids = model_of()
    draws = Draws()
    ltd_fx.compile_layers(model, backend=draws.backend)
    for _ in range(2):
        model(ids).logits.sum().backward()
        scheduler.step()
    assert draws.counts == [1]


def test_repeated_layers_draw_anew() -> None:
    """A layer that a forward calls twice has a draw of its own in its second call."""

    class Twice(nn.Module):
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, hidden: Tensor) -> Tensor:
            for layer in (*self.layers, *self.layers):
                hidden = layer(hidden)
            return hidden

    torch.manual_seed(0)
    layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(4))
    model, x = Twice(layers), torch.randn(B, S, 8)
    ltd_fx.transform(model, LTDScheduler(4, S, 4), example_inputs=(x,))
    draws = Draws()
    torch.compile(model, backend=draws.backend, fullgraph=True)(x)
    assert draws.counts == [1 + 2]  # all first calls together, and two second ones
    rows = ltd_fx.sampled_indices(model)
    assert len({str(value.tolist()) for value in rows.values()}) == len(rows) == 4
