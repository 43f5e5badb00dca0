"""The eager path: one draw for all layers, and rows taken and put by their numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ltd_fx
from ltd_fx import LayerPattern, LTDError, LTDScheduler
from ltd_fx.runtime import eager
from ltd_fx.runtime.eager import Plain, merge, plain_draws, split

B, S, D = 2, 6, 4


class Attention(nn.Module):
    """Attends by a mask, with positions added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / 2)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        x = hidden @ self.weight if table is None else hidden @ self.weight + table
        q = x[:, None]  # one head
        return hidden + nn.functional.scaled_dot_product_attention(q, q, q, mask)[:, 0]


class Net(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(depth))

    def forward(self, hidden: Tensor, mask: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden, mask, table)
        return hidden


class Counted(TorchDispatchMode):
    """Counts the calls of an operator of ltd_fx."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = f"ltd_fx::{name}", 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name == self.name
        return func(*args, **(kwargs or {}))


def net(scheduler: LTDScheduler | None = None, **options: Any) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(B, S, D)
    ltd_fx.transform(model, scheduler, layers=Attention, **options, example_inputs=(x,))
    return model, x


@pytest.mark.parametrize(("options", "draws"), [({}, 1), ({"keep": {"layers.2": 0.7}}, 2), ({"sampling": "shared"}, 1)])
def test_layers_of_one_length_draw_in_one_operator(options: Any, draws: int) -> None:
    model, x = net(**options)
    for _ in range(2):
        with Counted("sample_tokens") as counted:
            model(x)
        assert counted.count == draws


def test_each_layer_draws_as_it_would_alone() -> None:
    """Also where lengths differ between forwards, and after a forward whose draws were repeated."""
    scheduler = LTDScheduler(2, S, 3)
    model, x = net(scheduler)
    for _ in range(2):
        for _ in range(2):
            model(x)
            state = model.layers[1]._ltd_site.state
            for i, rows in enumerate(ltd_fx.sampled_indices(model).values(), 1):
                site = model.layers[i]._ltd_site
                alone = torch.ops.ltd_fx.sample_tokens(state.key, site.first, x, B, S, rows.shape[1])
                assert torch.equal(rows, alone)
                assert torch.equal(state.together.draw(site, state, x, B, S, rows.shape[1], True)[0], alone)
        with ltd_fx.same_draws(model):
            model(x)
        scheduler.step()


def plain_of(indices: Tensor, batch: int, seq_len: int, batch_first: bool) -> tuple[Tensor, Plain]:
    return plain_draws(indices[None], batch, seq_len, batch_first)[0]


INDICES = [
    torch.tensor([[0, 2, 3], [1, 2, 5]]),
    torch.tensor([[4]]),  # one draw for the batch, of one token
    torch.tensor([[0, 1, 2, 3, 5], [0, 1, 3, 4, 5]]),
]


@pytest.mark.parametrize("indices", INDICES, ids=lambda i: str(tuple(i.shape)))
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("small", [True, False])
def test_kept_rows_are_split_off_and_merged_again(
    indices: Tensor, batch_first: bool, contiguous: bool, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "_SMALL", B * S * D if small else 0)
    shape = (B, S, D) if batch_first else (S, B, D)
    hidden = torch.randn(*shape, dtype=torch.float64)
    hidden = hidden if contiguous else hidden.transpose(1, 2).contiguous().transpose(1, 2)
    hidden.requires_grad_()
    indices, plain = plain_of(indices, B, S, batch_first)
    rest, kept = split(hidden, indices, plain)
    every = indices.expand(B, -1)
    streams, outputs = (t if batch_first else t.transpose(0, 1) for t in (hidden, kept))
    wanted = torch.stack([streams[b][every[b]] for b in range(B)])
    assert torch.equal(outputs, wanted)
    merged = merge(rest, indices, 2 * kept, plain)
    scale = torch.ones(B, S, 1, dtype=torch.float64).scatter(1, every[..., None], 2.0)
    assert torch.equal(merged, hidden * (scale if batch_first else scale.transpose(0, 1)))

    def route(hidden: Tensor, weight: Tensor) -> Tensor:
        rest, kept = split(hidden, indices, plain)
        return merge(rest, indices, (kept * weight).tanh(), plain)

    weight = torch.randn(D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(route, (hidden, weight))
    assert torch.autograd.gradgradcheck(route, (hidden, weight))


@pytest.mark.parametrize("mask_of", [lambda: torch.zeros(1, 1, S, S), lambda: torch.zeros(B, 1, 1, S)])
def test_gradients_reach_masks_and_tables(mask_of: Any) -> None:
    """A bias that is learnt gets the gradient of the rows that were kept."""
    torch.manual_seed(0)
    ltd_fx.register_pattern(Attention, LayerPattern(hidden="hidden", aligned={"mask": (2, 3), "table": (1,)}))
    model, x = Net(3), torch.randn(B, S, D)
    mask, table = mask_of().requires_grad_(), torch.randn(1, S, D, requires_grad=True)
    ltd_fx.transform(model, example_inputs=(x, mask, table))
    hidden = model.layers[0](x, mask, table)
    ours = torch.autograd.grad(model(x, mask, table).square().sum(), (mask, table))
    rows = ltd_fx.sampled_indices(model)["layers.1"]
    first, dense, last = Attention(), Attention(), Attention()
    for mine, routed in zip((first, dense, last), model.layers, strict=True):
        mine.weight = routed.weight
    hidden = first(x, mask, table)
    each = []
    for b in range(B):
        m = mask[b % len(mask)]
        m = m[:, rows[b]] if m.shape[1] > 1 else m
        kept = dense(hidden[b : b + 1, rows[b]], m[None][..., rows[b]], table[:, rows[b]])
        each.append(hidden[b].index_copy(0, rows[b], kept[0]))
    theirs = torch.autograd.grad(last(torch.stack(each), mask, table).square().sum(), (mask, table))
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)


def test_an_argument_of_another_shape_is_checked_again() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(B, S, D)
    mask = torch.zeros(B, 1, S, S)
    ltd_fx.transform(model, example_inputs=(x, mask))
    model(x, mask)
    with pytest.raises(LTDError, match=r"argument 'mask' of shape \(2, 1, 6, 5\) must have the sequence length 6"):
        model.layers[2](x, mask[..., :-1])
