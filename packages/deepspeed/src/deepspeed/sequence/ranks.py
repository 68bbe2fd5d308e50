"""Which ranks share a sequence, which share the data, and over which all of them gradients are averaged.

    ranks of a world of 4, two to a sequence        sequence groups 0 1 | 2 3        data-parallel groups 0 2 | 1 3

Every rank has its own tokens, so ZeRO shards over, and averages over, the ranks of both kinds together (upstream's
"sequence data parallel" group): the whole world unless the model is split in other ways too. Batches are counted, and
dealt by the engine's loader, once for each group that shares a sequence.

Owns `SequenceGrid`, the mpu of a job that is told sizes only, and `data_ranks`, which asks any mpu.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import ds_comm
import ds_comm.device
from deepspeed.errors import ConfigConflictError, DeepSpeedConfigError

__all__ = ["DataRanks", "SequenceGrid", "data_ranks", "is_model_parallel", "requested_grid"]


class SequenceGrid:
    """An mpu: neighbouring ranks share a sequence, ranks with the same place in it form a data-parallel group.

    Collective to make. `mesh` is the DeviceMesh with the axes "data_parallel" and "sequence_parallel".
    """

    def __init__(self, size: int, data_size: int | None = None) -> None:
        """`size`: ranks that share a sequence. ConfigConflictError unless it times `data_size` is the world."""
        world = ds_comm.get_world_size()
        if size < 1 or world % size or data_size not in (None, world // size):
            given = f"{size} ranks to a sequence" + ("" if data_size is None else f" and {data_size} sequences at once")
            raise ConfigConflictError(
                f"{given} do not make {world} ranks: start a multiple of {size} ranks, or change sequence_parallel_size"
                " (data_parallel_size, mesh_param) so that the product is their number"
            )
        kind = ds_comm.device.device_type()
        names = ("data_parallel", "sequence_parallel")
        self.mesh: DeviceMesh = init_device_mesh(kind, (world // size, size), mesh_dim_names=names)

    def get_sequence_parallel_group(self) -> Any:
        return self.mesh.get_group("sequence_parallel")

    def get_sequence_parallel_world_size(self) -> int:
        return int(self.mesh.size(1))

    def get_sequence_parallel_rank(self) -> int:
        return int(self.mesh.get_local_rank("sequence_parallel"))

    def get_data_parallel_group(self) -> Any:
        return self.mesh.get_group("data_parallel")

    def get_data_parallel_world_size(self) -> int:
        return int(self.mesh.size(0))

    def get_data_parallel_rank(self) -> int:
        return int(self.mesh.get_local_rank("data_parallel"))

    def get_sequence_data_parallel_group(self) -> Any:
        return ds_comm.get_world_group()

    def get_sequence_data_parallel_world_size(self) -> int:
        return ds_comm.get_world_size()

    def get_sequence_data_parallel_rank(self) -> int:
        return ds_comm.get_rank()


def requested_grid(mpu: Any, mesh_param: Any, raw: Mapping[str, Any]) -> SequenceGrid | None:
    """The grid that `initialize(mesh_param=(data, sequence))` or the config asks for; None without either; collective.

    Args:
        raw: the user's config; its sequence_parallel_size is looked at.
    Raises:
        DeepSpeedConfigError: mesh_param is no pair of sizes. ConfigConflictError: it, the config, mpu and the world
            do not go together.
    """
    if mesh_param is not None:
        pair = tuple(mesh_param) if isinstance(mesh_param, (tuple, list)) else ()
        if len(pair) != 2 or not all(isinstance(size, int) and size > 0 for size in pair):
            raise DeepSpeedConfigError(
                f"mesh_param is {mesh_param!r}; expected (data-parallel ranks, ranks that share a sequence)"
            )
    wanted = raw.get("sequence_parallel_size")
    wanted = wanted if isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0 else None
    sizes = {"mesh_param": mesh_param[1] if mesh_param else None, "sequence_parallel_size": wanted}
    if mpu is not None:
        sizes["mpu"] = _sequence_size(mpu)
    given = {name: size for name, size in sizes.items() if size is not None}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{name} says {size}" for name, size in given.items())
        raise ConfigConflictError(f"the ranks that share a sequence: {said}; make them equal, or give only one")
    if mpu is not None or not given or (mesh_param is None and wanted == 1):
        return None
    return SequenceGrid(next(iter(given.values())), None if mesh_param is None else mesh_param[0])


@dataclass(frozen=True)
class DataRanks:
    """A rank's place among the data.

    group: the ranks that gradients are averaged over (None: the world). size: batches that are read at the same time.
    rank: which of them this rank reads. sequence_size: ranks that read the same one.
    """

    group: Any
    size: int
    rank: int
    sequence_size: int = 1


def data_ranks(mpu: Any, group: Any) -> DataRanks:
    """The place that an mpu gives this rank; `group` is its data-parallel group. Collective where sequences are shared.

    Raises:
        ConfigConflictError: the groups are not all of one size, or the mpu's numbers contradict each other.
    """
    size = 1 if mpu is None else _sequence_size(mpu)
    if size == 1:
        return DataRanks(group, ds_comm.get_world_size(group), ds_comm.get_rank(group))
    ask = getattr(mpu, "get_sequence_data_parallel_group", None)
    whole = ds_comm.get_world_group() if ask is None else ask()
    mine = tuple(ds_comm.get_all_ranks_from_group(mpu.get_sequence_parallel_group()))
    told: list[Any] = [None] * ds_comm.get_world_size(whole)
    ds_comm.all_gather_object(told, mine, group=whole, label="sequence-parallel groups")
    shared = sorted(set(told))
    if sorted(rank for ranks in shared for rank in ranks) != sorted(ds_comm.get_all_ranks_from_group(whole)) or any(
        len(ranks) != size for ranks in shared
    ):
        raise ConfigConflictError(
            f"mpu says that {size} ranks share a sequence, and its groups are {shared}: expected groups of that size"
            f" with each of the {len(told)} ranks in one"
        )
    said = getattr(mpu, "get_data_parallel_world_size", None)
    if said is not None and int(said()) != len(shared):
        raise ConfigConflictError(
            f"mpu.get_data_parallel_world_size() is {int(said())}, but {len(told)} ranks in groups of {size} that share"
            f" a sequence read {len(shared)} batches at a time; it must not count the ranks of a sequence"
        )
    return DataRanks(whole, len(shared), shared.index(mine), size)


def _sequence_size(mpu: Any) -> int:
    ask = getattr(mpu, "get_sequence_parallel_world_size", None)
    return 1 if ask is None else int(ask())


def is_model_parallel(mpu: Any) -> bool:
    """Whether an mpu's model-parallel ranks have parts of a model: upstream's `parallel_state_sp` gives that name to
    the ranks that share a sequence.
    """
    model, sequence = (getattr(mpu, f"get_{kind}_parallel_group", None) for kind in ("model", "sequence"))
    return model is None or sequence is None or model() is not sequence()
