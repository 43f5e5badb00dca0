"""Attention kernels in plain sight: what stands in for them computes the same, and shows what they hide."""

import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.learn import kernels, plain_attention
from ltd_fx.runtime import window_of

B, H, S, D = 2, 4, 10, 8


def tensors(*shape: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, D, generator=generator, dtype=torch.float64) for _ in range(count)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scores: Any = lambda s: s, sinks: Any = None) -> Tensor:
    """One query after the other, ``[S, H, D]``."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    out = torch.zeros_like(q)
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            weights = scores(q[i, h] @ k[:, h].T / D**0.5).masked_fill(~allowed[i], -torch.inf).exp()
            total = weights.sum() + (0 if sinks is None else sinks[h].exp())
            out[i, h] = (weights / total) @ v[:, h] if allowed[i].any() else 0
    return out


def placed(window: tuple[int, int] = (-1, -1), causal: bool = True, number: Tensor | None = None) -> Tensor:
    behind = torch.arange(S)[:, None] - torch.arange(S)
    allowed = behind >= 0 if causal else torch.ones(S, S, dtype=torch.bool)
    allowed = allowed & (behind <= window[0]) if window[0] >= 0 else allowed
    allowed = allowed & (-behind <= window[1]) if window[1] >= 0 else allowed
    return allowed if number is None else allowed & (number[:, None] == number)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (2, 1)])
def test_flash_attn_func(causal: bool, window: tuple[int, int]) -> None:
    (q,), (k, v) = tensors(B, S, H, count=1), tensors(B, S, 2, count=2)
    ours = plain_attention._flash(q, k, v, causal=causal, window_size=window, softcap=1.5)
    theirs = [
        by_hand(*rows, placed(window, causal), lambda s: 1.5 * (s / 1.5).tanh()) for rows in zip(q, k, v, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(theirs))


def test_documents_of_varlen_kernels() -> None:
    q, k, v = tensors(S, H)
    number, ends = torch.tensor([0] * 3 + [1] + [3] * 6), torch.tensor([0, 3, 4, 4, 10], dtype=torch.int32)
    theirs = by_hand(q, k, v, placed(number=number))
    torch.testing.assert_close(plain_attention._flash_varlen(q, k, v, ends, ends, 6, 6, causal=True), theirs)
    torch.testing.assert_close(plain_attention._torch_varlen(q, k, v, ends, ends, 6, 6, window_size=(-1, 0)), theirs)
    slopes = torch.rand(H)
    sloped = plain_attention._flash_varlen(q, k, v, ends, ends, 6, 6, alibi_slopes=slopes)
    distance = (torch.arange(S)[:, None] - torch.arange(S)).abs()
    bias = (-slopes[:, None, None] * distance).masked_fill(number[:, None] != number, -torch.inf)
    expected = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q, k, v)), attn_mask=bias.double())
    torch.testing.assert_close(sloped, expected.transpose(0, 1))


def test_flex_attention_with_scores_and_a_mask() -> None:
    q, k, v = (t.float() for t in tensors(B, H, 16))

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s * (h + 1) - 0.3 * (i - j).abs() + b

    mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 5 + b), B, None, 16, 16, device="cpu")
    with torch.no_grad():
        theirs = flex_attention(q, k, v, score_mod=score, block_mask=mask, scale=0.4)
    ours = plain_attention._flex(q, k, v, score, mask, 0.4)
    torch.testing.assert_close(ours, theirs)


def test_transformers_sinks_and_padding() -> None:
    q, k, v = tensors(B, H, S)
    module, sinks = nn.Module(), torch.randn(H, dtype=torch.float64)
    module.is_causal = True  # type: ignore[assignment]
    mask = torch.ones(B, S)
    mask[1, :4] = 0
    ours, _ = plain_attention._of_transformers(module, q, k, v, mask, s_aux=sinks)
    for row, real, *given in zip(ours, mask.bool(), *(t.transpose(1, 2) for t in (q, k, v)), strict=True):
        theirs = by_hand(*given, placed() & real, sinks=sinks)
        torch.testing.assert_close(row, theirs * real[:, None, None])


def test_transformers_windows() -> None:
    """One that its module does not name is seen by nobody else; one that it names is refused by the length."""
    q, k, v = tensors(B, H, S)
    module = nn.Module()
    module.is_causal, module.config = True, types.SimpleNamespace(sliding_window=5)  # type: ignore[assignment]
    for said, window in ((3, (2, -1)), (5, (-1, -1))):
        ours, _ = plain_attention._of_transformers(module, q, k, v, None, sliding_window=said)
        for row, *given in zip(ours, *(t.transpose(1, 2) for t in (q, k, v)), strict=True):
            torch.testing.assert_close(row, by_hand(*given, placed(window)))
    assert window_of(module) == 5
    module.is_sliding = False  # type: ignore[assignment]
    assert window_of(module) is None


def test_other_interfaces() -> None:
    """FlashAttention 3 has another order of arguments; xformers has a bias in place of a mask."""
    q, k, v = tensors(B, S, H)
    theirs = torch.stack([by_hand(*rows, placed()) for rows in zip(q, k, v, strict=True)])
    torch.testing.assert_close(plain_attention._flash3(q, k, v, D**-0.5, True), theirs)
    triangle = type("LowerTriangularMask", (), {})()
    torch.testing.assert_close(plain_attention._xformers(q, k, v, triangle), theirs)
    bias = torch.zeros(S, S, dtype=torch.float64).masked_fill(~placed(), -torch.inf)
    torch.testing.assert_close(plain_attention._xformers(q, k, v, bias), theirs)


def test_arguments_that_are_not_known_are_refused() -> None:
    q, k, v = tensors(B, S, H)
    ends = torch.tensor([0, S], dtype=torch.int32)
    plain_attention._flash(q, k, v, causal=True, deterministic=True, return_attn_probs=False)
    for call in (
        lambda: plain_attention._flash3(q, k, v, causal=True, attention_chunk=4),
        lambda: plain_attention._flash(q, k, v, return_attn_probs=True),
        lambda: plain_attention._torch_varlen(q[0], k[0], v[0], ends, ends, S, S, seqused_k=ends),
        lambda: plain_attention._flex(q, k, v, return_lse=True),
        lambda: plain_attention._xformers(q, k, v, object()),
    ):
        with pytest.raises(NotImplementedError, match="ltd_fx does not know"):
            call()


# ---- layers that call a kernel themselves


def _kernel(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return torch.ops.ltd_fx_tests.kernel(q, k, v)


@torch.library.custom_op("ltd_fx_tests::kernel", mutates_args=())
def _op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (
        F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2).clone()
    )


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if flash-attn were installed, and this file had imported its function."""
    library = types.ModuleType("flash_attn")
    library.flash_attn_func = _kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setattr(sys.modules[__name__], "flash_attn_func", _kernel, raising=False)
    yield
    assert flash_attn_func is _kernel  # noqa: F821
    assert library.flash_attn_func is _kernel


class Layer(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.inputs, self.output, self.how = nn.Linear(16, 48), nn.Linear(16, 16), how

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v, causal=True, **self.how)  # type: ignore[name-defined,no-any-return]  # noqa: F821

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(2, (3, 2, 8)).unbind(2)
        return x + self.output(self.attend(q, k, v).flatten(2))


class Unknown(Layer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.ltd_fx_tests.kernel(q, k, v)


class Flex(Layer):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = self.how.get("slope", 0.0)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, s - far * (i - j), -torch.inf)

        return flex_attention(*(t.transpose(1, 2) for t in (q, k, v)), score_mod=score).transpose(1, 2)


class Varlen(Layer):
    """Documents by an argument of its own."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        q, k, v = self.inputs(x).unflatten(2, (3, 2, 8)).unbind(2)
        rows = (t.flatten(0, 1) for t in (q, k, v))
        out = varlen.varlen_attn(*rows, cu_seqlens, cu_seqlens, S, S, window_size=self.how.get("window", (-1, 0)))
        return x + self.output(out.view_as(q).flatten(2))


class Net(nn.Module):
    def __init__(self, make: Any = Layer, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(make(**how) for _ in range(4))

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **given)
        return x


@pytest.mark.usefixtures("package")
def test_a_known_kernel_is_seen_through() -> None:
    x = torch.randn(2, 12, 16)
    model = ltd_fx.transform(Net().train(), LTDScheduler(5, 12, 9), example_inputs=(x,))
    assert [site.status for site in ltd_fx.summary(model).sites if site.routed] == ["proven"] * 2
    assert ltd_fx.verify(model, (x,)).ok
    for how in ({"window_size": (3, 0)}, {"alibi_slopes": torch.rand(2)}):
        with pytest.raises(LTDError, match="counts positions among the tokens"):
            ltd_fx.transform(Net(**how).train(), example_inputs=(x,))


def test_an_unknown_one_is_the_users_word(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 12, 16)
    with pytest.raises(LTDError, match="not verifiable"):
        ltd_fx.transform(Net(Unknown).train(), example_inputs=(x,))
    monkeypatch.setattr("ltd_fx.learn.patterns._registered", {Unknown: ltd_fx.LayerPattern(hidden="x")})
    with pytest.warns(UserWarning, match="registered for Unknown is trusted"):
        model = ltd_fx.transform(Net(Unknown).train(), example_inputs=(x,))
    assert [site.status for site in ltd_fx.summary(model).sites if site.routed] == ["trusted"] * 2


def test_a_score_by_distance_is_refused_and_one_by_order_is_not() -> None:
    x = torch.randn(2, 12, 16)
    model = ltd_fx.transform(Net(Flex).train(), example_inputs=(x,))
    assert all(site.proof and site.proof.right for site in ltd_fx.summary(model).sites if site.routed)
    with pytest.raises(LTDError, match=r"cannot be routed"):
        ltd_fx.transform(Net(Flex, slope=0.5).train(), example_inputs=(x,))


def test_boundaries_by_another_name() -> None:
    ends = torch.tensor([0, 3, 4, S], dtype=torch.int32)
    given = {"x": torch.randn(1, S, 16), "cu_seqlens": ends}
    model = ltd_fx.transform(Net(Varlen), example_inputs=given)
    assert [site.status for site in ltd_fx.summary(model).sites if site.routed] == ["proven"] * 2
    with pytest.raises(LTDError, match="counts positions among the tokens"):
        ltd_fx.transform(Net(Varlen, window=(3, 0)), example_inputs=given)


class Looking(Layer):
    """Looks documents up by itself."""

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        ends = cu_seqlens.to(self.how.get("dtype", torch.int64))
        number = torch.searchsorted(ends, torch.arange(x.shape[1]), right=self.how.get("right", True))
        mask = number[:, None] == number
        return x + self.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("how", "status"), [({}, "proven"), ({"dtype": torch.float16}, "tested"), ({"right": False}, "")]
)
def test_places_are_looked_up_among_exact_boundaries(how: dict[str, Any], status: str) -> None:
    """Half precision rounds them from 2049 on; from the left, a dropped first token's place is the next one's."""
    given = {"x": torch.randn(1, S, 16), "cu_seqlens": torch.tensor([0, 3, 4, S], dtype=torch.int32)}
    if not status:
        with pytest.raises(LTDError, match="cannot be routed"):
            ltd_fx.transform(Net(Looking, **how), example_inputs=given)
        return
    model = ltd_fx.transform(Net(Looking, **how), example_inputs=given)
    assert [site.status for site in ltd_fx.summary(model).sites if site.routed] == [status] * 2


@pytest.mark.usefixtures("package")
def test_other_threads_keep_their_kernel() -> None:
    seen: list[Tensor] = []
    given = [t.float() for t in tensors(1, S, H)]

    def other() -> None:
        seen.append(flash_attn_func(*given, causal=True, window_size=(1, 0)))  # type: ignore[name-defined] # noqa: F821

    with kernels.in_plain_sight(Net().modules()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        here = flash_attn_func(*given, causal=True, window_size=(1, 0))  # type: ignore[name-defined] # noqa: F821
    assert torch.equal(seen[0], _kernel(*given))
    assert not torch.allclose(here, seen[0])
