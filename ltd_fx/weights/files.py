"""Weights in and out of files, under the untransformed model's keys; written atomically."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ltd_fx.errors import LTDError
from ltd_fx.runtime import gather_from_ranks
from ltd_fx.weights.keys import check_whole, clean_state_dict, own_name, unwrapped

_ALIAS = "alias:"  # This key in a safetensors file's metadata marks a name that shares another's tensor.


def save_clean(model_or_state_dict: nn.Module | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write :func:`clean_state_dict` to ``path``: safetensors for the suffix ``.safetensors``, else ``torch.save``.

    Tensors that share memory (tied weights) are stored once; safetensors keeps the other names in its metadata. The
    file appears whole or not at all: an existing one stays as it is until the new one is complete. A process that is
    killed meanwhile leaves its unfinished one beside it, under a hidden name that nothing reads.

    Of a sharded model (FSDP2, tensor parallel) it is a collective: every rank must call it, and the first writes whole
    tensors, gathered one by one to its CPU. Of any other, a rank that calls it writes.

    Args:
        model_or_state_dict: as :func:`clean_state_dict` takes it.
        path: ends in ``.safetensors`` or ``.pt``.

    Raises:
        LTDError: the suffix is neither ``.safetensors`` nor ``.pt``, the path cannot be written (on every rank), or
            ZeRO-3 holds parts of the parameters.
    """
    path = Path(path)
    state = clean_state_dict(model_or_state_dict)
    meshes = [value.device_mesh for value in state.values() if _is_sharded(value)]
    if not meshes:
        _save(state, path)
        return
    mesh = max(meshes, key=lambda mesh: mesh.size())
    first = not any(mesh.get_coordinate() or ())
    whole = {}
    for name, value in state.items():
        value = value.full_tensor() if _is_sharded(value) else value
        if first:
            whole[name] = value.cpu() if isinstance(value, Tensor) else value
    error = None
    if first:
        try:
            _save(whole, path)
        except LTDError as raised:
            error = str(raised)
    for rank, message in gather_from_ranks(error, mesh):
        if message is not None:
            raise LTDError(f"{message} (rank {rank})")


def _save(state: dict[str, Any], path: Path) -> None:
    other = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if _is_safetensors(path) and other is not None:
        raise LTDError(f"ltd_fx.save_clean: {other!r} is no tensor, which safetensors cannot hold; save to a .pt file")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
    except OSError as error:
        raise LTDError(f"ltd_fx.save_clean: {path} cannot be written: {error}") from error
    try:
        if _is_safetensors(path):
            tensors, aliases = _without_aliases(state)
            save_file(tensors, name, metadata={"format": "pt", **{_ALIAS + key: kept for key, kept in aliases.items()}})
        else:
            torch.save(state, name)
        os.chmod(name, 0o666 & ~_umask())
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(name, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk.
        raise LTDError(f"ltd_fx.save_clean: {path} cannot be written: {error}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def load_clean(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what :func:`save_clean` wrote, into a model wrapped, transformed, sharded, or none of them.

    Each rank reads the file, and a sharded model takes its part of each tensor: no rank waits for another.

    Args:
        model: is given the weights, in place.
        path: ends in ``.safetensors`` or ``.pt``.

    Raises:
        LTDError: the file cannot be read, its keys or shapes are not the model's, or ZeRO-3 holds parts of its
            parameters; the model is untouched then.
    """
    path = Path(path)
    _is_safetensors(path)
    loaded = read_checkpoint(path)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise LTDError(f"ltd_fx.load_clean: {path} holds no weights; it must be a mapping from names to tensors")
    check_whole(model)
    model = unwrapped(model)
    own = model.state_dict()
    names = {key: own_name(model, key) for key in own}
    expected = {name for name in names.values() if name is not None}
    missing, unexpected = sorted(expected - loaded.keys()), sorted(loaded.keys() - expected)
    if missing or unexpected:
        raise LTDError(f"ltd_fx.load_clean: {path} is of another model: missing {missing}, unexpected {unexpected}")
    for key, value in own.items():
        name = names[key]
        if name is None:
            continue
        if isinstance(value, Tensor) and value.shape != loaded[name].shape:
            raise LTDError(
                f"ltd_fx.load_clean: {path} is of another model: {name} is {tuple(loaded[name].shape)} there, "
                f"{tuple(value.shape)} here"
            )
        own[key] = _placed_as(value, loaded[name])
    # The longest goes first: a wrapper that puts its child's name in again must not meet a module of that name.
    model.load_state_dict(dict(sorted(own.items(), key=lambda item: -item[0].count("."))))


def _placed_as(own: Any, value: Tensor) -> Tensor:
    """``value`` sharded as ``own`` is, or as it is."""
    if not _is_sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _is_sharded(value: Any) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor  # `import torch` leaves this module out.

    return isinstance(value, DTensor)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """What a checkpoint file holds, on the CPU: tensors by name of a ``.safetensors`` file, else of ``torch.save``.

    Raises:
        LTDError: the file cannot be read, or holds more than tensors and plain values.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # A damaged file raises nearly anything.
        raise LTDError(f"ltd_fx: {path} cannot be read: {error}") from error


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, contiguous and in memory of its own; and other name -> name for the rest."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    storages: set[Any] = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        memory = (tensor.device, storage.data_ptr())
        identity = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        alone = memory not in storages and tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        storages.add(memory)
        tensors[name] = tensor.detach() if alone else tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        metadata = file.metadata() or {}
    aliases = {key.removeprefix(_ALIAS): kept for key, kept in metadata.items() if key.startswith(_ALIAS)}
    return {**loaded, **{name: loaded[kept] for name, kept in aliases.items()}}


def _is_safetensors(path: Path) -> bool:
    if path.suffix not in (".safetensors", ".pt"):
        raise LTDError(f"ltd_fx: {path} must end in .safetensors or .pt")
    return path.suffix == ".safetensors"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
