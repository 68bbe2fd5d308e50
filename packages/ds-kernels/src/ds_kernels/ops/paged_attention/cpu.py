"""paged_attention on CPU: numba loops over the pages where they lie; without numba the pages are gathered first.

Sequences with one query go to the decoding loop (memory bound), those with more to the tiles of flash_attention.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ds_kernels._checks import require
from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.flash_attention import cpu as flash
from ds_kernels.ops.flash_attention import cpu_tiles
from ds_kernels.ops.flash_attention.cpu_tiles import SequencePlace
from ds_kernels.ops.paged_attention import reference

__all__ = ["paged_attention", "write_kv"]


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    cu_q: Tensor, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """As the reference, which takes fp64; the last dimension of q and of the caches is contiguous.

    Raises:
        KernelArgumentError: a context longer than its block table or below 0, a page that is not in the cache, or
            starts of queries that do not ascend within q.
    """
    ends, lengths = cu_q.tolist(), context_lens.tolist()
    capacity = block_tables.shape[1] * k_cache.shape[2]
    require(
        max(lengths, default=0) <= capacity,
        f"paged_attention: context_lens has {max(lengths, default=0)}; expected at most {capacity}, "
        f"{block_tables.shape[1]} pages of {k_cache.shape[2]} in a row of block_tables",
    )
    shortest = min(lengths, default=0)
    require(shortest >= 0, f"paged_attention: context_lens has {shortest}; expected 0 or more")
    queries = [b - a for a, b in pairwise(ends)]
    require(
        ends[0] >= 0 and ends[-1] <= len(q) and min(queries, default=0) >= 0,
        f"paged_attention: cu_seqlens_q is {ends}; expected an ascent from 0 to at most the number of tokens, {len(q)}",
    )
    if not cpu_tiles.takes(q) or not q.numel() or not k_cache.numel():
        return _gathered(q, k_cache, v_cache, block_tables, cu_q, queries, lengths, window, scale)
    table = block_tables.to(torch.int32).contiguous()
    whole = ends[0] == 0 and ends[-1] == len(q)  # else there are tokens of no sequence, which get zeros
    out = (torch.empty_like if whole else torch.zeros_like)(q, memory_format=torch.contiguous_format)
    alone = [i for i, count in enumerate(queries) if count == 1 and q.shape[2] % 16 == 0]
    others = [i for i, count in enumerate(queries) if count and (count > 1 or q.shape[2] % 16)]
    good = True
    if others:
        good = _tiles(q, k_cache, v_cache, out, table, others, ends, lengths, window, scale)
    if alone:
        records = torch.tensor([(ends[i], lengths[i], i) for i in alone])
        good &= _decode(q, k_cache, v_cache, out, table, records, max(lengths[i] for i in alone), window, scale)
    require(good, f"paged_attention: block_tables names a page outside the cache's {k_cache.shape[0]}")
    return out


def _gathered(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor,
    cu_q: Tensor, queries: list[int], lengths: list[int], window: int, scale: float,
) -> Tensor:  # fmt: skip
    """Sequence by sequence, from a copy of its pages."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for i, (start, count, length) in enumerate(zip(cu_q.tolist(), queries, lengths, strict=False)):
        if not count or not length:
            continue
        used = block_tables[i, : -(-length // k_cache.shape[2])]
        require(
            int(used.min()) >= 0 and int(used.max()) < k_cache.shape[0],
            f"paged_attention: block_tables names a page outside the cache's {k_cache.shape[0]}",
        )
        k, v = (reference.gather_pages(cache, block_tables[i], length) for cache in (k_cache, v_cache))
        rows = q[start : start + count].transpose(0, 1)[None]
        found = flash.flash_attention(rows, k.contiguous(), v.contiguous(), None, None, True, window, scale)[0]
        out[start : start + count] = found[0].transpose(0, 1)
    return out


def _tiles(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, table: Tensor,
    chosen: list[int], ends: list[int], lengths: list[int], window: int, scale: float,
) -> bool:  # fmt: skip
    """The chosen sequences by flash_attention's tiles, which read keys and values out of their pages."""
    dense, written = q.transpose(0, 1)[None], out.transpose(0, 1)[None]
    lse = torch.empty(1, q.shape[1], q.shape[0], dtype=torch.float32)
    places = [
        SequencePlace(
            ends[i] * q.stride(0), ends[i] * out.stride(0), ends[i], 0, 0, ends[i + 1] - ends[i], lengths[i], i
        )
        for i in chosen
    ]
    return cpu_tiles.forward(dense, k_cache, v_cache, written, lse, places, table, True, window, scale)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, table: Tensor,
    records: Tensor, longest: int, window: int, scale: float,
) -> bool:  # fmt: skip
    """Sequences of one query each."""
    from ds_kernels.ops.paged_attention.cpu_numba import EXTRA, SPLIT, decode, merge

    heads, dim, kv_heads, code = q.shape[1], q.shape[2], k_cache.shape[1], CODES[q.dtype]
    splits = max(1, -(-min(longest, window or longest) // SPLIT))
    partial = torch.empty(len(records) * heads * splits * (dim + EXTRA) if splits > 1 else 0)
    error = torch.zeros(1, dtype=torch.int64)
    launch(
        decode, q, k_cache, v_cache, out, partial, table, records, error,
        heads, kv_heads, dim, code, k_cache.shape[2], k_cache.shape[0], window, float(scale), splits,
        q.stride(0), q.stride(1), *k_cache.stride()[:3], *v_cache.stride()[:3], table.stride(0), len(records),
        items=len(records) * splits,
    )  # fmt: skip
    if splits > 1:
        launch(merge, partial, out, records, heads, dim, code, window, splits, items=len(records) * heads)
    return int(error) == 0


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As the reference.

    Raises:
        KernelArgumentError: a slot that is not in the cache; the others are written.
    """
    places = k_cache.shape[0] * k_cache.shape[2]
    message = f"write_kv: slots names one outside the cache's {places}"
    if not HAS_NUMBA or k.dtype != k_cache.dtype or not k.numel():
        require(not slots.numel() or int(slots.max()) < places, message)
        reference.write_kv(k, v, k_cache, v_cache, slots)
        return
    from ds_kernels.ops.paged_attention.cpu_numba import write

    size = k.element_size()
    strides = (size * each for x, dims in ((k, 2), (v, 2), (k_cache, 3), (v_cache, 3)) for each in x.stride()[:dims])
    error = torch.zeros(1, dtype=torch.int64)
    launch(
        write, k, v, k_cache, v_cache, slots.to(torch.int64).contiguous(), error,
        k.shape[1], size * k.shape[2], k_cache.shape[2], k_cache.shape[0], *strides, items=len(slots), grain=16,
    )  # fmt: skip
    require(int(error) == 0, message)
