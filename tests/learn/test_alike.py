"""Which layers are alike: of those the first two are examined, and the others go by them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from toy import Encoder

import ltd_fx
from ltd_fx import LTDScheduler
from ltd_fx.learn import likeness
from ltd_fx.prove import Examination


def layer(eps: float = 1e-5) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4, eps=eps), nn.Linear(4, 4))


def number(module: nn.Module, value: int) -> None:
    module.layer_idx = value


@pytest.mark.parametrize(
    "change",
    [
        lambda module, i: None,
        number,
        lambda module, i: module.compile(backend="eager"),
        lambda module, i: module[1].compile(backend="eager"),
    ],
    ids=["as they are", "numbered", "compiled", "compiled within"],
)
def test_alike(change: Callable[[nn.Module, int], None]) -> None:
    layers = [layer(), layer()]
    for i, each in enumerate(layers):
        change(each, i)
    assert likeness(layers[0]) == likeness(layers[1])


def test_not_alike() -> None:
    assert likeness(layer()) != likeness(layer(eps=1e-6))
    assert likeness(layer()) != likeness(nn.Sequential(*layer(), nn.GELU()))


def test_layers_compiled_one_by_one_are_examined_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are."""
    seen, accept = [], Examination.accept
    monkeypatch.setattr(Examination, "accept", lambda self, site, **how: seen.append(site) or accept(self, site, **how))
    model = ltd_fx.transform(Encoder(8), LTDScheduler(3, 8, 4))
    ltd_fx.compile_layers(model, backend="eager")
    model(torch.randn(2, 8, 16))
    assert len(seen) == 2
