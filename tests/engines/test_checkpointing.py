"""Activation checkpointing in every form: gradients are those of the plain run with the same draws."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BATCH, SEQ, assert_same, checkpoint_layers, decoder, loss_of, text
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from toy import Encoder, Rows

import ltd_fx
from ltd_fx import LTDError, LTDScheduler


def keep_matmuls(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    heavy = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if heavy else CheckpointPolicy.PREFER_RECOMPUTE


selective = functools.partial(create_selective_checkpoint_contexts, keep_matmuls)
CALLS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": selective},
}


class Checkpointing(Encoder):
    """The user checkpoints layers, one by one or several together."""

    def __init__(self, group: int, **options: Any) -> None:
        super().__init__(4)
        self.group, self.options = group, options

    def forward(self, hidden: Tensor) -> Tensor:
        for start in range(0, 4, self.group):
            hidden = checkpoint(self.run, hidden, start, **self.options)
        return hidden

    def run(self, hidden: Tensor, start: int) -> Tensor:
        for block in self.blocks[start : start + self.group]:
            hidden = block(hidden)
        return hidden


def route(model: nn.Module) -> nn.Module:
    return ltd_fx.transform(model.train(), LTDScheduler(9, SEQ, 3))


def wrap(model: Encoder, **options: Any) -> Encoder:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, **options)
    return model


def encoder(group: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Checkpointing(group, **options) if group else Encoder(4)


FORMS: dict[str, Callable[[], nn.Module]] = {
    **{f"a layer, {name}": lambda o=options: route(encoder(1, **o)) for name, options in CALLS.items()},
    **{f"a group, {name}": lambda o=options: route(encoder(2, **o)) for name, options in CALLS.items()},
    "wrapper before": lambda: route(wrap(encoder())),
    "wrapper after": lambda: wrap(route(encoder())),
    "selective wrapper before": lambda: route(wrap(encoder(), context_fn=selective)),
    "selective wrapper after": lambda: wrap(route(encoder()), context_fn=selective),
}
# outside the routed layer nothing tells a recompute's draw from a newer forward's
ONE_FORWARD = {name for name in FORMS if name != "wrapper before" and name != "selective wrapper before"}


def gradients(model: nn.Module, forwards: int, run: Any = None) -> list[dict[str, Tensor]]:
    """Of two steps, with ``forwards`` before each backward and two backwards a step."""
    run = model if run is None else run
    scheduler, steps = model._ltd_rewrite.state.scheduler, []
    hidden = torch.randn(BATCH, SEQ, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for _ in range(2):
        for _ in range(2):
            sum(loss_of(run(hidden)) for _ in range(forwards)).backward()
        steps.append({name: p.grad for name, p in ltd_fx.clean_state_dict(dict(model.named_parameters())).items()})
        model.zero_grad()
        scheduler.step()
    return steps


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_plain_runs(form: str) -> None:
    assert_same(gradients(FORMS[form](), 1), gradients(route(encoder()), 1))


@pytest.mark.parametrize("layers", [None, r"blocks\.\d", ["blocks.1", "blocks.2"], Rows], ids=str)
def test_wrapped_layers_of_an_unknown_class(layers: Any) -> None:
    def model() -> Encoder:
        torch.manual_seed(0)
        model = Encoder(4)
        model.blocks = nn.ModuleList(Rows() for _ in range(4))
        return model.train()

    skip = 0 if isinstance(layers, list) else 1
    ours, plain = (
        ltd_fx.transform(model, LTDScheduler(9, SEQ, 3), layers=layers, skip_first=skip, skip_last=skip)
        for model in (wrap(model()), model())
    )
    assert_same(gradients(ours, 1), gradients(plain, 1))
    assert list(ltd_fx.sampled_indices(ours)) == ["blocks.1", "blocks.2"]


@pytest.mark.parametrize("form", FORMS)
def test_two_forwards_before_one_backward(form: str) -> None:
    if form in ONE_FORWARD:
        with pytest.raises(LTDError, match="backward"):
            gradients(FORMS[form](), 2)
    else:
        assert_same(gradients(FORMS[form](), 2), gradients(route(encoder()), 2))


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("form", [name for name in FORMS if ", reentrant" not in name])
@pytest.mark.slow
def test_compiled(form: str, forwards: int) -> None:
    model = FORMS[form]()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(gradients(model, forwards, compiled), gradients(route(encoder()), forwards))


@pytest.mark.parametrize("where", ["whole", "layers"])
@pytest.mark.slow
def test_transformers_own_compiled(where: str) -> None:
    each = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = route(decoder("Llama", use_cache=False)())
        run = model
        if compiled:
            checkpoint_layers(model, use_reentrant=False)
            run = (ltd_fx.compile_layers if where == "layers" else torch.compile)(model, backend="aot_eager")
        steps = []
        for _ in range(2):
            sum(loss_of(run(**text())) for _ in range(2)).backward()
            steps.append({name: p.grad for name, p in model.named_parameters()})
            model.zero_grad()
            model._ltd_rewrite.state.scheduler.step()
        each.append(steps)
    assert_same(*each)


@pytest.mark.slow
@pytest.mark.parametrize("forwards", [1, 2])
def test_a_memory_budget(forwards: int) -> None:
    model = route(encoder())
    with torch._functorch.config.patch(activation_memory_budget=0.3):
        ours = gradients(model, forwards, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_same(ours, gradients(route(encoder()), forwards))
