"""The untransformed model's keys: which parts of a name in a state_dict are wrappers', and which the model's own."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ltd_fx.errors import LTDError
from ltd_fx.torch_private import CHECKPOINT_WRAPPED_MODULE, FSDP_WRAPPED_MODULE, ORIG_MOD, child_slots

_AVERAGES = "n_averaged"  # AveragedModel keeps its count of averages beside the weights.
# The child that each wrapper holds the model in, by the wrapper's package and class: none of them is imported for it.
_HOLDS = {
    ("torch", "OptimizedModule"): ORIG_MOD,
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("torch", "ActivationWrapper"): CHECKPOINT_WRAPPED_MODULE,
    ("torch", "FullyShardedDataParallel"): FSDP_WRAPPED_MODULE,
    ("deepspeed", "DeepSpeedEngine"): "module",
    ("deepspeed", "RandomLayerTokenDrop"): "random_ltd_layer",
    ("ltd_fx", "RandomLayerTokenDrop"): "random_ltd_layer",
    ("timm", "ModelEmaV2"): "module",
    ("timm", "ModelEmaV3"): "module",
    ("lightning", "_FabricModule"): "_original_module",
    ("lightning_fabric", "_FabricModule"): "_original_module",
}
# Those whose own state_dict leaves that child's name out, and whose load_state_dict puts it in again.
_HIDDEN = frozenset((CHECKPOINT_WRAPPED_MODULE, FSDP_WRAPPED_MODULE, "_original_module"))
# What is taken for a wrapper's in the keys of a bare state_dict, where there is no module to ask.
_COMPONENTS = frozenset((ORIG_MOD, CHECKPOINT_WRAPPED_MODULE, FSDP_WRAPPED_MODULE, "random_ltd_layer"))


def clean_state_dict(model_or_state_dict: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The state under the untransformed model's keys.

    Of a model, takes out the path components that ``torch.compile``, DDP, FSDP, activation checkpointing, weight
    averaging (``AveragedModel``, timm's ``ModelEmaV2`` and ``V3``), Lightning's Fabric, DeepSpeed's engine and its
    random-LTD add, wherever they wrap a module of it. Its own modules keep their names, whatever these are.

    Of a bare state_dict, nothing tells a wrapper's component from a module of that name: those that begin with ``_``
    and DeepSpeed's are taken out everywhere, a leading ``module`` if every key has it. Give the model, if it has
    modules called so.

    Values stay what they are: a sharded model's (FSDP2, tensor parallel) are ``DTensor``, as
    ``torch.distributed.checkpoint`` takes them. ``AveragedModel``'s ``n_averaged`` is no weight, and left out.

    Args:
        model_or_state_dict: a module, wrapped or not, or what its ``state_dict()`` gave; it stays as it is.

    Returns:
        The same tensors, by name.

    Raises:
        LTDError: two keys become the same, or ZeRO-3 holds parts of the parameters.
    """
    if isinstance(model_or_state_dict, nn.Module):
        check_whole(model_or_state_dict)
        state = model_or_state_dict.state_dict()
        return _renamed(state, [own_name(model_or_state_dict, key) for key in state])
    if not isinstance(model_or_state_dict, Mapping):
        raise LTDError(
            f"ltd_fx: a {type(model_or_state_dict).__name__} is neither a module nor a state_dict; give the module "
            "that it holds"
        )
    names = [_strip(key, _COMPONENTS) for key in model_or_state_dict]
    return _renamed(model_or_state_dict, _without_module(_without_averages(names)))


def unwrapped(model: nn.Module) -> nn.Module:
    """What the wrappers around the whole of ``model`` hold; FSDP1's, which loads and saves what it shards, stays."""
    while (held := held_by(model)) is not None and held != FSDP_WRAPPED_MODULE:
        model = model.get_submodule(held)
    return model


def check_whole(model: nn.Module) -> None:
    """Raise :class:`LTDError` if ZeRO-3 holds parts of the model's parameters."""
    for name, p in model.named_parameters():
        if getattr(p, "ds_shape", p.shape) != p.shape:
            raise LTDError(
                f"ltd_fx: {name} is partitioned by DeepSpeed's ZeRO-3; save and load within "
                "deepspeed.zero.GatheredParameters(model.parameters(), modifier_rank=0), on every rank"
            )


def own_name(model: nn.Module, key: str) -> str | None:
    """The untransformed model's name for ``key`` of the model's state_dict; ``None`` where that is no weight of it."""
    module: nn.Module | None = model
    own = []
    for part in key.split("."):
        held = None
        while module is not None and (held := held_by(module)) in _HIDDEN:
            module = module.get_submodule(str(held))
        if held == "module" and part == _AVERAGES:
            return None
        if part != held:
            own.append(part)
        # It is None where a tensor's name is all that is left.
        module = None if module is None else child_slots(module).get(part)
    return ".".join(own)


def held_by(module: nn.Module) -> str | None:
    """The name of the child that ``module`` wraps, if it is one of the known wrappers."""
    names = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(module).__mro__)
    return next((_HOLDS[name] for name in names if name in _HOLDS), None)


def without_components(state: Mapping[str, Any], components: frozenset[str]) -> dict[str, Any]:
    """``state`` with each of ``components`` taken out of its keys wherever it stands as a whole path component.

    Raises:
        LTDError: two keys become the same.
    """
    return _renamed(state, [_strip(key, components) for key in state])


def _strip(key: str, components: frozenset[str]) -> str:
    return ".".join(part for part in key.split(".") if part not in components)


def _without_averages(names: list[str]) -> list[str | None]:
    """Without the count and the ``module`` of each ``AveragedModel``: whatever has these two children and no others."""
    own: list[str | None] = list(names)
    counts = [name for name in names if name.split(".")[-1] == _AVERAGES]
    # An average may be one of an average; they are taken off from the inside.
    for count in sorted(counts, key=lambda name: -name.count(".")):
        outer = count.removesuffix(_AVERAGES)
        held = f"{outer}module."
        within = [i for i, name in enumerate(own) if name is not None and name.startswith(outer) and name != count]
        if within and all(str(own[i]).startswith(held) for i in within):
            own = [outer + str(name).removeprefix(held) if i in within else name for i, name in enumerate(own)]
            own[names.index(count)] = None
    return own


def _without_module(names: list[str | None]) -> list[str | None]:
    while names and all(name is None or name.startswith("module.") for name in names):
        names = [name and name.removeprefix("module.") for name in names]
    return names


def _renamed(state: Mapping[str, Any], names: list[str | None]) -> dict[str, Any]:
    origin: dict[str, str] = {}
    for key, name in zip(state, names, strict=True):
        if name is None:
            continue
        if name in origin:
            raise LTDError(f"ltd_fx: {origin[name]!r} and {key!r} both become {name!r}; rename or drop one of them")
        origin[name] = key
    return {name: state[key] for name, key in origin.items()}
