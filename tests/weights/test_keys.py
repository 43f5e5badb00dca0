"""Clean keys: wrappers in any order and at any depth, around models whose own modules have the wrappers' names."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import decoder
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

import ltd_fx
from ltd_fx import LTDError, clean_state_dict, load_clean, save_clean
from ltd_fx.deepspeed import RandomLayerTokenDrop, convert_to_random_ltd, save_without_random_ltd

Wrap = Callable[[nn.Module], nn.Module]
NAMES = ("module", "_orig_mod", "random_ltd_layer", "n_averaged", "_forward_module", "inner")
TORCHS_OWN = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # FSDP1 itself takes these for its own


class Odd(nn.Module):
    """Its modules are called as wrappers call theirs."""

    def __init__(self, *names: str, depth: int = 1) -> None:
        super().__init__()
        for name in (*NAMES, *names):
            inner = depth and name in ("module", "inner")
            self.add_module(name, Odd(*names, depth=depth - 1) if inner else nn.Linear(2, 2))
        self.weight = nn.Parameter(torch.randn(2))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[no-any-return]


def fsdp(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fabric(model: nn.Module) -> nn.Module:
    return pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1).setup(model)  # type: ignore[no-any-return]


def timm_average(name: str) -> Wrap:
    # RuntimeError: a torchvision that does not fit the installed torch
    return lambda model: getattr(pytest.importorskip("timm.utils", exc_type=(ImportError, RuntimeError)), name)(model)


class DeepSpeedEngine(nn.Module):
    """As DeepSpeed's holds the model."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPPERS: dict[str, Wrap] = {
    "compiled": compiled,
    "ddp": nn.parallel.DistributedDataParallel,
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "ModelEmaV2": timm_average("ModelEmaV2"),
    "ModelEmaV3": timm_average("ModelEmaV3"),
    "checkpointed": checkpoint_wrapper,
    "offloaded": offload_wrapper,
    "random-ltd": RandomLayerTokenDrop,
    "engine": DeepSpeedEngine,
    "fsdp": fsdp,
    "fabric": fabric,
}


@pytest.fixture(autouse=True, scope="module")
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def within(wrap: Wrap) -> Wrap:
    def wrapped(model: nn.Module) -> nn.Module:
        model.inner.module = wrap(model.inner.module)
        model.module = wrap(model.module)
        model._orig_mod = wrap(model._orig_mod)
        return model

    return wrapped


def copy_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def check(wrap: Wrap, build: Callable[[], nn.Module], folder: Path) -> None:
    """The keys and values of the wrapped model are the model's; saved and loaded into a wrapped and a plain one."""
    plain = build()
    expected = copy_of(plain.state_dict())
    wrapped = wrap(plain)
    found = clean_state_dict(wrapped)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    save_clean(wrapped, folder / "model.safetensors")
    for other in (build(), wrap(build())):
        load_clean(other, folder / "model.safetensors")
        loaded = clean_state_dict(other)
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_around_a_model_that_has_wrappers_names(name: str, tmp_path: Path) -> None:
    wrap = WRAPPERS[name]
    names = () if name == "fsdp" else TORCHS_OWN
    check(lambda model: model, lambda: Odd(*names), tmp_path)
    check(wrap, lambda: Odd(*names), tmp_path)
    if name != "fabric":  # what it sets up loads by itself only
        check(within(wrap), lambda: Odd(*names), tmp_path)
        check(lambda model: wrap(within(wrap)(model)), lambda: Odd(*names), tmp_path)


@pytest.mark.parametrize("pair", itertools.permutations(WRAPPERS, 2), ids="{0[0]} of {0[1]}".format)
def test_wrappers_in_any_order(pair: tuple[str, str], tmp_path: Path) -> None:
    if pair in {("averaged", "fsdp"), ("ModelEmaV2", "fsdp"), ("ModelEmaV3", "fsdp"), ("fsdp", "fabric")}:
        pytest.skip("FSDP1 can neither be copied, nor shard what overrides state_dict")
    outer, inner = (WRAPPERS[name] for name in pair)
    check(lambda model: outer(inner(model)), Odd, tmp_path)


def test_a_model_and_its_average_side_by_side(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"model": nn.Linear(2, 2), "average": AveragedModel(compiled(nn.Linear(2, 2)))})

    names = ["average.bias", "average.weight", "model.bias", "model.weight"]
    model, other = build(), build()
    assert sorted(clean_state_dict(model)) == sorted(clean_state_dict(model.state_dict())) == names
    model["average"].n_averaged.fill_(3)
    save_clean(model, tmp_path / "model.pt")
    load_clean(other, tmp_path / "model.pt")
    assert torch.equal(other["average"].module.weight, model["average"].module.weight)
    assert other["average"].n_averaged == 0


@pytest.mark.parametrize("name", ["averaged", "ModelEmaV3"])
def test_the_average_of_a_transformed_model(name: str, tmp_path: Path) -> None:
    """Its weights load into the plain model, and it is routed with tokens of its own in training."""
    build = decoder("Llama", tie_word_embeddings=True)
    expected = copy_of(build().state_dict())
    model = ltd_fx.transform(build())
    average = WRAPPERS[name](model)
    assert clean_state_dict(average).keys() == expected.keys()
    save_clean(average, tmp_path / "model.safetensors")
    plain = build()
    load_clean(plain, tmp_path / "model.safetensors")
    assert all(torch.equal(value, clean_state_dict(model)[name]) for name, value in plain.state_dict().items())
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_what_deepspeeds_names_save(tmp_path: Path) -> None:
    for wrap in (lambda model: model, nn.DataParallel, DeepSpeedEngine):
        model = Odd()
        expected = model.state_dict().keys()
        assert convert_to_random_ltd(wrap(model), Odd) is not None
        assert any(isinstance(module, RandomLayerTokenDrop) for module in model.modules())
        assert save_without_random_ltd(wrap(model)).keys() == expected


def test_a_model_with_a_module_called_as_compiled_ones_is_transformed() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = decoder("Llama")()

    assert ltd_fx.is_transformed(ltd_fx.transform(Holder()))


@pytest.mark.parametrize(
    ("key", "clean"),
    [
        ("_orig_mod.a.b", "a.b"),
        ("module.a.b", "a.b"),
        ("_orig_mod.module._orig_mod.a", "a"),
        ("a._checkpoint_wrapped_module.b", "a.b"),
        ("a._fsdp_wrapped_module._checkpoint_wrapped_module.b", "a.b"),
        ("a.random_ltd_layer.b", "a.b"),
        ("a.my_random_ltd_layer.b", "a.my_random_ltd_layer.b"),
        ("a.random_ltd_layers.b", "a.random_ltd_layers.b"),
        ("a._orig_mod2.b", "a._orig_mod2.b"),
        ("a.x_checkpoint_wrapped_module.b", "a.x_checkpoint_wrapped_module.b"),
        ("a.module.b", "a.module.b"),
        ("modules.a", "modules.a"),
        ("module_a.b", "module_a.b"),
    ],
)
def test_only_whole_components_are_stripped(key: str, clean: str) -> None:
    assert clean_state_dict({key: 1}) == {clean: 1}


@pytest.mark.parametrize(
    ("keys", "clean"),
    [
        (("module.a", "head"), ("module.a", "head")),
        ((), ()),
        (("n_averaged", "module.a"), ("a",)),
        (("n_averaged", "module._orig_mod.a"), ("a",)),
        (("_orig_mod.n_averaged", "_orig_mod.module.a"), ("a",)),
        (("module.n_averaged", "module.module.a"), ("a",)),
        (("n_averaged", "module.n_averaged", "module.a"), ("n_averaged", "a")),
        (("n_averaged", "module.n_averaged", "module.module.a"), ("a",)),
        (("m.a", "ema.n_averaged", "ema.module.a"), ("m.a", "ema.a")),
        (("n_averaged", "module.a", "head"), ("n_averaged", "module.a", "head")),
        (("n_averaged",), ("n_averaged",)),
    ],
)
def test_bare_state_dicts(keys: tuple[str, ...], clean: tuple[str, ...]) -> None:
    assert tuple(clean_state_dict(dict.fromkeys(keys, 1))) == clean


@pytest.mark.parametrize(
    "keys",
    [
        ("a.random_ltd_layer.b", "a.b"),
        ("_orig_mod.a", "a"),
        ("module.a._orig_mod.b", "module.a.b"),
        ("module._orig_mod.a", "_orig_mod.module.a"),
        ("m.n_averaged", "m.module.a", "m._orig_mod.module.a"),
    ],
)
def test_colliding_keys(keys: tuple[str, ...]) -> None:
    with pytest.raises(LTDError, match="both become"):
        clean_state_dict(dict.fromkeys(keys, 1))


def test_a_wrappers_own_tensor_is_kept_or_refused() -> None:
    class Scaled(nn.DataParallel):
        def __init__(self, module: nn.Module, name: str) -> None:
            super().__init__(module)
            self.register_buffer(name, torch.ones(1))

    assert sorted(clean_state_dict(Scaled(nn.Linear(2, 2), "scale"))) == ["bias", "scale", "weight"]
    with pytest.raises(LTDError, match=r"'bias' and 'module\.bias' both become 'bias'"):
        clean_state_dict(Scaled(nn.Linear(2, 2), "bias"))


def test_what_is_neither_module_nor_state_dict() -> None:
    with pytest.raises(LTDError, match="a function is neither a module nor a state_dict"):
        clean_state_dict(compiled)  # type: ignore[arg-type]
