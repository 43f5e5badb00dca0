"""Within ``torch.autocast``, what casts weights for a whole region sees no fake ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_freed import Net, Real, batch
from torch import Tensor, nn

import ltd_fx


def transform(model: nn.Module, inputs: Any) -> None:
    ltd_fx.transform(model, example_inputs=inputs)


def transform_later(model: nn.Module, inputs: Any) -> None:
    ltd_fx.transform(model)


def verify(model: nn.Module, inputs: Any) -> None:
    ltd_fx.transform(model, example_inputs=inputs)
    ltd_fx.verify(model, inputs)


def nested(model: nn.Module, inputs: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ltd_fx.transform(model, example_inputs=inputs)


@pytest.mark.parametrize("kind", [Net, Real])
@pytest.mark.parametrize("use", [transform, transform_later, verify, nested])
def test_the_first_forward_in_a_region_trains_all_weights(use: Callable[..., None], kind: type[nn.Module]) -> None:
    model, inputs = kind(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            use(model, inputs)
        output = model(*inputs)
        assert torch.is_autocast_cache_enabled()
    assert type(output) is Tensor
    output.float().square().mean().backward()
    assert {type(p.grad) for p in model.parameters()} == {Tensor}
    before = [p.detach().clone() for p in model.parameters()]
    torch.optim.SGD(model.parameters(), lr=10.0).step()
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert sum(moved) >= len(moved) - 4  # keys' biases cancel in the softmax
