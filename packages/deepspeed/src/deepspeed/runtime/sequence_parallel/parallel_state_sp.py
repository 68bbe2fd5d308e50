"""The groups of a job whose neighbouring ranks share sequences, as a module that is an mpu.

Upstream's module of this name, which `UlyssesSPAttentionHF.register_with_transformers` returns and
`deepspeed.initialize(mpu=...)` takes. Owns the grid of the process's world; a new world begins without one. It has no
`get_data_parallel_*`, so that batch sizes are counted over world / sequence-parallel ranks. Its model-parallel names
are upstream's second names for the ranks that share a sequence; no model is split.
"""

from __future__ import annotations

from typing import Any

import ds_comm
from deepspeed._lazy import explain_absent
from deepspeed.errors import ConfigConflictError
from deepspeed.sequence.ranks import SequenceGrid

__all__ = [
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
    "get_sequence_data_parallel_group",
    "get_sequence_data_parallel_rank",
    "get_sequence_data_parallel_world_size",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "initialize_sequence_parallel",
]

_held: tuple[Any, SequenceGrid] | None = None


def initialize_sequence_parallel(sequence_parallel_size: int) -> None:
    """Make the groups; collective. Again with the same size: nothing.

    Raises:
        ConfigConflictError: the world is no multiple of the size, or there are groups of another size.
    """
    global _held
    world = ds_comm.get_world_group()
    if _held is not None and _held[0] is world:
        size = _held[1].get_sequence_parallel_world_size()
        if size != sequence_parallel_size:
            raise ConfigConflictError(
                f"sequence-parallel groups of {size} ranks exist, and {sequence_parallel_size} were asked for; a"
                " process has one such size: give deepspeed.initialize(mesh_param=...) to an engine with another"
            )
        return
    _held = (world, SequenceGrid(sequence_parallel_size))


def _release_sequence_parallel_groups() -> None:
    """Forget the groups, so that another size can be initialised."""
    global _held
    _held = None


def _grid() -> SequenceGrid:
    if _held is None or _held[0] is not ds_comm.get_world_group():
        raise ds_comm.CommError(
            "there are no sequence-parallel groups; call initialize_sequence_parallel(size) first, or"
            " UlyssesSPAttentionHF.register_with_transformers, which does"
        )
    return _held[1]


def get_sequence_parallel_group() -> Any:
    """The ranks that share this rank's sequence."""
    return _grid().get_sequence_parallel_group()


def get_sequence_parallel_world_size() -> int:
    """Ranks that share a sequence."""
    return _grid().get_sequence_parallel_world_size()


def get_sequence_parallel_rank() -> int:
    """This rank's place in its sequence."""
    return _grid().get_sequence_parallel_rank()


def get_sequence_data_parallel_group() -> Any:
    """The ranks that gradients are averaged over: all."""
    return _grid().get_sequence_data_parallel_group()


def get_sequence_data_parallel_world_size() -> int:
    """Ranks that gradients are averaged over."""
    return _grid().get_sequence_data_parallel_world_size()


def get_sequence_data_parallel_rank() -> int:
    """This rank among all."""
    return _grid().get_sequence_data_parallel_rank()


get_model_parallel_group = get_sequence_parallel_group
get_model_parallel_world_size = get_sequence_parallel_world_size
get_model_parallel_rank = get_sequence_parallel_rank

explain_absent(__name__)
