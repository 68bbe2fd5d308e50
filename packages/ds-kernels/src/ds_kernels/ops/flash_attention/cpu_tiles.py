"""How the numba tiles are launched: one record per sequence, tiles numbered through all sequences and heads of keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch

__all__ = ["SequencePlace", "forward", "takes"]

TILE = 64
"""Rows of a tile that are aimed at: queries times the heads of a group."""


def takes(q: Tensor) -> bool:
    """Whether the tiles can compute attention of this dtype here."""
    return HAS_NUMBA and q.dtype in CODES


@dataclasses.dataclass(frozen=True)
class SequencePlace:
    """Where a sequence begins, in elements from the start of each tensor, how long it is, its row in a block table."""

    q: int
    out: int
    lse: int
    k: int
    v: int
    q_len: int
    k_len: int
    table: int = 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    places: Sequence[SequencePlace], table: Tensor | None, causal: bool, window: int, scale: float,
) -> bool:  # fmt: skip
    """Write out and lse of every sequence; False where a block table names a page that is not in the cache.

    q and out [batch, heads, len, dim], lse [batch, heads, len]; k and v [batch, kv_heads, k_len, dim], or with a block
    table (int32, contiguous) [pages, kv_heads, page_size, dim]; last dimensions contiguous.
    """
    from ds_kernels.ops.flash_attention.cpu_numba import FIELDS, forward

    heads, dim, kv_heads = q.shape[1], q.shape[3], k.shape[1]
    width = max(1, TILE // (heads // kv_heads))
    records, tiles = [], 0
    for place in places:
        records += [tiles, place.q, place.out, place.lse, place.k, place.v, place.q_len, place.k_len]
        records.append(place.table)
        tiles += kv_heads * -(-place.q_len // width)
    if not tiles:
        return True
    assert len(records) == FIELDS * len(places)
    described = torch.tensor([*records, 0])
    launch(
        forward, q, k, v, out, lse, described, 0 if table is None else table,
        len(places), heads, kv_heads, dim, CODES[q.dtype], int(causal), window, float(scale),
        q.stride(1), q.stride(2), k.stride(1), k.stride(2), v.stride(1), v.stride(2), out.stride(1), out.stride(2),
        lse.stride(1), 0 if table is None else k.shape[2], k.stride(0), v.stride(0),
        0 if table is None else table.stride(0), width, k.shape[0], items=tiles,
    )  # fmt: skip
    return int(described[-1]) == 0
