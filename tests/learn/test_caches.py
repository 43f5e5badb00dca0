"""What a forward caches, counts or draws while a pattern is learnt leaves no trace."""

import copy
import functools
from typing import Any

import pytest
import torch
from attend import check_routed, tables
from test_infer import Base, D, H, Plain, toy_inputs
from torch import Tensor, nn

import ltd_fx


@functools.lru_cache
def cached_tables(seq: int) -> Any:
    return tables(torch.arange(seq), D // H)


class ByFunction(Base):
    def rope(self, seq: int) -> Any:
        return cached_tables(seq)


class ByMethod(Base):
    @functools.lru_cache  # noqa: B019
    def rope(self, seq: int) -> Any:
        return super().rope(seq)


class ByStaticMethod(Base):
    @staticmethod
    @functools.lru_cache(maxsize=4)
    def rope(seq: int) -> Any:  # type: ignore[override]
        return tables(torch.arange(seq), D // H)


class ByAttribute(Base):
    kept: Any = None

    def rope(self, seq: int) -> Any:
        if self.kept is None or self.kept[0].shape[0] != seq:
            self.kept = super().rope(seq)
        return self.kept


class ByDictionary(Base):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.kept: dict[int, Any] = {}

    def rope(self, seq: int) -> Any:
        if seq not in self.kept:
            self.kept[seq] = super().rope(seq)
        return self.kept[seq]


class ByBuffer(Base):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def rope(self, seq: int) -> Any:
        if self.cos is None:
            self.cos, self.sin = super().rope(seq)
        self.calls = self.calls + 1
        return self.cos, self.sin


class ByClass(Base):
    kept: dict[int, Any] = {}  # noqa: RUF012

    def rope(self, seq: int) -> Any:
        if seq not in self.kept:
            self.kept[seq] = super().rope(seq)
        return self.kept[seq]


@pytest.mark.parametrize("kind", [ByFunction, ByMethod, ByStaticMethod, ByAttribute, ByDictionary, ByBuffer, ByClass])
def test_caches_hold_no_fake_tensors(kind: type[Base]) -> None:
    inputs = toy_inputs()
    check_routed(kind(Plain), inputs, 4, real=inputs["padding"])


class Shared(nn.Module):
    """Keeps its mask for the next layer, in the dtype of the hidden states."""

    kept: dict[int, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        seq = x.shape[1]
        if seq not in self.kept:
            self.kept[seq] = torch.zeros(seq, seq, dtype=x.dtype)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, self.kept[seq])[:, 0]


def test_a_proof_leaves_nothing_in_its_own_dtype() -> None:
    model, inputs = nn.Sequential(*(Shared() for _ in range(3))), torch.randn(2, 10, 8)
    ltd_fx.transform(model, example_inputs=(inputs,))
    ltd_fx.verify(model, (inputs,))
    assert Shared.kept == {}
    assert model(inputs).dtype == torch.float32


class Noisy(Base):
    def __init__(self) -> None:
        super().__init__(Plain)
        self.norm, self.drop = nn.BatchNorm1d(D), nn.Dropout(0.5)
        self.register_buffer("rebound", torch.zeros(()))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        self.rebound = self.rebound + torch.rand(())
        x = self.drop(self.norm(x.mT).mT + torch.randn(x.shape[-1]))
        return super().forward(x, padding)


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = Noisy().train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before, keys = copy.deepcopy(model.state_dict()), [set(m.__dict__) for m in model.modules()]
    state = torch.get_rng_state()
    ltd_fx.transform(model, example_inputs=toy_inputs())
    assert torch.equal(torch.get_rng_state(), state)
    ltd_fx.verify(model, toy_inputs())
    assert torch.equal(torch.get_rng_state(), state)
    ltd_fx.restore(model)
    assert [module.training for module in model.modules()] == modes
    assert [set(m.__dict__) for m in model.modules()] == keys
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
