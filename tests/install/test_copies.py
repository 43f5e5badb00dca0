"""Copies of a transformed model: routed as it is, with weights of their own, and restored by themselves."""

import copy
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from toy import PATTERN, Block, Net

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

STREAM = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))


class Stream(Net):
    """One argument, so that its trace is plain."""

    def forward(self, stream: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(stream)


class Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Block)


def traced() -> nn.Module:
    model = Stream()
    return fx.GraphModule(model, Tracer().trace(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


MODELS: dict[str, Callable[[], nn.Module]] = {"module": Stream, "graph": traced}
WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
}
EACH = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
EVERY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(autouse=True)
def _known_block() -> None:
    ltd_fx.register_pattern(Block, PATTERN)


def transformed(build: Callable[[], nn.Module]) -> tuple[Any, LTDScheduler]:
    torch.manual_seed(0)
    scheduler = LTDScheduler(2, 6, 4)
    return ltd_fx.transform(build(), scheduler), scheduler


def expected(model: Any, kept: dict[str, Tensor]) -> Tensor:
    """The dense layers one by one, each with its effect on the tokens that it kept alone."""
    linear = [model.get_submodule(f"blocks.{i}.linear") for i in range(4)]
    stream = STREAM + linear[0](STREAM)
    for i in (1, 2):
        rows = torch.zeros(3, 6, dtype=torch.bool).scatter(1, kept[f"blocks.{i}"], True)[..., None]
        stream = torch.where(rows, stream + linear[i](stream), stream)
    return stream + linear[3](stream)  # type: ignore[no-any-return]


def assert_routes(model: Any, length: int) -> None:
    drawn = []
    for _ in range(3):
        output, kept = model(STREAM), ltd_fx.sampled_indices(model)
        assert {rows.shape[1] for rows in kept.values()} == {length}
        torch.testing.assert_close(output, expected(model, kept))
        drawn.append([rows.tolist() for rows in kept.values()])
    assert drawn[0] != drawn[1] != drawn[2]
    parameters = list(model.parameters())
    assert all((grad != 0).any() for grad in torch.autograd.grad(model(STREAM).square().sum(), parameters))


@EVERY
@EACH
def test_a_copy_is_routed_and_shares_no_weight(build: Callable[[], nn.Module], way: Callable[[Any], Any]) -> None:
    model, _ = transformed(build)
    model(STREAM)
    copied = way(model)
    assert copied.state_dict().keys() == model.state_dict().keys()
    pairs = zip(copied.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(*pair) and pair[0] is not pair[1] for pair in pairs)
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(2)
    assert_routes(copied, 2)
    assert_routes(model, 2)
    assert str(ltd_fx.summary(copied)) == str(ltd_fx.summary(model))
    assert "split_hidden" in str(ltd_fx.summary(copied).sites[1].graph)
    assert_routes(way(copied), 2)


@EVERY
@EACH
def test_a_copy_is_restored_and_transformed_by_itself(
    build: Callable[[], nn.Module], way: Callable[[Any], Any]
) -> None:
    model, scheduler = transformed(build)
    copied = way(model)
    ltd_fx.restore(copied)
    assert not ltd_fx.is_transformed(copied)
    assert torch.equal(copied(STREAM), model.eval()(STREAM))
    model.train()
    scheduler.step()
    assert scheduler.attached
    assert_routes(model, 3)
    ltd_fx.transform(copied, LTDScheduler(4, 6, 4))
    assert_routes(copied, 4)
    assert_routes(model, 3)
    other = way(model)
    ltd_fx.restore(model)
    assert_routes(other, 3)


@EACH
def test_a_shallow_copy_is_routed_and_shares_the_weights(build: Callable[[], nn.Module]) -> None:
    model, scheduler = transformed(build)
    copied = copy.copy(model)
    assert all(ours is theirs for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True))
    assert_routes(copied, 2)
    assert_routes(model, 2)
    ltd_fx.restore(copied)
    assert torch.equal(copied(STREAM), model.eval()(STREAM))
    assert ltd_fx.is_transformed(model) == scheduler.attached == (build is traced)  # of a plain module, it is an alias
    model.train()
    if build is traced:
        assert_routes(model, 2)
        ltd_fx.restore(model)
    ltd_fx.transform(model, LTDScheduler(3, 6, 4))
    assert_routes(model, 3)


def test_a_copy_of_a_module_whose_layers_are_yet_to_be_learnt() -> None:
    scheduler = LTDScheduler(4, 8, 4, kind="constant")
    model = ltd_fx.transform(nn.TransformerEncoder(Own(), 3, enable_nested_tensor=False), scheduler)
    copied = copy.deepcopy(model)
    stream = torch.randn(2, 8, 8)
    for each in (model, copied):
        each(stream)
        assert [rows.shape for rows in ltd_fx.sampled_indices(each).values()] == [(2, 4)]
    ltd_fx.restore(copied)
    assert scheduler.attached
    assert ltd_fx.is_transformed(model)


class Own(nn.TransformerEncoderLayer):
    """No known class."""

    def __init__(self) -> None:
        super().__init__(8, 2, 8, 0.0, batch_first=True)

    def forward(self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, **options: Any) -> Tensor:  # type: ignore[override]
        return super().forward(src, src_mask, src_key_padding_mask)


@pytest.mark.parametrize("lazy", [False, True], ids=["known", "to be learnt"])
@EACH
def test_replicas_of_data_parallel_are_refused(
    build: Callable[[], nn.Module], lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> Any:
        return [list(tensors) for _ in devices]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast)

    def replicate_and_run() -> None:
        for replica in nn.parallel.replicate(model, [0, 1]):
            replica(torch.randn(2, 8, 8))

    model = nn.TransformerEncoder(Own(), 3, enable_nested_tensor=False) if lazy else build()
    assert len(nn.parallel.replicate(model, [0, 1])) == 2
    ltd_fx.transform(model)
    with pytest.raises(LTDError, match=r"nn\.DataParallel replicates.*DistributedDataParallel"):
        replicate_and_run()
    ltd_fx.restore(model)
    assert len(nn.parallel.replicate(model, [0, 1])) == 2
