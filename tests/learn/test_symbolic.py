"""Patterns read off one forward at symbolic sizes: sizes that are equal by chance are not taken for one another."""

from typing import Any

import pytest
import torch
from attend import Attention, tables
from torch import Tensor, nn

import ltd_fx
from ltd_fx import Aligned, LTDError

HEADS = 2


class Joint(nn.Module):
    """Image tokens that attend to themselves and to a text's, with one table of positions for both."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention, self.scale = Attention(dim, HEADS), nn.Linear(dim, dim)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
        both = self.attention(torch.cat([text, image], 1), rope=rope) * self.scale(condition)[:, None]
        return image + both[:, text.shape[1] :], text + both[:, : text.shape[1]]


class Diffusion(nn.Module):
    """An image ``[B, C, H, W]`` of ``H * W`` tokens: no size of its input is their number."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.inputs = dim, nn.Linear(3, dim)
        self.layers = nn.ModuleList(Joint(dim) for _ in range(4))

    def forward(self, pixels: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        image = self.inputs(pixels.flatten(2).mT)
        rope = tables(torch.arange(text.shape[1] + image.shape[1]), self.dim // HEADS)
        for layer in self.layers:
            image, text = layer(image, text, condition, rope)
        return image


class Placed(nn.Module):
    """Takes the places of words and image tokens too, whose numbers only add up to those of both streams."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.layers = dim, nn.ModuleList(Joint(dim) for _ in range(4))

    def forward(self, image: Tensor, text: Tensor, condition: Tensor, words: Tensor, places: Tensor) -> Tensor:
        rope = tables(torch.cat([words, places]), self.dim // HEADS)
        for layer in self.layers:
            image, text = layer(image, text, condition, rope)
        return image


def inputs(batch: int, side: int, words: int, dim: int) -> dict[str, Tensor]:
    shapes = {"pixels": (batch, 3, side, side), "text": (batch, words, dim), "condition": (batch, dim)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def aligned(model: nn.Module) -> Any:
    return {str(site.aligned) for site in ltd_fx.summary(model).sites if site.routed}


def learnt(model: nn.Module) -> Any:
    return {site.proof.learnt for site in ltd_fx.summary(model).sites if site.proof is not None}


# (batch, side, words, dim): all apart; as many tokens as words, as the width, as a head is wide, as sequences; and all.
COINCIDENCES = [(2, 4, 6, 24), (2, 4, 16, 24), (2, 4, 6, 16), (2, 4, 6, 32), (16, 4, 6, 24), (16, 4, 16, 16)]


@pytest.mark.parametrize("sizes", COINCIDENCES)
def test_sizes_that_are_equal_by_chance(sizes: tuple[int, ...]) -> None:
    model = Diffusion(sizes[-1]).train()
    ltd_fx.transform(model, example_inputs=inputs(*sizes))
    assert aligned(model) == {str({"rope": Aligned((0,), None, None)})}
    assert learnt(model) == {"symbolic sizes"}
    model(**inputs(*sizes)).sum().backward()
    assert ltd_fx.verify(model, inputs(*sizes)).ok


def test_what_was_learnt_serves_other_numbers_of_words() -> None:
    model = Diffusion(16).train()
    ltd_fx.transform(model, example_inputs=inputs(2, 4, 6, 16), sampling="shared")
    for side, words in ((4, 9), (6, 4), (4, 16)):
        report = ltd_fx.verify(model, inputs(2, side, words, 16))
        assert report.ok, str(report)


@pytest.mark.slow
def test_it_compiles_for_other_numbers_of_words() -> None:
    model = Diffusion(16).train()
    scheduler = ltd_fx.LTDScheduler(5, 16, 10, kind="constant")
    ltd_fx.transform(model, scheduler, example_inputs=inputs(2, 4, 6, 16))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for words in (6, 9, 16):
        given = inputs(2, 4, words, 16)
        torch.manual_seed(0)
        scheduler.set_step(0)
        expected = model(**given)
        scheduler.set_step(0)
        assert torch.equal(compiled(**given), expected)


class Rotary(nn.Module):
    """A layer whose first tokens have no position, and no row in the table."""

    def __init__(self, dim: int, first: int) -> None:
        super().__init__()
        self.attention, self.first = Attention(dim, HEADS), first

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        full = torch.cat([torch.ones(self.first, rope.shape[1]), rope])
        return x + self.attention(x, rope=(full, full))


class Fixed(nn.Module):
    """A model of one length: its positions are a parameter."""

    def __init__(self, tokens: int, dim: int, first: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(tokens, dim))
        self.register_buffer("rope", torch.randn(tokens - first, dim // HEADS))
        self.layers = nn.ModuleList(Rotary(dim, first) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for layer in self.layers:
            x = layer(x, self.rope)
        return x


# The table is [16, 24] for 21 tokens: three columns more than tokens, five rows fewer. Then a square one.
@pytest.mark.parametrize(("tokens", "dim"), [(21, 48), (21, 32), (29, 48)])
def test_a_model_of_one_length(tokens: int, dim: int) -> None:
    model = Fixed(tokens, dim, 5).train()
    ltd_fx.transform(model, example_inputs=(torch.randn(2, tokens, dim),), protect=5, sampling="shared")
    assert aligned(model) == {str({"rope": Aligned((0,), None, -5)})}
    assert learnt(model) == {"one length"}
    model(torch.randn(2, tokens, dim)).sum().backward()


class Cached(nn.Module):
    """Looks its table up by the length, which a symbol cannot be looked up by."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.known = nn.ModuleList(Rotary(16, 0) for _ in range(4)), dict[int, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        table = self.known.setdefault(x.shape[1], tables(torch.arange(x.shape[1]), 8)[0])
        for layer in self.layers:
            x = layer(x, table)
        return x


def test_a_model_that_knows_no_symbols_is_learnt_from_other_lengths() -> None:
    model = Cached().train()
    ltd_fx.transform(model, example_inputs=(torch.randn(2, 16, 16),), sampling="shared")
    assert aligned(model) == {str({"rope": (0,)})}
    assert learnt(model) == {"other sizes"}


class TwoRows(Rotary):
    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        return super().forward(x, rope[::2])


def test_a_table_of_two_rows_a_token_is_refused() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(TwoRows(16, 0) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            table = tables(torch.arange(2 * x.shape[1]), 8)[0]
            for layer in self.layers:
                x = layer(x, table)
            return x

    with pytest.raises(LTDError, match=r"layers\.1.*'rope'.*changes with the sequence length"):
        ltd_fx.transform(Doubled().train(), example_inputs=(torch.randn(2, 16, 16),))


@pytest.mark.parametrize("words", [6, 16])
def test_numbers_that_only_add_up_to_the_tokens(words: int) -> None:
    def given(side: int, words: int) -> dict[str, Tensor]:
        shapes = {"image": (2, side * side, 24), "text": (2, words, 24), "condition": (2, 24)}
        numbers = {"words": torch.arange(words), "places": torch.arange(side * side)}
        return {name: torch.randn(shape) for name, shape in shapes.items()} | numbers

    model = Placed(24).train()
    ltd_fx.transform(model, example_inputs=given(4, words), sampling="shared")
    assert aligned(model) == {str({"rope": Aligned((0,), None, None)})}
    assert learnt(model) == {"symbolic sizes"}
    for side, others in ((4, 16), (5, 7)):
        model(**given(side, others)).sum().backward()
        assert ltd_fx.verify(model, given(side, others)).ok
