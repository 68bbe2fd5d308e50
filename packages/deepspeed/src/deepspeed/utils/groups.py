"""Process groups by role, under upstream's names.

Owns the module attribute `mpu`, the model-parallel unit given to `deepspeed.initialize`, and accessors that ask it.
An mpu is any object (or module) with some of `get_data_parallel_{group,world_size,rank}`,
`get_model_parallel_{...}`, `get_tensor_model_parallel_{...}`, `get_sequence_parallel_{...}` and
`get_sequence_data_parallel_{...}`; what it lacks is answered as for a purely data-parallel job: the whole world is the
data-parallel group and every other size is 1.

Expert-parallel groups (`_create_expert_and_data_parallel`) divide the data-parallel ranks: `ep_size` neighbours are an
expert-parallel group, the ranks at the same place of those an expert-data-parallel one; data before expert, the other
way round. Layers of experts do not need them (`deepspeed.moe`), scripts may.

The underscore names are public in practice: transformers, accelerate and Megatron call them. Groups of size 1 are
made on first use and kept; accessors that return a group are collective on that first use.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ds_comm
from deepspeed._lazy import explain_absent

mpu: Any = None
mesh_device: Any = None
expert_tensor_parallel_world_size: int = 1

_self_group: tuple[Any, Any] | None = None


def _ask(name: str) -> Any:
    """Bound accessor of the mpu, or None when there is no mpu or it does not know the name."""
    return getattr(mpu, name, None) if mpu is not None else None


def _own_group() -> Any:
    """A group of this rank alone. All ranks make all of these groups, in rank order, as torch requires."""
    global _self_group
    if ds_comm.get_world_size() == 1:
        return ds_comm.get_world_group()
    world = ds_comm.get_world_group()
    if _self_group is None or _self_group[0] is not world:  # none yet, or of a world that is gone
        groups = [ds_comm.new_group([rank]) for rank in range(ds_comm.get_world_size())]
        _self_group = (world, groups[ds_comm.get_rank()])
    return _self_group[1]


def _get_data_parallel_group() -> Any:
    ask = _ask("get_data_parallel_group")
    return ask() if ask else ds_comm.get_world_group()


def _get_data_parallel_world_size() -> int:
    ask = _ask("get_data_parallel_world_size")
    return int(ask()) if ask else ds_comm.get_world_size(_get_data_parallel_group())


def _get_data_parallel_rank() -> int:
    ask = _ask("get_data_parallel_rank")
    return int(ask()) if ask else ds_comm.get_rank(_get_data_parallel_group())


def _get_data_parallel_group_ranks() -> list[int]:
    return list(ds_comm.get_all_ranks_from_group(_get_data_parallel_group()))


def _get_broadcast_src_rank() -> int:
    """Global rank of the first member of the data-parallel group."""
    return int(ds_comm.get_global_rank(_get_data_parallel_group(), 0))


def _get_model_parallel_group() -> Any:
    ask = _ask("get_model_parallel_group") or _ask("get_tensor_model_parallel_group")
    return ask() if ask else _own_group()


def _get_model_parallel_world_size() -> int:
    ask = _ask("get_model_parallel_world_size") or _ask("get_tensor_model_parallel_world_size")
    return int(ask()) if ask else 1


def _get_model_parallel_rank() -> int:
    ask = _ask("get_model_parallel_rank") or _ask("get_tensor_model_parallel_rank")
    return int(ask()) if ask else 0


def _get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor-parallel group."""
    return int(ds_comm.get_global_rank(_get_model_parallel_group(), 0))


def _get_sequence_parallel_group() -> Any:
    ask = _ask("get_sequence_parallel_group")
    return ask() if ask else _own_group()


def _get_sequence_parallel_world_size() -> int:
    ask = _ask("get_sequence_parallel_world_size")
    return int(ask()) if ask else 1


def _get_sequence_parallel_rank() -> int:
    ask = _ask("get_sequence_parallel_rank")
    return int(ask()) if ask else 0


def _get_sequence_data_parallel_group() -> Any:
    """Ranks over which gradients are averaged when sequences are split: the mpu's, else the data-parallel group."""
    ask = _ask("get_sequence_data_parallel_group")
    return ask() if ask else _get_data_parallel_group()


def _get_sequence_data_parallel_world_size() -> int:
    ask = _ask("get_sequence_data_parallel_world_size")
    return int(ask()) if ask else ds_comm.get_world_size(_get_sequence_data_parallel_group())


def _get_sequence_data_parallel_rank() -> int:
    ask = _ask("get_sequence_data_parallel_rank")
    return int(ask()) if ask else ds_comm.get_rank(_get_sequence_data_parallel_group())


# -- expert-parallel groups ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _ExpertGroups:
    """This rank's groups of one `ep_size`, made in `world`."""

    world: Any
    expert: Any
    data: Any


_expert_groups: dict[str, _ExpertGroups] = {}


def initialize(ep_size: int = 1, mpu: Any = None) -> None:
    """Upstream's old way to make expert-parallel groups; collective."""
    if mpu is None:
        _create_expert_and_data_parallel(ep_size)
    else:
        _create_expert_data_and_model_parallel(ep_size, mpu)


def _create_expert_data_and_model_parallel(
    expert_parallel_size_: int, mpu: Any, use_data_before_expert_parallel_: bool = False
) -> None:
    """The same within the data-parallel groups of an mpu, which is remembered; collective."""
    globals()["mpu"] = mpu
    _create_expert_and_data_parallel(
        expert_parallel_size_, use_data_before_expert_parallel_=use_data_before_expert_parallel_
    )


def _create_expert_and_data_parallel(
    expert_parallel_size_: int,
    mp_size: int | None = None,
    pp_size: int | None = None,
    mp_mode: str = "tp",
    use_data_before_expert_parallel_: bool = False,
) -> None:
    """Make the groups of an `ep_size`, named "ep_size_<n>"; collective. The three other sizes are the mpu's to know.

    Raises:
        ValueError: it does not divide the data-parallel ranks.
    """
    size, members = int(expert_parallel_size_), _get_data_parallel_group_ranks()
    if size < 1 or len(members) % size:
        raise ValueError(
            f"ep_size {size} does not divide the {len(members)} data-parallel ranks; start a multiple of {size} ranks,"
            " or change ep_size"
        )
    told: list[Any] = [None] * ds_comm.get_world_size()
    ds_comm.all_gather_object(told, members, label="data-parallel groups")
    made: list[Any] = [None, None]
    rank = ds_comm.get_rank()
    for peers in sorted({tuple(ranks) for ranks in told}):
        blocks = [list(peers[at : at + size]) for at in range(0, len(peers), size)]
        strides = [list(peers[at::size]) for at in range(size)]
        if use_data_before_expert_parallel_:
            replicas = len(peers) // size
            blocks = [list(peers[at::replicas]) for at in range(replicas)]
            strides = [list(peers[at : at + replicas]) for at in range(0, len(peers), replicas)]
        for kind, lists in enumerate((blocks, strides)):
            for ranks in lists:
                group = ds_comm.new_group(ranks)
                made[kind] = group if rank in ranks else made[kind]
    _expert_groups[f"ep_size_{size}"] = _ExpertGroups(ds_comm.get_world_group(), *made)


def _known_expert_groups() -> dict[str, _ExpertGroups]:
    """Those of the present world."""
    world = ds_comm.get_world_group() if ds_comm.is_initialized() else None
    return {name: found for name, found in _expert_groups.items() if found.world is world}


def _expert(group_name: str) -> _ExpertGroups:
    if group_name == "ep_size_1" and group_name not in _known_expert_groups():
        _expert_groups[group_name] = _ExpertGroups(ds_comm.get_world_group(), _own_group(), _get_data_parallel_group())
    known = _known_expert_groups()
    if group_name not in known:
        raise KeyError(
            f"no expert-parallel groups named {group_name!r}, only {sorted(known)}; deepspeed.initialize makes those of"
            " MoE layers, utils.groups._create_expert_and_data_parallel(ep_size) any others"
        )
    return known[group_name]


def _get_expert_parallel_group(group_name: str) -> Any:
    return _expert(group_name).expert


def _get_expert_parallel_group_dict() -> dict[str, Any]:
    return {name: found.expert for name, found in _known_expert_groups().items()}


def _get_expert_parallel_group_ranks(group_name: str) -> list[int]:
    return list(ds_comm.get_all_ranks_from_group(_get_expert_parallel_group(group_name)))


def _get_expert_parallel_world_size(group_name: str) -> int:
    return ds_comm.get_world_size(_get_expert_parallel_group(group_name))


def _get_expert_parallel_rank(group_name: str) -> int:
    return ds_comm.get_rank(_get_expert_parallel_group(group_name))


def _get_expert_parallel_src_rank(group_name: str) -> int:
    """Global rank of the first member of the expert-parallel group."""
    return _get_expert_parallel_group_ranks(group_name)[0]


def _get_expert_data_parallel_group(group_name: str) -> Any:
    return _expert(group_name).data


def _get_expert_data_parallel_group_dict() -> dict[str, Any]:
    return {name: found.data for name, found in _known_expert_groups().items()}


def _get_expert_data_parallel_group_ranks(group_name: str) -> list[int]:
    return list(ds_comm.get_all_ranks_from_group(_get_expert_data_parallel_group(group_name)))


def _get_expert_data_parallel_world_size(group_name: str) -> int:
    return ds_comm.get_world_size(_get_expert_data_parallel_group(group_name))


def _get_expert_data_parallel_rank(group_name: str) -> int:
    return ds_comm.get_rank(_get_expert_data_parallel_group(group_name))


def _get_expert_broadcast_src_rank(group_name: str) -> int:
    """Global rank of the first member of the expert-data-parallel group."""
    return _get_expert_data_parallel_group_ranks(group_name)[0]


def _get_max_expert_size() -> int:
    """The largest `ep_size` that has groups; ValueError before there are any."""
    sizes = [int(name.removeprefix("ep_size_")) for name in _known_expert_groups()]
    if not sizes:
        raise ValueError("there are no expert-parallel groups yet; deepspeed.initialize makes those of MoE layers")
    return max(sizes)


def _get_max_expert_size_name() -> str:
    return f"ep_size_{_get_max_expert_size()}"


def _get_max_expert_parallel_group() -> Any:
    return _get_expert_parallel_group(_get_max_expert_size_name())


def _get_expert_model_parallel_world_size() -> int:
    return expert_tensor_parallel_world_size


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
get_model_parallel_group = get_tensor_model_parallel_group = _get_model_parallel_group
get_model_parallel_world_size = get_tensor_model_parallel_world_size = _get_model_parallel_world_size
get_model_parallel_rank = get_tensor_model_parallel_rank = _get_model_parallel_rank
get_tensor_model_parallel_src_rank = _get_tensor_model_parallel_src_rank

explain_absent(__name__)
