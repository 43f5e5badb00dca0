"""``transform(keep_mask=...)``: a batch's tokens that every draw keeps, however many they are."""

from typing import Any

import pytest
import torch
from attend import Attention, causal
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

B, S = 3, 24


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.attention(x, mask)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor, wanted: Any = None, padding: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, causal(x.shape[0], x.shape[1], padding))
        return x


def net(least: int = 6, **options: Any) -> Any:
    return ltd_fx.transform(Net().train(), LTDScheduler(least, S, 50), keep_mask="wanted", **options)


def stream(seq_len: int = S) -> Tensor:
    return torch.randn(B, seq_len, 16, generator=torch.Generator().manual_seed(0))


def wanted(*counts: int, seq_len: int = S) -> Tensor:
    """``[B, S]`` bool with so many tokens in each sequence, here and there."""
    order = torch.rand(B, seq_len, generator=torch.Generator().manual_seed(sum(counts))).argsort(1).argsort(1)
    return order < torch.tensor(counts)[:, None]


def kept(model: Any, seq_len: int = S) -> list[Tensor]:
    draws = ltd_fx.sampled_indices(model).values()
    return [torch.zeros(B, seq_len, dtype=torch.bool).scatter(1, rows, True) for rows in draws]


@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 6, 0), (1, 13, 9), (S, 1, 1)])
def test_every_draw_keeps_them_and_the_longest_decides(counts: tuple[int, ...]) -> None:
    model = net()
    for _ in range(5):
        model(stream(), wanted(*counts))
        for tokens in kept(model):
            assert tokens[wanted(*counts)].all()
            assert (tokens.sum(1) == max(6, *counts)).all()


def test_the_rest_is_left_to_chance() -> None:
    model, forced, count, draws = net(8), wanted(2, 4, 8), torch.zeros(B, S), 300
    for _ in range(draws):
        model(stream(), forced)
        count += kept(model)[0]
    for row, mask, least in zip(count, forced, (2, 4, 8), strict=True):
        assert (row[mask] == draws).all()
        share = (8 - least) / (S - least)
        assert ((row[~mask] / draws - share).abs() < 5 * (share * (1 - share) / draws) ** 0.5 + 1e-9).all()


def test_values_are_those_of_the_blocked_dense_layer() -> None:
    plain = Net()
    model = net()
    ours = []
    model.layers[1].register_forward_hook(lambda _, args, out: ours.append((args[0], out)))
    model(stream(), wanted(1, 13, 9))
    (hidden, out), tokens = ours[-1], kept(model)[0]
    layer = plain.layers[1]
    layer.attention.blocked = ~tokens
    expected = torch.where(tokens[..., None], layer(hidden, causal(B, S)), hidden)
    torch.testing.assert_close(out, expected)


@pytest.mark.slow
def test_one_graph_whatever_their_number_and_none_of_them() -> None:
    model, twin = net(), net()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    for counts in ((1, 2, 3), (9, 1, 1), (2, 20, 3), (7, 7, 7), (0, 0, 0)):
        torch.testing.assert_close(step(stream(), wanted(*counts)), twin(stream(), wanted(*counts)))
    assert counter.frame_count == 1
    step(stream(), wanted(S, 0, 0))  # all tokens: dense
    assert counter.frame_count == 2


@pytest.mark.parametrize("scheduler", [None, LTDScheduler(4, 16, 50, relative=True)], ids=["none", "relative"])
def test_without_a_length_of_its_own(scheduler: Any) -> None:
    model = ltd_fx.transform(Net().train(), scheduler, keep_mask="wanted")
    share = 12 if scheduler is None else 6
    for counts, expected in (((1, 2, 3), share), ((1, 15, 3), 15), ((0, 0, 0), share)):
        model(stream(), wanted(*counts))
        assert [rows.sum(1).tolist() for rows in kept(model)] == [[expected] * B] * 2
    model(stream())  # no mask: the schedule's own
    assert [rows.sum(1).tolist() for rows in kept(model)] == [[share] * B] * 2


def test_padding_is_dropped_before_and_protected_tokens_are_kept_too() -> None:
    padding = torch.ones(B, S)
    padding[1, 10:] = 0
    model = net(10, protect="padding")
    model(stream(), wanted(3, 5, 2), padding)
    for tokens in kept(model):
        assert tokens[wanted(3, 5, 2)].all()
        rest = tokens[1] & ~wanted(3, 5, 2)[1]
        assert rest[10:].sum() == 0
    model = net(6, protect=2)
    forced = wanted(9, 1, 0)
    model(stream(), forced)
    both = forced | (torch.arange(S) < 2)
    for tokens in kept(model):
        assert tokens[both].all()
        assert (tokens.sum(1) == both.sum(1).max()).all()


def test_a_shared_draw_keeps_those_of_any_sequence() -> None:
    model = net(sampling="shared")
    forced = wanted(5, 6, 4)
    model(stream(), forced)
    for tokens in kept(model):
        assert tokens[:, forced.any(0)].all()
        assert (tokens.sum(1) == forced.any(0).sum()).all()


@pytest.mark.parametrize(
    "given",
    [wanted(1, 2, 3).long(), wanted(1, 2, 3)[0], {"mask": wanted(1, 2, 3)}],
    ids=["numbers", "1-D", "dict"],
)
def test_what_is_no_mask_is_refused(given: Any) -> None:
    with pytest.raises(LTDError, match=r"keep_mask='wanted' names .*must be bool \[B, S\]"):
        net()(stream(), given)


def test_refusals() -> None:
    with pytest.raises(LTDError, match="keep_mask='other' is not an argument of the model's forward"):
        ltd_fx.transform(Net(), keep_mask="other")
    model = Net()
    with pytest.raises(LTDError, match="keep_mask must be the name"):
        ltd_fx.transform(model, keep_mask=wanted(1, 2, 3))  # type: ignore[arg-type]
    assert not ltd_fx.is_transformed(model)
    with pytest.raises(LTDError, match=r"keep_mask='wanted' names a mask of 2 sequences, but hidden states have 3"):
        net()(stream(), wanted(1, 2, 3)[:2])
    routed = net(example_inputs=(stream(), wanted(1, 2, 3)))
    with pytest.raises(LTDError, match=r"not by a call of the Net.*keep_mask='wanted'"):
        routed.layers[1](stream(), causal(B, S))


def test_within_a_larger_compiled_program_it_says_what_to_compile() -> None:
    model = net(example_inputs=(stream(), wanted(1, 2, 3)))
    step = torch.compile(lambda x, mask: model(x, mask).sum(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile the model itself"):
        step(stream(), wanted(1, 2, 3))
