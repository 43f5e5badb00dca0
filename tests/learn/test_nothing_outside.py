"""What a model's helper files, classes, closures and defaults cache in a forward that is only watched is put back."""

from collections.abc import Callable
from typing import Any

import cached
import pytest
import torch
from attend import Attention
from cached import ROPE, Rope
from torch import Tensor, nn

import ltd_fx

WAYS: dict[str, Callable[[int], Any]] = {
    "dictionary": cached.in_a_dictionary,
    "globals": cached.in_globals,
    "functools": cached.by_functools,
    "default": cached.in_a_default,
    "closure": cached.in_a_closure,
    "function": cached.in_an_attribute,
    "object": ROPE.in_an_object,
    "class": Rope.in_a_class,
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, rope: Any) -> Tensor:
        return x + self.attention(x, None, rope)


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layers = way, nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rope = WAYS[self.way](x.shape[1])
        for layer in self.layers:
            x = layer(x, rope)
        return x


@pytest.mark.parametrize("lazy", [False, True], ids=["examples", "first forward"])
@pytest.mark.parametrize("way", WAYS)
def test_helper_files_keep_no_tensor(way: str, lazy: bool) -> None:
    model, x = Net(way).train(), torch.randn(2, 12, 16)
    assert not cached.found()
    ltd_fx.transform(model, example_inputs=None if lazy else (x,))
    if not lazy:
        assert ltd_fx.verify(model, (x,)).ok
        assert not cached.found()
    model(x).sum().backward()
    assert {type(table) for table in cached.found()} == {Tensor}  # of the forward itself
    reset()


def reset() -> None:
    cached.BY_LENGTH.clear()
    cached.latest, cached.latest_length = None, 0
    cached.by_functools.cache_clear()
    (cached.in_a_default.__defaults__ or ())[0].clear()
    for cell, value in zip(cached.in_a_closure.__closure__ or (), (None, 0), strict=True):
        cell.cell_contents = value
    vars(cached.in_an_attribute).clear()
    ROPE.kept["tables"].clear()
    Rope.shared, Rope.length = None, 0


def test_what_was_cached_before_stays() -> None:
    before = cached.in_a_dictionary(12), cached.in_globals(12), Rope.in_a_class(12)
    for way in ("dictionary", "globals", "class"):
        ltd_fx.transform(Net(way).train(), example_inputs=(torch.randn(2, 12, 16),))
    assert cached.BY_LENGTH.keys() == {12}
    after = cached.BY_LENGTH[12], cached.latest, Rope.shared
    assert all(pair is earlier for pair, earlier in zip(after, before, strict=True))
    assert cached.latest_length == Rope.length == 12
    reset()


def test_tensors_of_helper_files_are_not_written_to() -> None:
    WAYS["counting"] = cached.counting
    model, x = Net("counting").train(), torch.randn(2, 12, 16)
    ltd_fx.transform(model, example_inputs=(x,))
    ltd_fx.verify(model, (x,))
    assert cached.CALLS == 0
    del WAYS["counting"]


class Registering(Net):
    """Registers a function at its first forward, as a late import would."""

    registered: dict[str, Any] = {}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        if not self.registered:
            self.registered["function"] = torch.add
        return super().forward(x)


def test_what_holds_no_tensor_is_not_undone() -> None:
    ltd_fx.transform(Registering("object").train(), example_inputs=(torch.randn(2, 12, 16),))
    assert Registering.registered == {"function": torch.add}
    reset()
