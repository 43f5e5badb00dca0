"""``sampled_indices`` runs no forward: what cannot run on fake tensors, or twice, tells its rows all the same."""

from typing import Any

import pytest
import torch
from conftest import decoder, text
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDScheduler

MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}


@torch.library.custom_op("ltd_fx_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An opaque kernel, which has no fake implementation."""
    return nn.functional.scaled_dot_product_attention(q, k, v)


def backward(ctx: Any, grad: Tensor) -> Any:
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        return torch.autograd.grad(nn.functional.scaled_dot_product_attention(*inputs), inputs, grad)


attend.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.rows: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.detach())
        return x + attend(*(t[:, None] for t in self.qkv(x).chunk(3, -1)))[:, 0]


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(3))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x[:, : int(x.abs().sum() > 0) + 11]  # a length that depends on values
        for block in self.blocks:
            x = block(x)
        return x


def test_an_opaque_kernel_and_a_length_that_depends_on_values() -> None:
    ltd_fx.register_pattern(Layer, ltd_fx.LayerPattern(hidden="x"))
    model = ltd_fx.transform(Kernel().train(), LTDScheduler(5, 12, 10))
    hidden = torch.randn(2, 16, 16)
    model(hidden).sum().backward()
    kept = ltd_fx.sampled_indices(model)["blocks.1"]
    assert model.calls == 1
    # the rows that the layer saw, found among those it was given: what the first layer returned
    given = model.blocks[0].rows[0]
    given = given + attend(*(t[:, None] for t in model.blocks[0].qkv(given).chunk(3, -1)))[:, 0]
    assert torch.equal(given.gather(1, kept[..., None].expand(-1, -1, 16)), model.blocks[1].rows[0])


@pytest.mark.parametrize("options", [{}, {"output_router_logits": True}], ids=["plain", "router logits"])
def test_mixtures_of_experts(options: dict[str, Any]) -> None:
    model = decoder("Mixtral", **MOE)().train()
    ltd_fx.transform(model, LTDScheduler(9, 64, 10))
    inputs = {"input_ids": text()["input_ids"], "use_cache": False, **options}
    model(**inputs).logits.sum().backward()
    assert {tuple(rows.shape) for rows in ltd_fx.sampled_indices(model).values()} == {(3, 9)}
