"""Token flow: layers in which tokens meet in attention only are proven, all others are refused, or not known."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ltd_fx
from ltd_fx import LayerPattern, LTDError
from ltd_fx.learn import Call, Sandbox
from ltd_fx.prove.token_flow import judge
from ltd_fx.prove.verdict import Verdict

DIM, HEADS, TOKENS = 16, 2, 64
PATTERN = LayerPattern(hidden="x", aligned={"mask": (2, 3)}, output=None)


class Layer(nn.Module):
    """Attention, and what ``extra`` makes of it: ``extra(layer, x)`` is added to its output."""

    def __init__(self, extra: Callable[[Any, Tensor], Any] = lambda layer, x: 0) -> None:
        super().__init__()
        self.extra = extra
        self.norm = nn.LayerNorm(DIM)
        self.q, self.k, self.v, self.o, self.gate = (nn.Linear(DIM, DIM) for _ in range(5))
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.point = nn.Conv1d(DIM, DIM, 1)
        self.batch_norm = nn.BatchNorm1d(DIM, track_running_stats=False)
        self.lstm = nn.LSTM(DIM, DIM, batch_first=True)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.register_buffer("table", torch.randn(TOKENS, DIM))
        self.register_buffer("calls", torch.zeros(()))

    def attend(self, y: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def weigh(self, y: Tensor, mask: Tensor) -> Tensor:
        """Attention by hand."""
        q, k, v = (f(y).view(*y.shape[:2], HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2) / 4).masked_fill(mask, float("-inf"))
        weights = F.dropout(scores.float().softmax(-1).to(q.dtype), 0.1, self.training)
        return self.o((weights @ v).transpose(1, 2).reshape(y.shape))

    def attend_to(self, x: Tensor, others: Tensor) -> Tensor:
        """Causal attention to another sequence, before the tokens."""
        keys = torch.cat([others, x], 1)
        later = places(x)[:, None] >= places(keys)
        return F.scaled_dot_product_attention(self.q(x), self.k(keys), keys, attn_mask=later)

    def heads(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Attention weights of two heads, mixed into others."""
        q, k = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k))
        return ((q @ k.mT).softmax(-1).permute(0, 2, 3, 1) @ mixed.mT).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.attend(self.norm(x), mask) + self.extra(self, x)


def judged(extra: Callable[[Any, Tensor], Any], *, mask: bool = False, protected: int = 0) -> Verdict:
    layer, x = Layer(extra), torch.randn(2, TOKENS, DIM)
    given = (x, torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)) if mask else (x,)
    return judge(layer, PATTERN, Call("it", given, {}, None), Sandbox(layer), protected=protected)


def places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def distance(x: Tensor) -> Tensor:
    return places(x)[:, None] - places(x)


def square(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)


def stable(scores: Tensor) -> Tensor:
    """Softmax by hand."""
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


@pytest.fixture(autouse=True, scope="module")
def somebodys_operator() -> Iterator[None]:
    with torch.library._scoped_library("ltd_fx_flow", "FRAGMENT") as library:
        library.define("conv1d(Tensor input) -> Tensor")
        library.impl("conv1d", lambda x: x.roll(1, 1), "CompositeExplicitAutograd")
        yield


def mixture(layer: Any, x: Tensor) -> Tensor:
    scores = layer.gate(x)[..., :3].softmax(-1)
    best, which = scores.topk(2, -1)
    weights = torch.zeros_like(scores).scatter(-1, which, best)
    return torch.stack([weights[..., i : i + 1] * f(x) for i, f in enumerate(layer.experts)]).sum(0)


RIGHT: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing more": lambda m, x: 0,
    "causal": lambda m, x: m.attend(x, causal=True),
    "causal by distance": lambda m, x: m.attend(x, distance(x) >= 0),
    "causal by comparison": lambda m, x: m.attend(x, places(x)[:, None] >= places(x)[None]),
    "causal by tril": lambda m, x: m.attend(x, square(x).tril()),
    "others only": lambda m, x: m.attend(x, distance(x) != 0),
    "by hand": lambda m, x: m.weigh(x, square(x).triu(1)),
    "einsum": lambda m, x: torch.einsum("bqk,bkd->bqd", torch.einsum("bqd,bkd->bqk", m.q(x), m.k(x)).softmax(-1), x),
    "gate": lambda m, x: torch.sigmoid(m.gate(x)) * F.gelu(x),
    "statistics of features": lambda m, x: x.pow(2).mean(-1, keepdim=True).rsqrt() * x.var(-1, keepdim=True),
    "dropout": lambda m, x: F.dropout(m.gate(x), 0.1, m.training),
    "convolution by points": lambda m, x: m.point(x.mT).mT,
    "rows of the batch": lambda m, x: m.gate(x.flatten(0, 1)).view_as(x),
    "mixture of experts": mixture,
    "features joined": lambda m, x: torch.cat([x[..., 8:], x[..., :8]], -1),
    "a count of its own": lambda m, x: m.calls.add_(1) is None or 0,
    "on the side": lambda m, x: 0 * int((m.gate(x).mean(1) * x.sum(1)).ndim),
    "weights without a sink": lambda m, x: (
        torch.cat([m.q(x) @ m.k(x).mT, m.gate(x)[..., :1]], -1).softmax(-1)[..., :-1] @ x
    ),
    "heads of weights mixed": lambda m, x: (m.heads(x, x.new_ones(3, 2)) @ x[:, None]).sum(1),
    "features in turn": lambda m, x: x.roll(1, -1).cumsum(-1),
}


@pytest.mark.parametrize("name", RIGHT)
def test_tokens_that_meet_in_attention_are_proven(name: str) -> None:
    assert judged(RIGHT[name]) == Verdict()


def test_an_argument_that_follows_the_tokens_is_a_mask() -> None:
    assert judged(lambda m, x: 0, mask=True) == Verdict()


WRONG: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "convolution": (lambda m, x: m.conv(x.mT).mT, "a convolution over the tokens: conv1d, in .*test_token_flow.py"),
    "only in training": (lambda m, x: x.mean(1, keepdim=True) if m.training else 0, "over all tokens: mean"),
    "sum": (lambda m, x: x.sum(1, keepdim=True), "over all tokens: sum"),
    "largest": (lambda m, x: x.amax(1, keepdim=True), "over all tokens: amax"),
    "roll": (lambda m, x: x.roll(1, 1), "along the tokens: roll"),
    "flip": (lambda m, x: x.flip(1), "along the tokens: flip"),
    "cumulative sum": (lambda m, x: x.cumsum(1), "along the tokens: cumsum"),
    "capacity": (lambda m, x: ((x[..., 0] > 0).cumsum(1) <= 9)[..., None] * x, "along the tokens: cumsum"),
    "choice of experts": (lambda m, x: x.topk(4, 1).values.mean(), "along the tokens: topk"),
    "recurrence": (lambda m, x: m.lstm(x)[0], "neighbouring tokens: lstm"),
    "spectrum": (lambda m, x: torch.fft.fft(x, dim=1).real, "neighbouring tokens: "),
    "batch norm": (lambda m, x: m.batch_norm(x.mT).mT, "normalises over the tokens: batch_norm"),
    "instance norm": (lambda m, x: F.instance_norm(x.mT).mT, "normalises over the tokens: instance_norm"),
    "norm of all": (lambda m, x: F.layer_norm(x.mT, x.shape[1:2]).mT, "normalises over the tokens: layer_norm"),
    "first token": (lambda m, x: x[:, :1], "some of the tokens by their places: slice"),
    "last token": (lambda m, x: x[:, -1:], "some of the tokens by their places: slice"),
    "one token": (lambda m, x: x[:, 3, None], "some of the tokens by their places: select"),
    "halves": (lambda m, x: torch.cat(x.tensor_split((8,), 1)[::-1], 1), "by their places"),
    "pieces": (
        lambda m, x: x.unflatten(1, (x.shape[1] // 8, 8)).mean(2, keepdim=True).mean(),
        "cuts the sequence into pieces: unflatten",
    ),
    "window": (lambda m, x: m.attend(x, (distance(x) >= 0) & (distance(x) < 9)), "positions.*scaled_dot_product"),
    "band": (lambda m, x: m.attend(x, square(x).tril().triu(-15)), "positions.*scaled_dot_product"),
    "window by hand": (lambda m, x: m.weigh(x, distance(x).abs() > 9), "positions among"),
    "linear bias": (lambda m, x: m.attend(x, -distance(x).abs().float()), "positions.*scaled_dot_product"),
    "rotary": (lambda m, x: x * (places(x)[:, None] / torch.ones(DIM)).cos(), "positions among.*: mul"),
    "a table's rows": (lambda m, x: F.embedding(places(x), m.table) + x, "positions among.*: add"),
    "filled with the length": (lambda m, x: x * torch.full_like(x, x.shape[1]), "positions among.*: mul"),
    "norm by the length": (lambda m, x: F.layer_norm(x, (DIM,), x.new_full((DIM,), 1 / x.shape[1])), "positions among"),
    "divided by the length": (lambda m, x: x / x.shape[1], "a number of the length: div"),
    "another way when long": (lambda m, x: x if x.shape[1] > 16 else 2 * x, "only where tokens > 16"),
    "a table so long": (lambda m, x: m.table[: x.shape[1]], "positions among.*: add"),
    "a state": (lambda m, x: m.calls.add_(1) * x, "a state that it changes: mul"),
    "a state before it changes": (
        lambda m, x: x * m.calls + m.calls.add_(x.shape[1]) * 0,
        "a state that it changes: mul",
    ),
    "its input": (lambda m, x: x.mul_(2), "writes into its input"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_else_tokens_do_is_refused(name: str) -> None:
    extra, reason = WRONG[name]
    verdict = judged(extra)
    assert verdict.unknown == ""
    assert re.search(reason, verdict.mixes), verdict.mixes


UNKNOWN: dict[str, Callable[[Any, Tensor], Any]] = {
    "a softmax of weights": lambda m, x: m.heads(x, x.new_ones(3, 2)).sum(1).softmax(-1) @ x,
    "weights and a bias": lambda m, x: ((m.q(x) @ m.k(x).mT).softmax(-1) + 0.1) @ x,
    "by hand, shifted": lambda m, x: stable(m.q(x) @ m.k(x).mT) @ x,
    "experts sort": lambda m, x: x.gather(1, x[..., :1].argsort(1).expand_as(x)),
    "sums by expert": lambda m, x: x.new_zeros(2, 4, DIM).scatter_add(1, (x > 0).long(), x)[:, :1],
    "rows of other tokens": lambda m, x: F.embedding(x.new_zeros(1, x.shape[1], dtype=torch.long), x[0]),
    "sizes by the length": lambda m, x: m.table[:2].repeat(x.shape[1] // 2, 1),
    "weights as bits": lambda m, x: (m.q(x) @ m.k(x).mT).softmax(-1).view(torch.int32).float() @ x,
    "several at once": lambda m, x: torch._foreach_add_([y := x.clone()], [x.roll(1, 1)]) or y,
    "a state of hidden states": lambda m, x: x - m.calls.lerp_(x.mean(), 0.1),
    "an operator of somebody's": lambda m, x: torch.ops.ltd_fx_flow.conv1d(x),
    "places of another sequence": lambda m, x: m.attend_to(x, m.table[:6].expand(x.shape[0], -1, -1)),
    "scaled by the length": lambda m, x: F.scaled_dot_product_attention(x, x, x, scale=1 / x.shape[1]),
    "a number of it": lambda m, x: x * float(x.shape[1]),
    "a square table": lambda m, x: m.attend(x, (m.table @ m.table.mT)[: x.shape[1], : x.shape[1]] > 0),
    "padded and cut": lambda m, x: F.pad(x, (0, 0, 1, 0)),
    "linear attention": lambda m, x: m.q(x) @ (m.k(x).mT @ m.v(x)),
    "attention of features": lambda m, x: ((x.mT @ x).softmax(-1) @ x.mT).mT,
    "values decide": lambda m, x: x if x.sum() > 0 else -x,
    "a number of its values": lambda m, x: x * x.mean().item(),
    "keys and values of other tokens": lambda m, x: F.scaled_dot_product_attention(
        x, torch.cat([m.table[:2].expand(2, -1, -1), x], 1), torch.cat([x, m.table[:2].expand(2, -1, -1)], 1)
    ),
    "weights repeated": lambda m, x: x[..., 0].softmax(-1)[:, None].expand(2, x.shape[1], x.shape[1]).mT @ x,
    "every second key": lambda m, x: F.scaled_dot_product_attention(
        x, *[F.conv1d(x.mT, m.point.weight, stride=2).mT] * 2
    ),
    "features padded": lambda m, x: m.attend(x, (F.pad(x, (0, x.shape[1] - DIM)) > 0)[:, None]),
    "weights times the length": lambda m, x: (torch.zeros(2 * [x.shape[1]]).softmax(-1) * x.shape[1]) @ x,
    "the batch as the sequence": lambda m, x: x.reshape(x.shape[1], x.shape[0], DIM).transpose(0, 1),
}


def test_a_forward_hook_within_a_layer_is_a_part_of_it() -> None:
    layer, x = Layer(), torch.randn(2, TOKENS, DIM)
    layer.norm.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    assert "mean" in judge(layer, PATTERN, Call("it", (x,), {}, None), Sandbox(layer)).mixes


def test_a_forward_hook_that_may_write_unseen_is_not_known() -> None:
    """It returns nothing, so it is not called."""
    layer, x = Layer(), torch.randn(2, TOKENS, DIM)

    def write(module: nn.Module, args: Any, out: Tensor) -> None:
        out[:, 0] = 0

    layer.norm.register_forward_hook(write)
    assert "forward hooks" in judge(layer, PATTERN, Call("it", (x,), {}, None), Sandbox(layer)).unknown


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_not_proven(name: str) -> None:
    assert judged(UNKNOWN[name]).unknown


def test_protected_tokens_may_be_taken_by_their_places() -> None:
    def first(layer: Any, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2], layer.gate(x[:, 2:])], 1) + x[:, 0, None]

    assert judged(first, protected=2) == Verdict()
    assert "by their places" in judged(first, protected=1).mixes


def test_another_sequence_may_be_joined_and_taken_off() -> None:
    def joint(layer: Any, x: Tensor) -> Tensor:
        both = layer.attend(torch.cat([layer.table[:6].expand(x.shape[0], -1, -1), x], 1))
        return both[:, 6:]

    assert judged(joint) == Verdict()
    assert "by their places" in judged(lambda m, x: joint(m, x)[:, :-1].mean()).mixes


class Stack(nn.Module):
    def __init__(self, extra: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(extra) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["only in training", "another way when long", "capacity"])
def test_a_wrong_layer_is_refused(name: str, lazy: bool) -> None:
    """The numerical test sees none of them: it runs in eval mode, on a few tokens."""
    model, x = Stack(WRONG[name][0]).train(), torch.randn(2, TOKENS, DIM)

    def use() -> None:
        ltd_fx.transform(model, layers=Layer, **({} if lazy else {"example_inputs": (x,)}))
        model(x)

    with pytest.raises(LTDError, match=rf"layers\.1 \(Layer\) cannot be routed: .*{WRONG[name][1]}.*leave it out"):
        use()


def test_the_words_of_the_reports() -> None:
    x = torch.randn(2, TOKENS, DIM)
    for extra, word in ((RIGHT["gate"], "proven"), (lambda m, x: torch.erfinv(x.tanh() / 2), "tested")):
        model = ltd_fx.transform(Stack(extra).train(), layers=Layer, example_inputs=(x,))
        assert [site.proof.status for site in ltd_fx.summary(model).sites if site.routed] == [word] * 2
        report = ltd_fx.verify(model, (x,))
        assert report.ok
        assert [site.status for site in report.sites] == [word] * 2
