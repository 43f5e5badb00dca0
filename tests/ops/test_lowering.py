"""``LTD_FX_LOWERING``: under Inductor the operators are decomposed and fused, or our kernels are called."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import decoder
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

import ltd_fx
from ltd_fx import LTDError
from ltd_fx.ops import lowering


@pytest.fixture(autouse=True)
def _fused_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    monkeypatch.undo()
    lowering.register_inductor_decompositions()


def routed(hidden: Tensor, indices: Tensor) -> Tensor:
    return torch.ops.ltd_fx.gather_tokens(hidden.relu(), indices) + 1


def called(**options: Any) -> set[str]:
    """The operators that a freshly compiled function calls."""
    torch._dynamo.reset()
    compiled = torch.compile(routed, fullgraph=True, **options)
    args = torch.randn(2, 9, 8), torch.tensor([[0, 3], [2, 8]])
    assert torch.equal(compiled(*args), routed(*args))
    with torch.profiler.profile() as profile:
        compiled(*args)
    return {event.key for event in profile.key_averages() if event.key.startswith("ltd_fx::")}


def test_a_choice_is_never_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by what was registered before, nor by graphs that lie in the caches of torch.compile."""
    for choice in ("fuse", "kernel", "fuse", "kernel"):
        monkeypatch.setenv("LTD_FX_LOWERING", choice)
        lowering.register_inductor_decompositions()
        assert called() == ({"ltd_fx::gather_tokens"} if choice == "kernel" else set())


def test_fused_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LTD_FX_LOWERING", raising=False)
    lowering.register_inductor_decompositions()
    assert called() == set()


def test_another_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LTD_FX_LOWERING", "fused")
    model = torch.nn.Sequential(*(torch.nn.TransformerEncoderLayer(8, 2) for _ in range(3)))
    with pytest.raises(LTDError, match="LTD_FX_LOWERING must be fuse or kernel, got 'fused'"):
        ltd_fx.transform(model)
    assert not ltd_fx.is_transformed(model)


@pytest.mark.parametrize("lowering", [pytest.param("fuse", marks=pytest.mark.slow), "kernel"])
def test_a_whole_model_on_fake_cuda_tensors(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by torch.compile as on a GPU: in one graph, nothing of it on the CPU, and no value read from the device.

    Without gradients: autograd's engine wants a device behind a CUDA tensor, even a fake one.
    """
    monkeypatch.setenv("LTD_FX_LOWERING", lowering)
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> fx.GraphModule:
        graphs.append(graph)
        return graph

    with FakeTensorMode(), torch.device("cuda"):
        model = decoder("Llama", num_hidden_layers=3, use_cache=False)().train()
        ids = torch.zeros(3, 64, dtype=torch.long)
        mask = torch.ones_like(ids)
        scheduler = ltd_fx.LTDScheduler(16, 64, 10)
        ltd_fx.transform(model, scheduler)
        backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for step in (0, 3, 6):
            scheduler.set_step(step)
            with torch.no_grad():
                loss = compiled(input_ids=ids, attention_mask=mask, labels=ids).loss
            assert loss.device.type == "cuda"
    assert len(graphs) == 1
    nodes = list(graphs[0].graph.nodes)
    assert {node.meta["val"].device.type for node in nodes if isinstance(node.meta.get("val"), Tensor)} == {"cuda"}
    targets = [str(node.target) for node in nodes]
    assert not {"aten._local_scalar_dense.default", "aten.item.default"} & set(targets)
    operators = [target for target in targets if target.startswith("ltd_fx.")]
    # cos, sin and position ids in one launch
    names = ("sample_tokens", "gather_aligned", "gather_mask", "gather_tokens", "scatter_tokens")
    assert operators == ([f"ltd_fx.{name}.default" for name in names] if lowering == "kernel" else [])
