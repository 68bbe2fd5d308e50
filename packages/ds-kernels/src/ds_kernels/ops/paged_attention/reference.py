"""The specification of paged_attention and write_kv: plain torch, one sequence after the other, in at least fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels.ops.flash_attention import reference as dense

__all__ = ["gather_pages", "paged_attention", "write_kv"]


def gather_pages(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """[1, kv_heads, length, dim]: the first `length` keys of a sequence, out of its pages."""
    needed = pages[: -(-length // cache.shape[2])].long()
    return cache[needed].transpose(0, 1).flatten(1, 2)[None, :, :length]


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    cu_q: Tensor, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """softmax(scale * q k^T over the visible keys) v per sequence; the last query stands at the last key.

    q [tokens, heads, dim]; caches [pages, kv_heads, page_size, dim]; block_tables [sequences, pages];
    context_lens [sequences]; queries of sequence i are cu_q[i]:cu_q[i+1]. A query that sees no key gets zeros.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    ends, lengths = cu_q.tolist(), context_lens.tolist()
    for i, length in enumerate(lengths):
        if ends[i] == ends[i + 1] or length == 0:
            continue
        rows = q[ends[i] : ends[i + 1]].transpose(0, 1)[None]
        keys, values = (gather_pages(cache, block_tables[i], length) for cache in (k_cache, v_cache))
        found = dense.flash_attention(rows, keys, values, None, None, True, window, scale)[0]
        out[ends[i] : ends[i + 1]] = found[0].transpose(0, 1)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """cache[slot // page_size, :, slot % page_size] = row of k (v), for the slots that are not negative."""
    size = k_cache.shape[2]
    kept = (slots >= 0).nonzero().flatten()
    places = slots[kept].long()
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache[places // size, :, places % size] = new[kept].to(cache.dtype)
