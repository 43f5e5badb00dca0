"""Which ranks of a distributed job draw alike, and whether all of them agree."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ltd_fx.errors import LTDError

# Mesh dimensions along which ranks hold other sequences, or (pp) other layers, and so draw differently.
_DIFFERENT = frozenset(
    ("dp", "ddp", "fsdp", "hsdp", "dp_replicate", "dp_shard", "replicate", "shard", "data_parallel", "pp")
)
# Those along which ranks share in the same sequences: tensor, sequence and context parallelism.
_ALIKE = frozenset(("tp", "sp", "cp", "tensor_parallel", "sequence_parallel", "context_parallel"))


def draw_rank(mesh: DeviceMesh) -> int:
    """This process's number among those of ``mesh`` that draw differently; 0 draws as a single process does.

    Raises:
        LTDError: a dimension has a name that does not tell, several have none, or this process is not in the mesh.
    """
    names = mesh.mesh_dim_names
    if names is None and mesh.ndim == 1:
        names = ("dp",)
    if names is None:
        raise LTDError(
            f"ltd_fx.transform: device_mesh has {mesh.ndim} dimensions without names; pass mesh_dim_names, such as "
            "('dp', 'tp'), to init_device_mesh"
        )
    unknown = [name for name in names if name not in _DIFFERENT | _ALIKE]
    if unknown:
        raise LTDError(
            f"ltd_fx.transform: device_mesh's dimension {unknown[0]!r} does not tell whether its ranks draw alike; "
            f"known are {', '.join(sorted(_DIFFERENT))} (each its own draws) and {', '.join(sorted(_ALIKE))} (alike). "
            "Pass the part of the mesh with such names (mesh['dp', 'tp']), or DeviceMesh.from_group(the data-parallel "
            "group, device_type), which has one dimension without a name"
        )
    place = mesh.get_coordinate()
    if place is None:
        raise LTDError(f"ltd_fx.transform: rank {dist.get_rank()} is not in device_mesh {mesh}")
    rank = 0
    for i, name in enumerate(names):
        if name in _DIFFERENT:
            rank = rank * mesh.size(i) + place[i]
    return rank


def gather_from_ranks(value: Any, mesh: DeviceMesh | None) -> list[tuple[int, Any]]:
    """Collective: (rank, its ``value``) of all ranks of ``mesh`` (``None``: all there are), by rank."""
    everyone = [(dist.get_rank(), value)]
    # The gathers go along one dimension of the mesh after the other.
    for group in [None] if mesh is None else mesh.get_all_groups():
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, everyone, group)
        everyone = [entry for entries in gathered for entry in entries]
    return sorted(everyone, key=lambda entry: entry[0])


def refuse_differences(values: Mapping[str, Any], mesh: DeviceMesh | None) -> None:
    """Collective: all ranks of ``mesh`` (``None``: all there are) have the same ``values``, which are plain Python.

    Raises:
        LTDError: on every rank, where any two differ.
    """
    (rank, expected), *others = gather_from_ranks(values, mesh)
    for other, theirs in others:
        for field, value in expected.items():
            if theirs.get(field) != value:
                raise LTDError(
                    f"ltd_fx: ranks {rank} and {other} differ in {field}: {value!r} and {theirs.get(field)!r}; build "
                    "the scheduler and call transform, step() and load_state_dict() alike on every rank"
                )
