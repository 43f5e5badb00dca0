"""A model whose ``forward`` is called as a method, past its hooks: routed with new draws, or refused at once."""

import pytest
import torch
from attend import Attention
from torch import Tensor, nn
from toy import Encoder

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

STREAM = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


class Caller(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model.forward(hidden)


class Unknown(nn.Module):
    """A layer of no known class."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Unknown() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_known_layers_draw_anew_in_each_forward(compiled: bool) -> None:
    scheduler = LTDScheduler(4, 12, 10)
    model = ltd_fx.transform(Encoder(4).train(), scheduler)
    called = Caller(model)
    run = torch.compile(called, backend="aot_eager", fullgraph=True) if compiled else called
    drawn = []
    for i in range(4):
        run(STREAM).sum().backward()
        kept = ltd_fx.sampled_indices(model)
        assert list(kept) == ["blocks.1", "blocks.2"]
        assert {rows.shape[1] for rows in kept.values()} == {scheduler.reserved_length}
        drawn += [str(rows) for rows in kept.values()]
        if i % 2:
            scheduler.step()
    assert len(set(drawn)) == 8


def test_what_is_not_learnt_yet_is_refused_at_once() -> None:
    model = ltd_fx.transform(Stack().train())
    with pytest.raises(LTDError, match=r"Unknown is called in training.*example_inputs"):
        Caller(model)(STREAM)
    Caller(model).eval()(STREAM)
    model.train()(STREAM)  # the model itself: learnt
    assert Caller(model)(STREAM).shape == STREAM.shape
    assert list(ltd_fx.sampled_indices(model)) == ["blocks.1", "blocks.2"]


def test_learnt_from_examples() -> None:
    model = ltd_fx.transform(Stack().train(), example_inputs=(STREAM,))
    drawn = set()
    for _ in range(3):
        Caller(model)(STREAM)
        drawn.add(str(ltd_fx.sampled_indices(model)))
    assert len(drawn) == 3
