"""A stand-in for the package of flash attention, behind transformers' own entry, in plain operators or as one."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

CALLS: list[tuple[int, list[int]]] = []  # Of each call on packed rows: the tokens, and the boundaries.


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, left: int) -> Tensor:
    """``[S, heads, D]`` of one document."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (t.transpose(0, 1) for t in (query, *(t.repeat_interleave(groups, 1) for t in (key, value))))
    ahead = torch.arange(q.shape[1])[None] - torch.arange(q.shape[1])[:, None]
    hidden = (ahead > 0) & causal
    if left >= 0:
        hidden = hidden | (ahead < -left)
    return ((q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


@torch.library.custom_op("ltd_fx_tests::flash", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int) -> Tensor:
    return _attend(q, k, v, scale, causal, left).contiguous()


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int) -> Tensor:
    return torch.empty_like(q)


def _backward(ctx: Any, grad: Tensor) -> Any:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        return (*torch.autograd.grad(_attend(q, k, v, *ctx.how), (q, k, v), grad), None, None, None)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.how = inputs[3:]


_opaque.register_autograd(_backward, setup_context=_setup)


class Package:
    """What transformers imports, and calls with the arguments of flash-attn."""

    def __init__(self, opaque: bool) -> None:
        self._opaque = opaque

    def one(self, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> Tensor:
        scale = how.get("softmax_scale") or q.shape[-1] ** -0.5
        attend = _opaque if self._opaque else _attend
        return attend(*(t.contiguous() for t in (q, k, v)), scale, how["causal"], how.get("window_size", (-1, -1))[0])

    def flash(self, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        return torch.stack([self.one(*rows, how) for rows in zip(q, k, v, strict=True)])

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **how: Any) -> Any:
        ends = cu_seqlens_q.tolist()
        CALLS.append((len(q), ends))
        assert cu_seqlens_k.tolist() == ends
        assert (ends[0], ends[-1]) == (0, len(q)), "a kernel would read what is not there"
        assert max(cu_seqlens_q.diff()) <= how["max_seqlen_q"]
        parts = itertools.pairwise(ends)
        return torch.cat([self.one(q[a:b], k[a:b], v[a:b], how) for a, b in parts if a < b])


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "one operator"])
def flash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """Within, models run on ``flash_attention_2``; the calls on packed rows."""
    entry = pytest.importorskip("transformers.modeling_flash_attention_utils")
    package = Package(request.param)

    def arguments(**given: Any) -> dict[str, Any]:
        how = {"causal": given["is_causal"], "softmax_scale": given.get("softmax_scale")}
        window = given.get("sliding_window")
        if window is not None and given["key_length"] > window:
            how["window_size"] = (window - 1, window - 1)
        return {**how, **{name: given[name] for name in ("max_seqlen_q", "max_seqlen_k") if name in given}}

    functions = (package.flash, package.varlen, None, entry._pad_input, entry._unpad_input)
    monkeypatch.setattr(entry, "lazy_import_flash_attention", lambda *_, **__: (functions, (arguments, arguments)))
    CALLS.clear()
    return CALLS


def use_flash(model: torch.nn.Module, name: str = "flash_attention_2") -> torch.nn.Module:
    """As if the model had been loaded with it: transformers would look for the package, or for a kernel of the hub."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name  # type: ignore[union-attr]
    return model
