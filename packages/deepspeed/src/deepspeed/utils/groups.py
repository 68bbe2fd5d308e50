"""Process groups by role, under upstream's names.

Owns the module attribute `mpu`, the model-parallel unit given to `deepspeed.initialize`, and accessors that ask it.
An mpu is any object (or module) with some of `get_data_parallel_{group,world_size,rank}`,
`get_model_parallel_{...}`, `get_tensor_model_parallel_{...}`, `get_sequence_parallel_{...}` and
`get_sequence_data_parallel_{...}`; what it lacks is answered as for a purely data-parallel job: the whole world is the
data-parallel group and every other size is 1.

The underscore names are public in practice: transformers, accelerate and Megatron call them. Groups of size 1 are
made on first use and kept; accessors that return a group are collective on that first use.
"""

from __future__ import annotations

from typing import Any

import ds_comm
from deepspeed._lazy import explain_absent

mpu: Any = None
mesh_device: Any = None

_self_group: Any = None


def _ask(name: str) -> Any:
    """Bound accessor of the mpu, or None when there is no mpu or it does not know the name."""
    return getattr(mpu, name, None) if mpu is not None else None


def _own_group() -> Any:
    """A group of this rank alone. All ranks make all of these groups, in rank order, as torch requires."""
    global _self_group
    if ds_comm.get_world_size() == 1:
        return ds_comm.get_world_group()
    if _self_group is None:
        groups = [ds_comm.new_group([rank]) for rank in range(ds_comm.get_world_size())]
        _self_group = groups[ds_comm.get_rank()]
    return _self_group


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


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
get_model_parallel_group = get_tensor_model_parallel_group = _get_model_parallel_group
get_model_parallel_world_size = get_tensor_model_parallel_world_size = _get_model_parallel_world_size
get_model_parallel_rank = get_tensor_model_parallel_rank = _get_model_parallel_rank
get_tensor_model_parallel_src_rank = _get_tensor_model_parallel_src_rank

explain_absent(__name__)
