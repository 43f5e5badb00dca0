"""What happens between the layers of a route, or to one of them, is refused where it is seen, by its name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

STREAM = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
RESIDUAL = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(2))


class Model(nn.Module):
    """Six layers and a norm; ``between`` acts on the hidden states after the third, ``skipped`` layers are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True) for _ in range(6))
        self.norm = nn.LayerNorm(16)
        self.between: Callable[[Tensor], Tensor] = lambda hidden: hidden
        self.skipped: set[int] = set()

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.blocks):
            if i not in self.skipped:
                hidden = block(hidden)
            if i == 2:
                hidden = self.between(hidden if residual is None else hidden + residual)
        return self.norm(hidden)


def routed(route: tuple[int, int, float | None] = (1, 4, 0.5), **options: Any) -> Model:
    torch.manual_seed(0)
    return ltd_fx.transform(Model().train(), LTDScheduler(6, 12, 10), routes=[route], **options)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a residual": lambda hidden: hidden + 1,
    "in place": lambda hidden: hidden.add_(1),
    "a scaling": lambda hidden: 2 * hidden,
    "another tensor": lambda hidden: hidden.clone(),
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("act", ACTS)
def test_something_done_to_the_hidden_states(act: str, compiled: bool) -> None:
    model = routed()
    run = torch.compile(model, backend="eager") if compiled else model
    run(STREAM)
    if compiled and act == "in place":
        pytest.skip("what is written in place is not seen in a compiled graph")
    model.between = ACTS[act]
    for _ in range(2):
        with pytest.raises(LTDError, match=r"blocks\.3 is not given the hidden states as the layer before"):
            run(STREAM)
    model.between = lambda hidden: hidden
    run(STREAM)
    model.between = ACTS[act]
    run.eval()(STREAM)


def test_views_of_all_of_the_hidden_states_are_the_hidden_states() -> None:
    model = routed()
    expected = model(STREAM)
    model._ltd_rewrite.state.set_forward(0)
    model.between = lambda hidden: hidden.view_as(hidden)
    assert torch.equal(model(STREAM), expected)


SKIPS = {
    "the first": ({1}, r"blocks\.2 is called without the layers before it on its route"),
    "the last": ({4}, r"blocks\.5 is given the hidden states from within a route"),
    "the last two": ({4, 5}, r"norm is given the hidden states from within a route"),
}


@pytest.mark.parametrize("skip", SKIPS)
def test_a_skipped_layer(skip: str) -> None:
    model = routed()
    model(STREAM)
    model.skipped, message = SKIPS[skip]
    for _ in range(2):
        with pytest.raises(LTDError, match=message):
            model(STREAM)
    model.eval()(STREAM)
    model.train().skipped = set()
    model(STREAM)


@pytest.mark.parametrize("call", [lambda model: model(STREAM), lambda model: model(hidden=STREAM)])
def test_a_skipped_layer_of_a_route_that_an_evaluation_showed(call: Callable[[Model], Tensor]) -> None:
    """The modules around it are watched once, whether it is learnt again, as called otherwise, or not."""
    model = routed()
    call(model.eval())
    hooks = len(model.norm._forward_pre_hooks)
    model.train()(STREAM)
    assert len(model.norm._forward_pre_hooks) == hooks == 1
    model.skipped, message = SKIPS["the last two"]
    with pytest.raises(LTDError, match=message):
        model(STREAM)
    ltd_fx.restore(model)
    assert not model.norm._forward_pre_hooks


def test_a_layer_within_the_route_may_be_skipped() -> None:
    model = routed()
    model(STREAM)
    model.skipped = {3}
    model(STREAM).sum().backward()
    rows = ltd_fx.sampled_indices(model)["blocks.1"]
    seen = torch.zeros(2, 12, dtype=torch.bool).scatter(1, rows, True)
    plain = ltd_fx.restore(model)
    given = kept = plain.blocks[0](STREAM)
    for i in (1, 2, 4):
        kept = plain.blocks[i](kept, src_key_padding_mask=~seen)
    expected = plain.norm(plain.blocks[5](torch.where(seen[..., None], kept, given)))
    model = routed()
    model(STREAM)
    model.skipped = {3}
    torch.testing.assert_close(model(STREAM), expected)


@pytest.mark.parametrize("examples", [{}, {"example_inputs": (STREAM,)}])
def test_an_argument_that_comes_later(examples: dict[str, Any]) -> None:
    """A ControlNet's residuals are no argument of the layers: the form of the model's call is all that changes."""
    model = routed(**examples)
    model(STREAM)
    for _ in range(2):
        with pytest.raises(LTDError, match=r"blocks\.3 follows blocks\.2 on a route, but"):
            model(STREAM, RESIDUAL)
    model.eval()(STREAM, RESIDUAL)
    model.train()(STREAM)
    single = routed((1, 2, None))  # a route that ends before the residual
    single(STREAM, residual=RESIDUAL)
