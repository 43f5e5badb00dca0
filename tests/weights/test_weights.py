"""Weights in files that are whole or absent, under clean keys."""

import os
import resource

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ltd_fx import LTDError, clean_state_dict, load_clean, save_clean
from ltd_fx.deepspeed import RandomLayerTokenDrop

SUFFIXES = pytest.mark.parametrize("suffix", [".safetensors", ".pt"])


class Net(nn.Module):
    """Tied weights, a buffer, and a submodule that happens to be called as DDP calls its own."""

    def __init__(self, width=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, width)
        self.module = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight


class Views(nn.Module):
    """Parameters and buffers that share memory in every way but being the same."""

    def __init__(self, seed=0):
        super().__init__()
        base = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        self.whole = nn.Parameter(base)
        self.same = nn.Parameter(base[:])
        for name, view in {"flat": base.view(-1), "row": base[1], "columns": base[:, ::2], "turned": base.T}.items():
            self.register_buffer(name, view)
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(seed))


class NamedFormat(nn.Module):
    """A tied weight of the name that safetensors files use for themselves."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3))
        self.format = self.weight


def checkpointed(model):
    model.module[0] = checkpoint_wrapper(model.module[0])
    return model


def dropping(model):
    model.module[0] = RandomLayerTokenDrop(model.module[0])
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_within(model):
    model.module[0] = compiled(model.module[0])
    return model


WRAPPERS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "compiled within": compiled_within,
    "data parallel": nn.DataParallel,
    "data parallel of compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled data parallel": lambda model: compiled(nn.DataParallel(model)),
    "checkpointed": checkpointed,
    "random-ltd": dropping,
    "everything": lambda model: compiled(nn.DataParallel(compiled_within(dropping(checkpointed(model))))),
}
WRAPPED = pytest.mark.parametrize("wrap", [pytest.param(wrap, id=name) for name, wrap in WRAPPERS.items()])


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@WRAPPED
def test_a_wrapped_model_has_its_own_keys(wrap):
    assert_same(clean_state_dict(wrap(Net())), Net().state_dict())


@SUFFIXES
@WRAPPED
def test_round_trip_between_wrappers(wrap, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    save_clean(wrap(Net(seed=1)), path)
    expected = Net(seed=1).state_dict()
    for target in (wrap, WRAPPERS["plain"], WRAPPERS["compiled"]):
        model = target(Net(seed=2))
        load_clean(model, str(path))
        assert_same(clean_state_dict(model), expected)
    assert os.listdir(tmp_path) == [path.name]


@SUFFIXES
@pytest.mark.parametrize("build", [Net, Views, NamedFormat])
def test_shared_memory_survives(build, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    model = build(seed=1)
    save_clean(model, path)
    target = build(seed=2)
    shared = {name: value.data_ptr() for name, value in target.state_dict().items()}
    load_clean(target, path)
    assert_same(target.state_dict(), model.state_dict())
    assert {name: value.data_ptr() for name, value in target.state_dict().items()} == shared


def test_tied_weights_are_stored_once_and_other_tools_read_the_file(tmp_path):
    expected = Net().state_dict()
    save_clean(compiled(Net()), tmp_path / "model.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert_same(stored, {name: value for name, value in expected.items() if name != "head.weight"})
    save_clean(compiled(Net()), tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    assert_same(stored, expected)
    assert stored["head.weight"].data_ptr() == stored["embedding.weight"].data_ptr()


def test_distributed_data_parallel():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for model in (
            nn.parallel.DistributedDataParallel(Net(seed=1)),
            compiled(nn.parallel.DistributedDataParallel(Net(seed=1))),
        ):
            assert_same(clean_state_dict(model), Net(seed=1).state_dict())
            assert_same(clean_state_dict(model.state_dict()), Net(seed=1).state_dict())
    finally:
        torch.distributed.destroy_process_group()


def test_permissions_are_those_of_any_new_file(tmp_path):
    save_clean(Net(), tmp_path / "model.pt")
    (tmp_path / "other").touch()
    assert (tmp_path / "model.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.fixture
def saved(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    save_clean(Net(), path)
    return path


def check_unharmed(path):
    assert os.listdir(path.parent) == [path.name]
    loaded = Net(seed=5)
    load_clean(loaded, path)
    assert_same(loaded.state_dict(), Net().state_dict())


@SUFFIXES
def test_a_full_disk(saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = Net(width=100)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        with pytest.raises(LTDError, match=rf"{saved} cannot be written"):
            save_clean(large, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_unharmed(saved)


@SUFFIXES
@pytest.mark.parametrize("error", [OSError("device is gone"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_last_step_fails(saved, monkeypatch, error):
    def fail(*paths):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(LTDError if isinstance(error, OSError) else KeyboardInterrupt):
            save_clean(Net(seed=1), saved)
    check_unharmed(saved)


@SUFFIXES
@pytest.mark.parametrize("place", ["missing/model", "file/model", "directory"])
def test_a_path_that_cannot_be_written(place, suffix, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / f"directory{suffix}").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(LTDError, match=f"{place}{suffix} cannot be written"):
        save_clean(Net(), tmp_path / f"{place}{suffix}")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["model.bin", "model", "model.safetensors.gz", ".pt"])
def test_other_suffixes(name, tmp_path):
    for function in (save_clean, load_clean):
        with pytest.raises(LTDError, match=r"must end in \.safetensors or \.pt"):
            function(Net(), tmp_path / name)
    assert os.listdir(tmp_path) == []


@SUFFIXES
@pytest.mark.parametrize("share", [None, 0, 0.01, 0.5, 0.99])
def test_a_truncated_or_missing_file(saved, share):
    content = saved.read_bytes()
    saved.unlink()
    if share is not None:
        saved.write_bytes(content[: int(len(content) * share)])
    model = Net(seed=3)
    with pytest.raises(LTDError, match=f"{saved} cannot be read"):
        load_clean(model, saved)
    assert_same(model.state_dict(), Net(seed=3).state_dict())


@SUFFIXES
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module.0.bias"), r"missing \['module\.0\.bias'\]"),
        (lambda state: state.update(extra=torch.ones(1)), r"unexpected \['extra'\]"),
        (lambda state: state.update({"module.0.bias": torch.ones(9)}), r"module\.0\.bias is \(9,\) there, \(3,\) here"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_a_file_of_another_model(change, message, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    state = {name: value.clone() for name, value in Net(seed=1).state_dict().items()}
    change(state)
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, path)
    model = Net(seed=3)
    with pytest.raises(LTDError, match=message):
        load_clean(model, path)
    assert_same(model.state_dict(), Net(seed=3).state_dict())


@pytest.mark.parametrize("content", [[1, 2], None, torch.ones(3), dict.fromkeys(Net().state_dict(), 1)])
def test_a_file_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(LTDError, match=r"model\.pt"):
        load_clean(Net(), tmp_path / "model.pt")
