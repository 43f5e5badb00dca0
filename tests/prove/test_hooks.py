"""Forward hooks within a layer are a part of it where they compute, and are left alone where they watch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attend import Attention
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDError
from ltd_fx.learn.hooks import may_change

DIM, TOKENS = 16, 24
TABLE = torch.randn(TOKENS, DIM)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), Attention(DIM, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def model() -> nn.Sequential:
    return nn.Sequential(*(Layer() for _ in range(4))).train()


def adds(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + TABLE[: out.shape[1]].to(out.dtype)


def adds_before(module: nn.Module, args: Any) -> tuple[Tensor]:
    return (args[0] + TABLE[: args[0].shape[1]].to(args[0].dtype),)


def adds_in_place(module: nn.Module, args: Any, out: Tensor) -> None:
    out.add_(TABLE[: out.shape[1]].to(out.dtype))


def augments(module: nn.Module, args: Any, out: Tensor) -> None:
    out += TABLE[: out.shape[1]].to(out.dtype)


class Adds:
    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return adds(module, args, out)


@pytest.mark.parametrize("lazily", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "hook", [adds, adds_before, adds_in_place, augments, Adds()], ids=lambda hook: getattr(hook, "__name__", "Adds")
)
def test_a_hook_that_mixes_tokens_by_place_is_refused(hook: Any, lazily: bool) -> None:
    stack, x = model(), torch.randn(2, TOKENS, DIM)
    norm: Any = stack[2].norm
    (norm.register_forward_pre_hook if hook is adds_before else norm.register_forward_hook)(hook)
    if lazily:
        ltd_fx.transform(stack, layers=Layer)
    with pytest.raises(LTDError, match=r"2.*cannot be routed"):
        stack(x) if lazily else ltd_fx.transform(stack, layers=Layer, example_inputs=(x,))


def test_a_hook_that_scales_is_proven() -> None:
    """And it may keep what it saw: that is taken out again."""
    stack, seen = model(), []
    for layer in stack:
        layer.norm.register_forward_hook(lambda module, args, out: seen.append(out) or out * 2)
    ltd_fx.transform(stack, layers=Layer, example_inputs=(torch.randn(2, TOKENS, DIM),))
    assert {site.proof.status for site in ltd_fx.summary(stack).sites[1:-1] if site.proof} == {"proven"}
    assert seen == []


def test_the_hooks_of_a_layer_itself_are_around_its_routing() -> None:
    stack, x = model(), torch.randn(2, TOKENS, DIM)
    stack[1].register_forward_hook(adds)
    ltd_fx.transform(stack, layers=Layer, example_inputs=(x,))
    assert ltd_fx.verify(stack, (x,)).ok


@pytest.mark.parametrize(
    ("hook", "changes"),
    [
        (lambda module, args, out: None, False),
        (lambda module, args, out: print(out), True),
        (print, True),
        (adds, True),
        (adds_in_place, True),
        (augments, True),
        (Adds(), True),
    ],
)
def test_what_a_hook_may_do_is_told_from_its_code(hook: Callable[..., Any], changes: bool) -> None:
    assert may_change(hook) is changes


def test_a_hook_that_counts_is_not_called() -> None:
    stack, x, calls = model(), torch.randn(2, TOKENS, DIM), []

    def count(module: nn.Module, args: Any, out: Tensor) -> None:
        if not module.training:
            return
        calls.append(len(calls))
        total = 0
        total += 1

    stack[1].norm.register_forward_hook(count)
    ltd_fx.transform(stack, layers=Layer, example_inputs=(x,))
    assert calls == []
