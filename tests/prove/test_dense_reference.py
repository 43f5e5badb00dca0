"""The reference that proofs rest on, held to layers that take a mask and are given one without the dropped keys."""

from collections.abc import Callable

import pytest
import torch
from attend import Attention, block, causal, rotate, tables
from torch import Tensor, nn
from torch.nn import functional as F

from ltd_fx.prove.reference import NotVerifiableError, dense_reference

B, S, D, H = 3, 10, 16, 4
PADDING = torch.ones(B, S, dtype=torch.bool)
PADDING[1, :3] = PADDING[2, -4:] = False
EMPTY = PADDING.clone()
EMPTY[0] = False


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float32).min)


class Single(nn.Module):
    def __init__(self, mask: Tensor | None = None, kind: type[Attention] = Attention) -> None:
        super().__init__()
        self.attention, self.mask = kind(D, H), mask

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, self.mask)


class Twice(Single):
    """Two attentions, so that the second one's keys have seen what the first one's queries saw."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__(mask)
        self.second = Attention(D, H)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.second(x.tanh(), self.mask)


class Parallel(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, self.mask) + self.second(x, self.mask)


class Crossing(Twice):
    """The encoder's S keys are nobody's to drop."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__(mask)
        self.encoded = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        x = Single.forward(self, x)
        return x + self.second(x, additive(PADDING[:, None, None]), context=self.encoded)


class CrossingFirst(Crossing):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.second(x, context=self.encoded)
        return x + self.attention(x, self.mask)


class Rotary(Single):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, self.mask, tables(torch.arange(S, dtype=torch.float64), D // H))


class InFloat32(Attention):
    def scores(self, q: Tensor, k: Tensor, mask: Tensor | None, cross: bool = False) -> Tensor:
        return super().scores(q, k, mask, cross).to(torch.float32)


class LessMaximum(Attention):
    def scores(self, q: Tensor, k: Tensor, mask: Tensor | None, cross: bool = False) -> Tensor:
        scores = super().scores(q, k, mask, cross)
        return scores - scores.amax(-1, keepdim=True)


class Sinks(Attention):
    """A learnt score for each head beside those of the keys; the row's maximum is subtracted, as in gpt-oss."""

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: None = None, context: None = None) -> Tensor:
        q, k, v = (self._split(f(x)) for f in (self.q, self.k, self.v))
        sinks = self.q.bias[: self.heads].view(1, -1, 1, 1).expand(*q.shape[:3], 1)
        scores = torch.cat([self.scores(q, k, mask), sinks], -1)
        weights = (scores - scores.amax(-1, keepdim=True)).softmax(-1)[..., :-1]
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Fused(Attention):
    """With fused attention, and two query heads to a key head."""

    def forward(self, x: Tensor, mask: Tensor | None = None, rope: None = None, context: None = None) -> Tensor:
        q, k, v = (self._split(f(x)) for f in (self.q, self.k, self.v))
        k, v = k[:, :2], v[:, :2]
        if self.blocked is not None:
            seen = ~self.blocked[:, None, None].expand(-1, 1, x.shape[1], -1)
            mask = seen if mask is None else mask & seen
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


class Latents(Single):
    """Tokens see each other through latents only, whose attention to dropped tokens is to be blocked."""

    def forward(self, x: Tensor) -> Tensor:
        latents = self.attention.o.weight[:3].expand(x.shape[0], -1, -1)
        blocked, self.attention.blocked = self.attention.blocked, None
        mask = None if blocked is None else ~blocked[:, None, None]
        latents = latents + self.attention(latents, mask, context=x)
        x = x + self.attention(x, context=latents)
        self.attention.blocked = blocked
        return x


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "no mask": Single,
    "causal": lambda: Single(causal(B, S)),
    "causal, padded": lambda: Single(additive(causal(B, S, PADDING))),
    "a sequence of padding": lambda: Single(additive(EMPTY[:, None, None])),
    "a sequence of padding, causal": lambda: Single(causal(B, S, EMPTY)),
    "a sequence of padding, fused": lambda: Single(causal(B, S, EMPTY), Fused),
    "two in a row": Twice,
    "two in a row, causal": lambda: Twice(causal(B, S)),
    "two side by side": Parallel,
    "cross attention": lambda: Crossing(causal(B, S)),
    "cross attention first": lambda: CrossingFirst(causal(B, S)),
    "rotary": lambda: Rotary(causal(B, S)),
    "softmax in float32": lambda: Single(additive(causal(B, S)), InFloat32),
    "less the row's maximum": lambda: Single(None, LessMaximum),
    "less the row's maximum, causal": lambda: Single(additive(causal(B, S)), LessMaximum),
    "sinks": lambda: Single(None, Sinks),
    "sinks, causal": lambda: Single(additive(causal(B, S)), Sinks),
    "fused and grouped": lambda: Single(None, Fused),
    "fused and grouped, causal": lambda: Single(causal(B, S), Fused),
    "latents": Latents,
}


def setting(name: str, keep: int, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    layer = LAYERS[name]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    kept = torch.zeros(B, S, dtype=torch.bool).scatter(1, torch.rand(B, S).argsort(1)[:, :keep], True)
    return layer, torch.randn(B, S, D, dtype=torch.float64), kept


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("keep", [2, 5, S - 1])
def test_the_reference_is_the_layer_with_dropped_keys_masked(name: str, keep: int) -> None:
    for seed in range(3):
        layer, hidden, kept = setting(name, keep, seed)
        reference = dense_reference(lambda x, layer=layer: [layer(x)], hidden, kept)
        dense = layer(hidden)
        masked = block(layer, kept)(hidden)
        assert not torch.allclose(reference.unblocked[0][kept], reference.outputs[0][kept])
        seen = kept & ~reference.blind
        tolerance = 1e-5 if "float32" in name else 1e-12
        for ours in (reference.outputs[0], reference.other[0]):
            torch.testing.assert_close(ours[seen], masked[seen], rtol=0, atol=tolerance)
        visible = torch.ones(B, 1, S, S, dtype=torch.bool) if layer.mask is None else layer.mask.expand(B, 1, S, S)
        visible = visible if visible.dtype == torch.bool else visible == 0
        assert torch.equal(reference.blind & kept, kept & ~(visible & kept[:, None, None]).any(-1)[:, 0])
        assert seen.any()
        assert (dense[kept] - masked[kept]).abs().max() > 1e-3  # the dropped keys did matter


def test_all_tokens_kept_and_nothing_to_block() -> None:
    layer, hidden, kept = setting("two in a row", S, 0)
    reference = dense_reference(lambda x: [layer(x)], hidden, kept)
    torch.testing.assert_close(reference.outputs[0], layer(hidden), rtol=0, atol=1e-12)
    tokenwise = nn.Linear(D, D).double()
    reference = dense_reference(lambda x: [tokenwise(x)], hidden, kept)
    assert torch.equal(reference.unblocked[0], reference.outputs[0])


def test_too_many_softmaxes_or_a_number_that_depends_on_values_cannot_be_blocked() -> None:
    _, hidden, kept = setting("no mask", 5, 0)

    def many(x: Tensor) -> list[Tensor]:
        for _ in range(20):
            x = (x @ x.mT / 100).softmax(-1) @ x
        return [x]

    def varying(x: Tensor) -> list[Tensor]:
        return many(x)[:1] if x.equal(hidden) else [(x @ x.mT).softmax(-1) @ x]

    for call in (many, varying):
        with pytest.raises(NotVerifiableError, match="softmaxes on inputs of the same shapes"):
            dense_reference(call, hidden, kept)


def test_further_outputs_are_kept_in_order() -> None:
    layer, hidden, kept = setting("no mask", 5, 0)
    second, mean = rotate(hidden[:, None], *tables(torch.arange(S), D))[:, 0], hidden.new_ones(2)
    reference = dense_reference(lambda x: [layer(x), second, mean], hidden, kept)
    assert [t.shape for t in reference.outputs] == [hidden.shape, second.shape, mean.shape]
    torch.testing.assert_close(reference.outputs[1:], [second, mean])
