"""What is done to a model after ``transform``: right, or refused with the layer's name, never routed in part."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import SEQ, decoder, text
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from toy import PATTERN, Block, Net, Wrapper

import ltd_fx
from ltd_fx import LTDError, LTDScheduler
from ltd_fx.deepspeed import convert_to_random_ltd


@pytest.fixture(autouse=True)
def _known_block() -> None:
    ltd_fx.register_pattern(Block, PATTERN)


STREAM = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))


def transformed(**options: Any) -> Net:
    torch.manual_seed(0)
    return ltd_fx.transform(Net(5), LTDScheduler(2, 6, 4), **options)


def decorate(layer: nn.Module) -> None:
    """As accelerate's hooks do."""
    forward = layer.forward
    layer.forward = functools.wraps(forward)(lambda *args, **kwargs: forward(*args, **kwargs))


def replace(model: Net, i: int, layer: nn.Module) -> None:
    model.blocks[i] = layer


RIGHT: dict[str, Callable[[Net], Any]] = {
    "wrapped": lambda model: replace(model, 2, Wrapper(model.blocks[2])),
    "checkpointed": lambda model: replace(model, 2, checkpoint_wrapper(model.blocks[2])),
    "compiled": lambda model: replace(model, 2, torch.compile(model.blocks[2], backend="eager")),
    "decorated": lambda model: decorate(model.blocks[2]),
    "moved": lambda model: setattr(model, "blocks", nn.ModuleList(list(model.blocks))),
    "a part replaced": lambda model: setattr(model.blocks[2], "linear", copy.deepcopy(model.blocks[2].linear)),
    "a dense layer replaced": lambda model: replace(model, 0, copy.deepcopy(model.blocks[0])),
}


@pytest.mark.parametrize("change", RIGHT)
def test_these_go_on_being_routed(change: str) -> None:
    plain, model = transformed(), transformed()
    RIGHT[change](model)
    for _ in range(3):
        assert torch.equal(model(STREAM), plain(STREAM))
        ours, theirs = ltd_fx.sampled_indices(model), ltd_fx.sampled_indices(plain)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ltd_fx.restore(model)
    assert not ltd_fx.is_transformed(model)
    assert type(plain.blocks[0]) is Block


WRONG: dict[str, tuple[Callable[[Net], Any], str]] = {
    "replaced": (lambda model: replace(model, 2, Block()), "2 is no longer in the model"),
    "removed": (lambda model: setattr(model, "blocks", model.blocks[:2]), "2 is no longer in the model"),
    "parent replaced": (lambda model: setattr(model, "blocks", Net(5).blocks), "1 is no longer in the model"),
    "copied": (lambda model: model.blocks.append(copy.deepcopy(model.blocks[2])), r"5 is a copy of .* blocks\.2"),
    "shared": (lambda model: model.blocks.append(model.blocks[2]), r"2 is in several .* blocks\.2 and blocks\.5"),
    "patched": (lambda model: setattr(model.blocks[2], "forward", lambda *a: (a[0], None)), "2 was given another"),
    "unclassed": (lambda model: setattr(model.blocks[2], "__class__", Block), "2 was given another"),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", WRONG)
def test_these_are_refused_at_every_forward_until_restored(change: str, compiled: bool) -> None:
    act, message = WRONG[change]
    message = rf"blocks\.{message}"
    model = transformed()
    run = torch.compile(model, backend="eager") if compiled else model
    run(STREAM)
    blocks = list(model.blocks)
    act(model)
    for _ in range(2):
        with pytest.raises(LTDError, match=f"{message}.*ltd_fx.restore"):
            run(STREAM)
    with pytest.raises(LTDError, match=message):
        ltd_fx.summary(model)
    model.blocks = nn.ModuleList(blocks)  # put back
    if change not in ("patched", "unclassed"):
        run(STREAM)
        ltd_fx.restore(model)
        assert [type(block) for block in model.blocks] == [Block] * 5


def test_layers_shared_from_the_start_are_no_change() -> None:
    model = Net(5)
    model.blocks[3] = model.blocks[2]
    ltd_fx.transform(model, LTDScheduler(2, 6, 4))
    model(STREAM)
    model.blocks[0] = Block()
    model(STREAM)


def test_layers_called_by_another_model_draw_anew() -> None:
    """The root's forwards bring new keys; where none is under way, each call of a layer does."""
    model = transformed()
    other, drawn = Wrapper(model.blocks[1]), []
    for call in (other, model, other, other, model, other):
        call(STREAM)
        drawn.append(str(ltd_fx.sampled_indices(model)["blocks.1"]))
    assert len(set(drawn)) == 6
    other.eval()(STREAM)
    model = transformed(protect="scale")
    with pytest.raises(LTDError, match=r"not by a call of the Net.*protect='scale'"):
        model.blocks[1](STREAM)


@pytest.mark.parametrize("lora_first", [False, True])
def test_lora_merged_after_transform(lora_first: bool) -> None:
    """Merging takes PEFT's model away: if that was transformed, no forward of it brings new draws."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)
    torch.manual_seed(0)
    model = decoder("Llama")().train()
    scheduler = LTDScheduler(8, SEQ, 12)
    if lora_first:
        model = ltd_fx.transform(peft.get_peft_model(model, config), scheduler)
        merged = model.merge_and_unload().train()
    else:
        model = ltd_fx.transform(model, scheduler)
        merged = peft.get_peft_model(model, config).merge_and_unload().train()
    drawn = []
    for _ in range(3):
        merged(**text())
        drawn.append(str(ltd_fx.sampled_indices(model)))
    assert len(set(drawn)) == 3


def test_a_restored_copy_leaves_the_original_its_scheduler() -> None:
    model = transformed(keep={"blocks.2": 0.5})
    scheduler = model._ltd_rewrite.state.scheduler
    plain = ltd_fx.restore(copy.deepcopy(model))
    assert not ltd_fx.is_transformed(plain)
    assert scheduler.attached
    scheduler.set_step(2)
    model(STREAM)
    assert [kept.shape[1] for kept in ltd_fx.sampled_indices(model).values()] == [4, 4, 4]
    ltd_fx.restore(model)
    assert not scheduler.attached


@pytest.mark.parametrize("lazy", [False, True])
def test_two_rewrites_of_the_same_layers(lazy: bool) -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    def build(layer: type[nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Sequential(layer(), layer(), layer()))

    model = build(Unknown) if lazy else nn.Sequential(Net())
    ltd_fx.transform(model, LTDScheduler(2, 6, 4))
    with pytest.raises(LTDError, match="transformed already"):
        ltd_fx.transform(nn.DataParallel(model))
    if lazy:
        ltd_fx.transform(model[0])
    with pytest.raises(LTDError, match="routed already"):
        model(STREAM) if lazy else ltd_fx.transform(model[0])


def test_deepspeeds_conversion_of_a_transformed_model() -> None:
    model = transformed()
    before = [type(block) for block in model.blocks]
    config = {"random_ltd_layer_id": [1, 2], "random_ltd_layer_num": 2, "total_layer_num": 5}
    with pytest.raises(LTDError, match="already"):
        convert_to_random_ltd(model, Block, LTDScheduler(2, 6, 4), config)
    assert [type(block) for block in model.blocks] == before


def test_checking_costs_no_graph() -> None:
    model = transformed()
    scheduler = model._ltd_rewrite.state.scheduler
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(6):
        compiled(STREAM)
        scheduler.step()
    assert counter.frame_count == 2
