"""Compiled, a routed layer saves no mask and no rotary tables of its own for the backward pass."""

from math import prod
from typing import Any

import pytest
import torch
from conftest import bert, decoder
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import ltd_fx

BATCH, SEQ, KEEP, HIDDEN, HEADS = 3, 40, 13, 32, 4


def saved_shapes(model: nn.Module, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Of what the compiled forward hands to the backward, with Inductor's partitioner and operators."""
    shapes: list[list[int]] = []

    def keep(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        outputs = [node for node in graph.graph.output_node().args[0] if isinstance(node, fx.Node)]
        saved = [node.meta["val"] for node in outputs if node.op != "placeholder"]
        tensors = [value for value in saved if isinstance(value, Tensor)]
        shapes.extend([size if isinstance(size, int) else size.node.hint for size in value.shape] for value in tensors)
        return graph

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, _: graph,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(model, backend=backend, fullgraph=True)(**inputs).loss.backward()
    return shapes


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(decoder("Llama", use_cache=False), marks=pytest.mark.slow),
        pytest.param(bert, marks=pytest.mark.slow),
    ],
    ids=["llama", "bert"],
)
def test_masks_and_tables_are_computed_again(build: Any) -> None:
    ids = torch.arange(BATCH * SEQ).view(BATCH, SEQ) % 60
    inputs = {"input_ids": ids, "attention_mask": (ids != 7).long(), "labels": ids}
    model = ltd_fx.transform(build().train(), ltd_fx.LTDScheduler(KEEP, SEQ, 10))
    shapes = saved_shapes(model, inputs)
    assert sum(shape[-2:] == [KEEP, HIDDEN // HEADS] for shape in shapes) >= 2 * 3, "queries, keys and values"
    assert not [shape for shape in shapes if shape.count(KEEP) > 1], "masks"
    assert BATCH * KEEP * HIDDEN // HEADS not in [prod(shape) for shape in shapes], "tables"
