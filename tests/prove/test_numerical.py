"""The numerical test by itself, without token flow: each of its strengths shows a wrong layer that no other does."""

from functools import partial
from typing import Any

import pytest
import torch
from attend import Attention
from torch import Tensor, nn
from torch.nn import functional as F

import ltd_fx
from ltd_fx import LayerPattern, LTDError
from ltd_fx.learn import Call, Proof, Sandbox
from ltd_fx.prove.proof import prove, prove_alone

DIM, TOKENS = 16, 12


class Plain(nn.Module):
    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number, self.attention = number, Attention(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def proof_of(layer: nn.Module) -> Proof:
    call = Call("it", (torch.randn(2, TOKENS, DIM),), {}, None)
    return prove("it", layer, LayerPattern(hidden="x", output=None), call, sandbox=Sandbox(layer))


class Slightly(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-7 * torch.arange(x.shape[1])[:, None]


class InTraining(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(x.shape[1])[:, None] if self.training else x)


class OfFew(Plain):
    """Half of twelve tokens do not show it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + float(x.shape[1] < 5))


class ZeroTable(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1, DIM).expand(TOKENS, -1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table[: x.shape[1]])


@pytest.mark.parametrize("layer", [Slightly, InTraining, OfFew, ZeroTable])
def test_a_wrong_layer_that_one_strength_shows(layer: type[nn.Module]) -> None:
    """A tolerance of rounding alone; training mode; a second draw; tables that are yet to be filled."""
    assert proof_of(Plain()).status == "tested"
    proof = proof_of(layer())
    assert proof.status == "wrong"
    assert proof.reason == "kept tokens differ from the dense layer's"


class Random(Plain):
    """What training leaves to chance, in all the ways that libraries write it."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(super().forward(x), 0.5, self.training)
        if not self.training:
            return y
        y = y * y.new_empty(len(y), 1, 1).bernoulli_(0.5).div_(0.5)
        y = y * (0.9 + torch.rand(len(y), 1, 1)).floor() + torch.randn_like(y)
        y = y * torch.empty_like(y).uniform_(0.9, 1.1) * torch.bernoulli(torch.full_like(y, 0.5))
        return y + F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)


def test_nothing_is_left_to_chance() -> None:
    assert proof_of(Random()).status == "tested"


class Stack(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(number) for number in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class WhenLong(Plain):
    """Of more than 16 tokens it is another; by a number of which token flow knows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * float(x.shape[1] // 17))


class ByNumber(Plain):
    """The fourth is another than its like, by an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + float(x.shape[1]) if self.number == 3 else x)


class InOneDtype(Plain):
    """Of whose code path in float64 nothing is trained; token flow does not know a stride."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).as_strided(x.shape, x.stride())
        return y if x.dtype == torch.float64 else y + x.roll(1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_layer_that_shows_in_the_dtype_of_training(dtype: torch.dtype) -> None:
    layer = InOneDtype().to(dtype)
    call = Call("it", (torch.randn(2, 64, DIM, dtype=dtype),), {}, None)
    how = partial(prove_alone, "it", pattern=LayerPattern(hidden="x", output=None), call=call, sandbox=Sandbox(layer))
    assert how(slot=Plain().to(dtype)).status == "tested"
    assert "other ways than softmax attention" in how(slot=layer).reason


@pytest.mark.parametrize(("layer", "name"), [(WhenLong, "layers.1"), (ByNumber, "layers.3")])
def test_a_wrong_layer_that_shows_at_length_or_in_one_of_its_kind(layer: type[nn.Module], name: str) -> None:
    with pytest.raises(LTDError, match=rf"{name} .*kept tokens differ"):
        ltd_fx.transform(Stack(layer).train(), layers=layer, example_inputs=(torch.randn(2, 64, DIM),))


class ByLayerNumber(Plain):
    """The fourth is another than its like, by what all libraries call the layer's number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(x.shape[1])[:, None] if self.counts() else x)

    def counts(self) -> bool:
        return self.layer_idx == 3


class InTrainingByRemainder(ByLayerNumber):
    def counts(self) -> bool:
        return self.training and self.layer_idx % 4 == 3


@pytest.mark.parametrize("layer", [ByLayerNumber, InTrainingByRemainder])
def test_a_layer_that_goes_by_its_number_is_proven_by_itself(layer: type[nn.Module]) -> None:
    with pytest.raises(LTDError, match=r"layers.3 .*cannot be routed"):
        ltd_fx.transform(Stack(layer).train(), layers=layer, example_inputs=(torch.randn(2, 24, DIM),))


def test_a_number_that_is_handed_to_a_cache_decides_nothing() -> None:
    class Cache:
        def get_seq_length(self) -> int:
            return 0

        def update(self, number: int) -> bool:
            return number >= 2 and number % 2 == 0

    class Cached(ByLayerNumber):
        def counts(self) -> bool:
            return Cache().update(self.layer_idx) and False

    model, number = Stack(Cached), 0
    sandbox = Sandbox(model)
    with sandbox.open():
        model(torch.randn(2, TOKENS, DIM))
    assert not sandbox.goes_by_number(model.layers[number])
    with sandbox.open():
        assert model.layers[3].layer_idx * 2 == 6
    assert sandbox.goes_by_number(model.layers[number])
    assert type(model.layers[3].layer_idx) is int
