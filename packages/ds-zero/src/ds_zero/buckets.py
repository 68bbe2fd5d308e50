"""How gradients are cut into buckets, and the windows that they travel in. Pure.

A *bucket* is a range of columns of a unit's flat seen as a table with one row per shard (one row in all at stage 0), so
what a rank keeps of it is contiguous; it is one collective. Buckets travel in *windows*, of which there are
`ring_depth` for each size and dtype once a run is warm: a rank can be so many buckets ahead of the slowest.
"""

from __future__ import annotations

from collections.abc import Iterator

from ds_zero.layout import ALIGNMENT, ShardMap, UnitLayout

__all__ = ["bucket_limit", "bucket_ranges", "num_rows_of", "ring_depth", "window_nbytes"]

SHM_BUCKET_NUMEL = 1 << 20
"""Largest bucket in shared memory: meetings are cheap there, and windows are memory."""

SHM_DEPTH = 8
"""Buckets that a rank may run ahead in shared memory, about two transformer blocks; elsewhere a unit is a bucket."""

COPY_DEPTH = 2
"""The same where a collective copies: one bucket travels while the next is filled."""


def bucket_limit(kind: str, configured: int) -> int:
    """Most elements of a bucket on a transport, of `reduce_bucket_size` elements."""
    return min(configured, SHM_BUCKET_NUMEL) if kind == "shm" else configured


def ring_depth(kind: str) -> int:
    """Windows of each size on a transport."""
    return SHM_DEPTH if kind == "shm" else COPY_DEPTH


def num_rows_of(shard_map: ShardMap, unit: UnitLayout) -> int:
    """Rows of the table that buckets cut into columns: one per shard, or one where nothing is sharded."""
    start, stop = shard_map.state_range(unit, 0)
    return unit.padded_numel // (stop - start)


def bucket_ranges(unit: UnitLayout, num_rows: int, limit: int) -> Iterator[slice]:
    """The columns of each bucket of at most `limit` elements, each a multiple of what the ranks share."""
    width = unit.padded_numel // num_rows
    quantum = ALIGNMENT if num_rows > 1 else ALIGNMENT * unit.num_shards
    step = max(limit // num_rows // quantum, 1) * quantum
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))


def window_nbytes(shard_map: ShardMap, kind: str, limit: int, itemsizes: dict[str, int]) -> int:
    """Bytes of this rank's windows once every ring is full; `limit` as for `bucket_ranges`."""
    sizes: set[tuple[int, str]] = set()
    for unit in shard_map.units:
        if unit.trainable:
            rows = num_rows_of(shard_map, unit)
            sizes |= {(rows * (b.stop - b.start), unit.dtype) for b in bucket_ranges(unit, rows, limit)}
    return ring_depth(kind) * sum(numel * itemsizes[dtype] for numel, dtype in sizes)
