"""How the ranks of a save or load agree: one small Protocol, so that plans and tests need no process group.

Collectives are used only inside the calls that the training loop makes (prepare, written, loaded). What happens in
the background goes through files (ds_zero.checkpoint.commit), because the training loop owns the process group.
"""

from __future__ import annotations

from typing import Any, Protocol

import ds_comm

__all__ = ["GroupPeers", "Peers", "SoloPeers", "peers_of"]


class Peers(Protocol):
    """The ranks that write or read one checkpoint together."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, value: Any, *, label: str) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""


class SoloPeers:
    """One rank."""

    rank = 0
    size = 1

    def all_gather(self, value: Any, *, label: str) -> list[Any]:
        return [value]


class GroupPeers:
    """The ranks of a process group (None: all)."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank: int = ds_comm.get_rank(group)
        self.size: int = ds_comm.get_world_size(group)

    def all_gather(self, value: Any, *, label: str) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        ds_comm.all_gather_object(gathered, value, group=self._group, label=label)
        return gathered


def peers_of(group: Any = None) -> Peers:
    """The peers of `group`, or a single rank when no process group is initialised."""
    if not ds_comm.is_initialized() or ds_comm.get_world_size(group) == 1:
        return SoloPeers()
    return GroupPeers(group)
