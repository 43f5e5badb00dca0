"""No batch is kept, and a deleted model's weights are freed at once: by reference counts, as a plain model's are."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attend import Attention
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

LENGTH = 12


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.attention(x, mask[:, None, None].bool())


class Counting(Layer):
    """Counts its tokens, so it may not see fewer."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x + torch.arange(x.shape[1])[:, None].to(x), mask)


class Net(nn.Module):
    def __init__(self, layer: type[nn.Module] = Layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Real(Net):
    """Runs on no fake tensors."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x[torch.ones(len(x)).nonzero()[:, 0]], mask)


class Context:
    """What layers are called with that is no tensor: the batch, and the model."""

    def __init__(self, *held: Any) -> None:
        self.held = held


class LayerInContext(Layer):
    def forward(self, x: Tensor, mask: Tensor, context: Context) -> Tensor:
        return super().forward(x, mask)


class InContext(Net):
    def __init__(self) -> None:
        super().__init__(LayerInContext)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        context, x = Context(self, x), x[torch.ones(len(x)).nonzero()[:, 0]]
        for layer in self.layers:
            x = layer(x, mask, context)
        return x


def learnt(model: nn.Module, batch: Any) -> Any:
    ltd_fx.transform(model, example_inputs=batch)


def waiting(model: nn.Module, batch: Any) -> Any:
    ltd_fx.transform(model)  # for the first training forward


def trained(model: nn.Module, batch: Any) -> Any:
    ltd_fx.transform(model)
    model(*batch).sum().backward()


def verified(model: nn.Module, batch: Any) -> Any:
    ltd_fx.transform(model, example_inputs=batch)
    assert ltd_fx.verify(model, batch).ok


def restored(model: nn.Module, batch: Any) -> Any:
    ltd_fx.restore(ltd_fx.transform(model, example_inputs=batch))


def on_a_route(model: nn.Module, batch: Any) -> Any:
    ltd_fx.transform(model, routes=[(1, 2, None)])
    model(*batch)


def outlived(model: nn.Module, batch: Any) -> Any:
    scheduler = LTDScheduler(4, LENGTH, 10)
    trained(ltd_fx.restore(ltd_fx.transform(model, scheduler)), batch)
    ltd_fx.transform(ltd_fx.restore(model), scheduler, example_inputs=batch)
    model(*batch)
    scheduler.step()
    return scheduler, ltd_fx.summary(model)


def copied(model: nn.Module, batch: Any) -> Any:
    trained(model, batch)
    copied = copy.deepcopy(model)
    copied(*batch)


@pytest.fixture
def by_counts() -> Iterator[None]:
    # what torch imports in the first call of all raises and catches errors, which hold that call
    learnt(Net(), batch())
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, LENGTH, 16), torch.ones(2, LENGTH)


@pytest.mark.usefixtures("by_counts")
@pytest.mark.parametrize("kind", [Net, Real, InContext])
@pytest.mark.parametrize("use", [learnt, waiting, trained, verified, restored, on_a_route, outlived, copied])
def test_batches_and_weights_are_freed_at_once(use: Callable[..., Any], kind: type[Net]) -> None:
    model, inputs = kind(), batch()
    tensors, weights = [weakref.ref(t) for t in inputs], [weakref.ref(p) for p in model.parameters()]
    kept = use(model, inputs)
    del inputs
    assert [t() for t in tensors] == [None] * 2
    assert all(weight() is not None for weight in weights)
    del model
    assert [w() for w in weights] == [None] * len(weights)
    del kept


@pytest.mark.usefixtures("by_counts")
@pytest.mark.parametrize("lazy", [False, True])
def test_a_refusal_keeps_nothing(lazy: bool) -> None:
    model, inputs = Net(Counting), batch()
    tensors, weights = [weakref.ref(t) for t in inputs], [weakref.ref(p) for p in model.parameters()]
    with pytest.raises(LTDError, match="cannot be routed") as refused:
        trained(model, inputs) if lazy else learnt(model, inputs)
    del refused, inputs
    assert [t() for t in tensors] == [None] * 2
    del model
    assert [w() for w in weights] == [None] * len(weights)
