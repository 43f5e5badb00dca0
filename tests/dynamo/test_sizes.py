"""Batches and hidden states of any size, also of equal ones; and what is left when the model is gone."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from nets import HEADS, LENGTH, D, Net, words
from test_backend import slow, whole
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx import LTDScheduler


class Streams(Net):
    """It takes hidden states."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        rope, mask = (
            (places[None, :, None] * 0.1).cos().expand(1, -1, D // HEADS),
            (places[:, None] >= places)[None, None],
        )
        for layer in self.layers:
            x = layer(x, rope, mask)
        return x


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(0, 32, (batch, length))


def streams(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, D)


@pytest.mark.parametrize("dynamic", [None, slow(True), slow(False)])
@pytest.mark.parametrize(
    ("make", "inputs", "sizes"),
    [
        pytest.param(Net, ids, [(9, 9), (3, 9), (9, 12)], marks=pytest.mark.slow),
        pytest.param(Net, ids, [(1, 20), (2, 20), (1, 16)], marks=pytest.mark.slow),
        pytest.param(Streams, streams, [(3, D), (D, D), (2, 12)], marks=pytest.mark.slow),
    ],
    ids=["batch is length", "one sequence", "length is width"],
)
def test_sizes_that_are_equal_are_told_apart(make: Any, inputs: Any, sizes: Any, dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = make().train()
    twin = ltd_fx.transform(copy.deepcopy(model), LTDScheduler(5, LENGTH, 9), example_inputs=(inputs(3, 20),))
    backend = ltd_fx.backend(LTDScheduler(5, LENGTH, 9), inner="aot_eager")
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch, length in sizes:
        given = inputs(batch, length)
        torch.testing.assert_close(run(given), twin(given))
        torch.testing.assert_close(ltd_fx.sampled_indices(backend), ltd_fx.sampled_indices(twin), rtol=0, atol=0)
    assert [site.status for site in ltd_fx.summary(backend).sites if site.routed] == ["proven", "proven"]


@pytest.mark.parametrize("ours", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_that_is_gone_leaves_no_weights(ours: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = Net().train()
    backend: Any = ltd_fx.backend(inner="aot_eager") if ours else "aot_eager"
    run = whole(model, backend)
    run(words(LENGTH)).sum().backward()
    weights = [weakref.ref(weight) for weight in model.parameters()]
    del model, run
    caplog.clear()  # torch's own trace holds what it logs
    gc.collect()
    assert not [weight for weight in weights if weight() is not None]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_fusion_size": 8}}], ids=str
)
def test_options_reach_the_inner_backend(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net().train()
    twin = ltd_fx.transform(copy.deepcopy(model), example_inputs=(words(LENGTH),))
    run = torch.compile(model, backend=ltd_fx.backend(), fullgraph=True, **options)
    torch.testing.assert_close(run(words(LENGTH)), twin(words(LENGTH)))
    model.eval()
    torch.testing.assert_close(run(words(LENGTH)), twin.eval()(words(LENGTH)))


@pytest.mark.slow
def test_recompiles_of_the_program_keep_the_draws() -> None:
    """A graph for each form of the arguments, one sequence of draws."""

    class Scaled(Net):
        def forward(self, ids: Tensor, scale: float | None = None) -> Tensor:
            return super().forward(ids) if scale is None else super().forward(ids) * scale

    torch.manual_seed(0)
    model = Scaled().train()
    twin = ltd_fx.transform(copy.deepcopy(model), example_inputs=(words(LENGTH),))
    counter = CompileCounterWithBackend("aot_eager")
    backend = ltd_fx.backend(inner=counter)
    run: nn.Module = whole(model, backend)
    for arguments in ((), (2.0,), (), (3.0,), (2.0,)):
        torch.testing.assert_close(run(words(LENGTH), *arguments), twin(words(LENGTH), *arguments))
        torch.testing.assert_close(ltd_fx.sampled_indices(backend), ltd_fx.sampled_indices(twin), rtol=0, atol=0)
    assert counter.frame_count > 1
