"""``transform(..., protect=...)``: tokens that no draw drops, or drops last."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from conftest import loss_of
from scipy import stats
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy import PATTERN, Block, Encoder, Net, snapshot

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

P = 1e-3  # the smallest p-value accepted; draws are fixed by their keys, so it is the same in every run
LENGTH = 12
# the real tokens of each row: left padding, right padding, none, all, one, scattered
ROWS = [range(7, 12), range(4), range(0), range(12), range(5, 6), (0, 3, 4, 8, 9, 11)]
MASK = torch.stack(
    [torch.zeros(LENGTH, dtype=torch.long).index_fill(0, torch.tensor([*row]).long(), 1) for row in ROWS]
)
PROTECTED: dict[str, Any] = {"prefix": 3, "predicate": lambda positions: positions % 5 == 0, "mask": "scale"}


@pytest.fixture(autouse=True)
def _known_block() -> None:
    ltd_fx.register_pattern(Block, PATTERN)


def net(protect: Any, keep: int, max_length: int = LENGTH, **options: Any) -> Net:
    """Its argument `scale` `[B, S]` is the attention mask."""
    torch.manual_seed(0)
    scheduler = LTDScheduler(keep, max_length, 9, kind="constant")
    return ltd_fx.transform(Net(), scheduler, protect=protect, **options)


def stream_of(batch: int = len(ROWS), seq_len: int = LENGTH) -> Tensor:
    return torch.randn(batch, seq_len, 8, generator=torch.Generator().manual_seed(1))


def kept_by(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """``[B, S]`` bool per routed layer: the rows that it changed in one forward, and that ``sampled_indices`` tells."""
    kept: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, out, name=name: kept.update({name: (out[0] != inputs[0]).any(-1)})
        )
        for name in ("blocks.1", "blocks.2")
    ]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    replayed = ltd_fx.sampled_indices(model)
    assert replayed.keys() == kept.keys()
    for name, rows in kept.items():
        assert torch.equal(rows, torch.zeros_like(rows).scatter(1, replayed[name], True))
    return kept


def accept_uniform(rows: Tensor, choose: int) -> None:
    """Every subset of ``choose`` columns is equally likely."""
    subsets = {subset: i for i, subset in enumerate(itertools.combinations(range(rows.shape[1]), choose))}
    drawn = [subsets[tuple(row.nonzero()[:, 0].tolist())] for row in rows]
    assert P < stats.chisquare(np.bincount(drawn, minlength=len(subsets))).pvalue < 1 - P


@pytest.mark.parametrize("protect", [2, lambda p: p < 2, lambda p: (p == 3) | (p == 6)], ids=["count", "first", "any"])
def test_protected_tokens_are_in_every_draw_and_the_rest_is_uniform(protect: Any) -> None:
    first = torch.arange(8) < protect if isinstance(protect, int) else protect(torch.arange(8))
    for rows in kept_by(net(protect, 4, 8), stream_of(2000, 8)).values():
        assert rows[:, first].all()
        accept_uniform(rows[:, ~first], 2)


def test_as_many_as_the_reserved_length_leave_no_chance_and_more_are_refused() -> None:
    for rows in kept_by(net(3, 3), stream_of()).values():
        assert rows.nonzero()[:, 1].tolist() == [0, 1, 2] * len(ROWS)
    model = ltd_fx.transform(Net(), protect=4)
    model(stream_of(2, 8))
    with pytest.raises(LTDError, match=r"blocks\.1: a reserved length of 3 cannot hold the 4 protected tokens"):
        model(stream_of(2, 6))
    for rows in kept_by(net(lambda positions: positions < 6, 4), stream_of(60)).values():
        assert rows.any(0).tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("keep", [1, 3, 7, 11])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_no_padding_is_kept_while_a_real_token_is_dropped(keep: int, dtype: torch.dtype) -> None:
    model, scale = net("scale", keep), {"scale": MASK + 1.0}  # what the layers get: by zeros, no kept row is told
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, scale), with_kwargs=True)
    for rows in kept_by(model, stream_of(), scale=MASK.to(dtype)).values():
        assert rows.sum(1).eq(keep).all()
        assert (rows & (MASK != 0)).sum(1).tolist() == [min(len(row), keep) for row in ROWS]


@pytest.mark.parametrize(("keep", "columns", "choose"), [(3, slice(0, 5), 3), (6, slice(5, 8), 1)])
def test_within_real_tokens_and_within_padding_the_draw_is_uniform(keep: int, columns: slice, choose: int) -> None:
    model = net("scale", keep, 8)
    model(stream_of(1500, 8), (torch.arange(8) < 5).long().expand(1500, 8))
    for indices in ltd_fx.sampled_indices(model).values():
        accept_uniform(torch.zeros(1500, 8).scatter(1, indices, 1)[:, columns], choose)


def test_a_shared_draw_drops_first_what_is_padding_in_every_sequence() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[:, 9:] = 0
    mask[0, :4], mask[1, 9] = 0, 1  # real in another sequence
    for keep in (4, 10, 11):
        model = net("scale", keep, sampling="shared")
        model(stream_of(3), mask)
        for indices in ltd_fx.sampled_indices(model).values():
            assert (indices == indices[0]).all()
            assert (indices[0] < 10).sum() == min(keep, 10)


def test_the_mask_is_found_by_place_and_by_name_and_may_be_absent() -> None:
    def draws(protect: Any, *args: Any, **kwargs: Any) -> list[Any]:
        model = net(protect, 6)
        model(stream_of(), *args, **kwargs)
        return [indices.tolist() for indices in ltd_fx.sampled_indices(model).values()]

    plain = draws(None)
    assert draws("scale", MASK) == draws("scale", scale=MASK) != plain
    assert draws("scale") == draws("scale", None) == draws(0, MASK) == draws("scale", torch.ones_like(MASK)) == plain
    model, other = net("scale", 6), net(None, 6)
    for mask in (MASK, None):  # a mask is of one forward only
        outputs = [each(stream_of(), scale) for each, scale in ((model, mask), (other, None))]
    assert torch.equal(*outputs)


NO_MASKS: dict[str, Any] = {
    "4-D": MASK[:, None, None],
    "square": MASK[:, None, None].expand(-1, -1, LENGTH, -1),
    "3-D": MASK[..., None],
    "1-D": MASK[0],
    "dict": {"full": MASK},
}


@pytest.mark.parametrize("given", NO_MASKS.values(), ids=NO_MASKS)
def test_a_mask_that_is_not_of_two_dimensions_is_refused(given: Any) -> None:
    model = net("scale", 6)
    key = model._ltd_rewrite.state.key
    for args, kwargs in (((), {"scale": given}), ((given,), {})):
        with pytest.raises(LTDError, match=r"protect='scale' names the batch's padding mask.* \[B, S\], but it is"):
            model(stream_of(), *args, **kwargs)
    assert model._ltd_rewrite.state.key is key
    model(stream_of(), MASK)
    assert ltd_fx.sampled_indices(model)["blocks.1"].shape == (6, 6)


def test_a_mask_of_another_batch_is_refused_and_one_of_another_length_is_of_another_stack() -> None:
    model, plain = net("scale", 6), net(None, 6)
    for each in (model, plain):  # the layers do without
        each.register_forward_pre_hook(lambda _, args, kwargs: (args[:1], {}), with_kwargs=True)
        each(stream_of(), MASK[:, 1:])
    ours, theirs = (ltd_fx.sampled_indices(each) for each in (model, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for mask in (MASK[1:], MASK[:1]):
        with pytest.raises(LTDError, match=rf"protect='scale' .* of {len(mask)} sequences, but hidden states have 6"):
            model(stream_of(), mask)


def test_without_protect_draws_are_the_operators_without_rank() -> None:
    model = net(None, 6)
    model(stream_of())
    key = model._ltd_rewrite.state.key
    for i, indices in enumerate(ltd_fx.sampled_indices(model).values()):
        site, like = torch.tensor(i), torch.empty(0)
        for rank in ((), (None,), (torch.zeros(1, LENGTH, dtype=torch.long),), (torch.ones_like(MASK),)):
            assert torch.equal(indices, torch.ops.ltd_fx.sample_tokens(key, site, like, len(ROWS), LENGTH, 6, *rank))


@pytest.mark.parametrize("kind", PROTECTED)
def test_a_resume_is_bit_exact(kind: str) -> None:
    models = [net(PROTECTED[kind], 5) for _ in range(2)]
    first, second = (model._ltd_rewrite.state.scheduler for model in models)
    first.step()
    models[0](stream_of(), MASK)
    second.load_state_dict(first.state_dict())
    outputs = [[model(stream_of(), MASK) for _ in range(3)] for model in models]
    assert all(itertools.starmap(torch.equal, zip(*outputs, strict=True)))
    assert not torch.equal(*outputs[0][:2])  # each forward draws anew


@pytest.mark.parametrize("kind", PROTECTED)
def test_compiled_equals_eager_and_all_lengths_share_two_graphs(kind: str) -> None:
    scheduler = LTDScheduler(3, LENGTH, 9)
    model = ltd_fx.transform(Net(), scheduler, protect=PROTECTED[kind])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i in range(11):
        saved = scheduler.state_dict()
        mask = MASK.roll(i, 1)
        ours, drawn = compiled(stream_of(), mask), ltd_fx.sampled_indices(model)
        scheduler.load_state_dict(saved)
        torch.testing.assert_close(ours, model(stream_of(), mask))
        assert all(torch.equal(drawn[name], rows) for name, rows in ltd_fx.sampled_indices(model).items())
        scheduler.step()
    assert scheduler.reserved_length == LENGTH
    assert counter.frame_count == 2


def test_within_a_larger_compiled_function_the_mask_is_read_too() -> None:
    model = net("scale", 4)
    expected = model(stream_of(), MASK) * 2
    compiled = torch.compile(lambda *args: model(*args) * 2, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        model._ltd_rewrite.state.scheduler.set_step(0)
        torch.testing.assert_close(compiled(stream_of(), MASK), expected)


@pytest.mark.parametrize("kind", PROTECTED)
def test_per_sample_gradients_under_vmap_with_a_mapped_mask(kind: str) -> None:
    model, stream = net(PROTECTED[kind], 4), stream_of()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weight = torch.linspace(-1, 1, LENGTH * 8).view(LENGTH, 8)

    def loss(parameters: dict[str, Tensor], stream: Tensor, mask: Tensor) -> Tensor:
        return (torch.func.functional_call(model, parameters, (stream[None], mask[None]))[0] * weight).sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, stream, MASK)
    model._ltd_rewrite.state.scheduler.set_step(0)
    out = model(stream, MASK)
    for i in range(len(ROWS)):
        grads = torch.autograd.grad((out[i] * weight).sum(), list(model.parameters()), retain_graph=True)
        for name, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(ours[name][i], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("protect", "message"),
    [(value, "must be a number of first tokens") for value in (-1, True, 1.0, [0, 1], torch.tensor(2))]
    + [("padding", "protect='padding' is not an argument of the model's forward"), (5, "5 tokens.*min_length=4")],
    ids=str,
)
def test_bad_values_are_refused_and_the_model_untouched(protect: Any, message: str) -> None:
    model, scheduler = Net(), LTDScheduler(4, LENGTH, 9)
    before = snapshot(model)
    with pytest.raises(LTDError, match=message):
        ltd_fx.transform(model, scheduler, protect=protect)
    assert snapshot(model) == before
    assert not scheduler.attached
    ltd_fx.transform(model, scheduler, protect=4)


@pytest.mark.parametrize(
    ("name", "options", "first", "lazy"),
    [
        pytest.param("eva02_tiny_patch14_224", {"ref_feat_shape": (8, 8)}, 1, False, marks=pytest.mark.slow),
        ("vit_small_patch16_dinov3", {"init_values": 0.5}, 5, True),
    ],
)
def test_rotary_tables_without_rows_for_the_first_tokens(name: str, options: Any, first: int, lazy: bool) -> None:
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 8}
    image = torch.randn(3, 3, 32, 32)
    example, model = None if lazy else (image,), timm.create_model(name, **sizes, **options).train()
    for protect in (None, first - 1):
        with pytest.raises(LTDError, match=rf"'rope'.* no row for the first {first} tokens.*protect={first} "):
            ltd_fx.transform(model, LTDScheduler(9, 80, 10), protect=protect, example_inputs=example)(image)
        if lazy:
            ltd_fx.restore(model)
    ltd_fx.transform(model, LTDScheduler(9, 80, 10), protect=first, example_inputs=example)
    loss_of(model(image)).backward()
    for indices in ltd_fx.sampled_indices(model).values():
        assert (indices[:, :first] == torch.arange(first)).all()
    assert ltd_fx.verify(model, (image,)).ok


def test_what_was_drawn_by_a_mask_under_torch_func_is_not_told() -> None:
    class Masked(Encoder):
        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            return super().forward(hidden)

    model = ltd_fx.transform(Masked(4).train(), protect="mask")
    hidden, mask = torch.randn(3, 1, 12, 16), torch.ones(3, 1, 12)
    torch.func.vmap(model, randomness="different")(hidden, mask)
    with pytest.raises(LTDError, match=r"under torch\.func"):
        ltd_fx.sampled_indices(model)
    model(hidden[:, 0], mask[:, 0])
    assert len(ltd_fx.sampled_indices(model)) == 2
