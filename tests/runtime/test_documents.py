"""``sampling="per_document"``: each document of packed rows keeps its share of the tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attend import Attention
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.ops import draw_key
from ltd_fx.runtime.documents import documents_of, share_out, starts_of

LENGTHS = [6, 1, 3, 14]
S = sum(LENGTHS)
NUMBER = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(16)

    def forward(self, x: Tensor, position_ids: Any = None, seq_idx: Any = None, cu_seq_lens_q: Any = None) -> Tensor:
        return x + self.attention(x)


class Net(nn.Module):
    """Passes on what tells documents apart; its layers do without."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor, position_ids: Any = None, seq_idx: Any = None, cu_seq_lens_q: Any = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def numbers(draw: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(draw_key(3, draw)), torch.tensor(2)


def ends(rows: int) -> Tensor:
    return torch.tensor([0, *LENGTHS * rows]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", torch.cat([torch.arange(n) for n in LENGTHS])[None] + 2),
        ("seq_idx", NUMBER[None].to(torch.int32)),
        ("cu_seq_lens_q", ends(2)),
        ("cu_seqlens", ends(2)),
    ],
)
def test_what_tells_documents_apart(name: str, value: Tensor) -> None:
    found = documents_of((name, value), 2, S)
    assert found is not None
    assert all((row.diff() == NUMBER.diff()).all() for row in found)
    if name in ("position_ids", "seq_idx"):
        assert documents_of((name, value), 2, S + 1) is None  # of another stack
    if name == "position_ids":
        assert starts_of(value).tolist() == ends(1)[:-1].tolist()


@pytest.mark.parametrize("keep", [1, 7, 12, S - 1])
def test_shares_are_exact_but_for_rounding(keep: int) -> None:
    counts = torch.zeros(len(LENGTHS))
    draws = 400
    for draw in range(draws):
        chosen = share_out(*numbers(draw), NUMBER.expand(3, S), keep)
        assert (chosen.sum(1) == keep).all()
        each = torch.stack([chosen[:, number == NUMBER].sum(1) for number in range(len(LENGTHS))], 1)
        exact = torch.tensor(LENGTHS) * keep / S
        assert ((each >= exact.floor()) & (each <= exact.ceil())).all()
        counts += each.sum(0)
    deviation = (counts / (3 * draws) - torch.tensor(LENGTHS) * keep / S).abs()
    assert deviation.max() < 4 * 0.5 / (3 * draws) ** 0.5  # of what is one or the other, at most 1/2


def test_a_share_that_is_a_number_is_kept_to() -> None:
    chosen = share_out(*numbers(0), torch.arange(3).repeat_interleave(8).expand(5, 24), 12)
    assert (chosen.unflatten(1, (3, 8)).sum(2) == 4).all()


def test_draws_are_uniform_within_a_document() -> None:
    """Tokens of a document, and its pairs of neighbours, by Pearson's chi-square."""
    keep, draws = 12, 3000
    chosen = torch.cat([share_out(*numbers(draw), NUMBER.expand(2, S), keep) for draw in range(draws)])
    inside = chosen[:, NUMBER == 3].double()  # 7 of 14
    assert (inside.sum(1) == 7).all()
    singles = inside.sum(0)
    expected = len(inside) / 2
    # Without replacement, counts vary by (n - 1) / n less than independent ones.
    statistic = ((singles - expected) ** 2 / (expected / 2)).sum() * 13 / 14
    assert statistic < 34.5  # the 0.999 quantile at 13 degrees of freedom
    pairs = (inside[:, :-1] * inside[:, 1:]).mean(0)
    assert (pairs - 7 * 6 / (14 * 13)).abs().max() < 5 * (0.23 * 0.77 / len(inside)) ** 0.5


@pytest.mark.parametrize("name", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_through_a_model(name: str) -> None:
    given = {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None], "seq_idx": NUMBER[None]}
    given["cu_seq_lens_q"] = ends(2)
    model = ltd_fx.transform(Net().train(), LTDScheduler(12, 48, 9), sampling="per_document")
    model(torch.randn(2, S, 16), **{name: given[name]})
    draws = ltd_fx.sampled_indices(model)
    assert len({str(rows) for rows in draws.values()}) == 2
    for rows in draws.values():
        each = torch.stack([(NUMBER[rows] == number).sum(1) for number in range(4)], 1)
        assert (each[:, [0, 3]] == torch.tensor([3, 7])).all()
        assert (each.sum(1) == 12).all()
        assert not torch.equal(rows[0], rows[1])


@pytest.mark.slow
def test_one_graph_for_any_documents_and_length() -> None:
    scheduler = LTDScheduler(6, 2 * S, 9)
    model = ltd_fx.transform(Net().train(), scheduler, sampling="per_document")
    twin = ltd_fx.transform(Net().train(), LTDScheduler(6, 2 * S, 9), sampling="per_document")
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, S, 16)
    for lengths in (LENGTHS, [S], [1] * S):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        torch.testing.assert_close(step(x, positions), twin(x, positions))
        scheduler.step()
        twin._ltd_rewrite.state.scheduler.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "per_document", "protect": 1}, "per_document.*protect or keep_mask"),
        ({"sampling": "per_document", "keep_mask": "seq_idx"}, "per_document.*protect or keep_mask"),
        ({"sampling": "by_document"}, "sampling must be one of per_sample, shared, per_document"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    model = Net()
    with pytest.raises(LTDError, match=message):
        ltd_fx.transform(model, **options)
    assert not ltd_fx.is_transformed(model)
    if "protect" in options:
        with pytest.raises(LTDError, match=r"backend.*per_document.*ltd_fx\.transform"):
            ltd_fx.backend(sampling="per_document")


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_a_forward_that_tells_no_documents_apart_is_refused(wrap: Callable[..., Any]) -> None:
    run = wrap(ltd_fx.transform(Net().train(), sampling="per_document"))
    with pytest.raises(LTDError, match="documents apart by the model's argument position_ids, seq_idx or cu_seq_lens"):
        run(torch.randn(2, S, 16))
