"""A world of any size in one process: torch's "fake" process group, whose collectives return at once and move nothing.

It is for *plans*: which collectives a rank issues, in what order, with how many bytes (read them from the ledger), at
1,024 ranks as at two. It is not for numbers: after an `all_reduce` the tensor holds what it held before.

Invariants
  - The world exists inside the `with` block only; afterwards, and after an error, all is as before.
  - No process, port or file is involved, so worlds of a thousand ranks cost milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  (registers the "fake" backend)

import ds_comm


@contextmanager
def fake_world(rank: int = 0, world_size: int = 8, *, ranks_per_node: int | None = None) -> Iterator[None]:
    """Make this process rank `rank` of a fake world of `world_size` ranks.

    `ranks_per_node` (default: all on one node) sets LOCAL_RANK and LOCAL_WORLD_SIZE; RANK and WORLD_SIZE are set too.

    Raises:
        ValueError: `rank` is not in the world, or `ranks_per_node` does not divide it.
        RuntimeError: this process is in a world already.
    """
    local_size = world_size if ranks_per_node is None else ranks_per_node
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank} is not in a world of world_size={world_size}; need 0 <= rank < world_size")
    if local_size < 1 or world_size % local_size:
        raise ValueError(f"ranks_per_node={ranks_per_node} does not divide world_size={world_size}")
    if dist.is_initialized():
        raise RuntimeError(
            f"this process is already rank {dist.get_rank()} of {dist.get_world_size()}; leave that world first "
            "(ds_comm.destroy_process_group())"
        )
    environment = dict(os.environ)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank % local_size), LOCAL_WORLD_SIZE=str(local_size))
    try:
        # Not torch's FakeStore: that one cannot even answer `set`, which code above a group may use.
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing in torch's export list
        dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
        ds_comm.init_distributed()
        yield
    finally:
        if dist.is_initialized():
            ds_comm.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)
