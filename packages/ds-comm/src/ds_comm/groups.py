"""Ranks and groups: torch.distributed's questions, answered also before there is a world."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.distributed as dist

from ds_comm._world import is_member, resolve
from ds_comm.errors import CommError

Group = dist.ProcessGroup | None


def get_rank(group: Group = None) -> int:
    """This process's rank in the group (None: global), -1 outside of it; before init, RANK or 0."""
    if not dist.is_initialized():
        return int(os.environ.get("RANK") or 0)
    return dist.get_rank(group) if is_member(group) else -1


def get_world_size(group: Group = None) -> int:
    """Ranks in the group (None: the world), -1 outside of it; before init, WORLD_SIZE or 1."""
    if not dist.is_initialized():
        return int(os.environ.get("WORLD_SIZE") or 1)
    return dist.get_world_size(group) if is_member(group) else -1


def get_local_rank() -> int:
    """This process's number on its host: LOCAL_RANK of the environment, or 0."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def get_world_group() -> dist.ProcessGroup:
    """The group of all ranks."""
    return resolve(None)


def new_group(ranks: Sequence[int] | None = None, *, backend: str | None = None) -> dist.ProcessGroup:
    """A group of these global ranks (None: all). Every rank of the *world* must call it, in the same order."""
    if not dist.is_initialized():
        raise CommError("there is no world yet; call ds_comm.init_distributed() before new_group()")
    group: dist.ProcessGroup = dist.new_group(None if ranks is None else list(ranks), backend=backend)
    return group


def get_global_rank(group: Group, group_rank: int) -> int:
    """The global rank of a group rank."""
    return dist.get_global_rank(resolve(group), group_rank)


def get_all_ranks_from_group(group: Group = None) -> list[int]:
    """The group's global ranks, by group rank."""
    return dist.get_process_group_ranks(resolve(group))
