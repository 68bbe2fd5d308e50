"""paged_attention: decoding and split prefill over keys and values in pages; write_kv: what puts them there.

Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(arXiv:2309.06180); the split over the context: Dao et al. 2023, "Flash-Decoding".
Limit: memory while decoding. A query reads its context once: `2 * context * kv_heads * dim * itemsize` bytes, beside
4 * context * heads * dim flops; on CPU, pages scattered over 4 KB pages of memory cost address translations as well
(`cpu_numba`). Chunks of many queries are bound by arithmetic, as flash_attention is. write_kv moves
`4 * tokens * kv_heads * dim * itemsize` bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._checks import check_device, check_dtype, require
from ds_kernels._dispatch import backend_for
from ds_kernels._op import Op
from ds_kernels.ops.paged_attention import cpu, reference

__all__ = ["paged_attention", "write_kv"]

INTS = (torch.int32, torch.int64)
MAX_TRITON_DIM = 256


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of new tokens over a paged cache: decoding, chunks of a prompt, or both in one call.

    The keys of the new tokens are in the cache already (`write_kv` first). The queries of a sequence stand at the end
    of its context, and see what is at or before their own position.

    Args:
        q: [tokens, heads, dim], fp32, bf16, fp16 or fp64; any strides with the last dimension contiguous are taken as
            they are.
        k_cache: [pages, kv_heads, page_size, dim], q's dtype; the last dimension contiguous, the others of any strides
            (a cache laid out as [pages, page_size, kv_heads, dim] goes in as its `transpose(1, 2)`).
        v_cache: as k_cache.
        block_tables: [sequences, pages of the longest], int32 (int64 is converted): the pages of each context, in
            order; what lies behind a context's end is not looked at.
        context_lens: [sequences], int32 or int64: keys of each sequence, those of its new tokens included.
        cu_seqlens_q: [sequences + 1], int32 or int64: the queries of sequence i are q[cu[i] : cu[i + 1]], of any
            number, none included. By default every sequence has one.
        max_seqlen_q: the most queries of a sequence; saves a GPU a synchronisation.
        scale: of the scores; 1 / sqrt(dim) by default.
        window: a query sees this many keys, itself counted.

    Returns:
        [tokens, heads, dim], contiguous. A query that sees no key (a context of length 0: padding) gets zeros.

    Raises:
        KernelArgumentError: shapes, dtypes or devices that do not fit; a gradient is asked for, which there is not.
            On the CPU also a context longer than its block table, a page outside the cache and cu_seqlens_q that do
            not ascend within q; a GPU does not look.
    """
    name = "paged_attention"
    require(q.dim() == 3, f"{name}: q has shape {tuple(q.shape)}; expected [tokens, heads, dim]")
    _check_caches(name, q, k_cache, v_cache, block_tables=block_tables, context_lens=context_lens)
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    require(kv_heads > 0 and heads % kv_heads == 0, f"{name}: q has {heads} heads, the cache {kv_heads}; expected a "
            "multiple of them")  # fmt: skip
    require(q.dtype == k_cache.dtype, f"{name}: q is of dtype {q.dtype}, the cache of {k_cache.dtype}; expected one")
    require(window is None or window >= 1, f"{name}: window is {window}; expected at least 1, or None for no limit")
    require(
        not (torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad)),
        f"{name}: an argument requires a gradient, which this operation has not; call it under torch.no_grad()",
    )
    check_dtype(name, "block_tables", block_tables, INTS)
    check_dtype(name, "context_lens", context_lens, INTS)
    num = len(context_lens)
    require(
        context_lens.dim() == 1 and block_tables.dim() == 2 and len(block_tables) == num,
        f"{name}: block_tables has shape {tuple(block_tables.shape)}, context_lens {tuple(context_lens.shape)}; "
        "expected [sequences, pages] and [sequences]",
    )
    if cu_seqlens_q is None:
        require(len(q) == num, f"{name}: q has {len(q)} tokens for {num} sequences; without cu_seqlens_q each has one")
        cu_seqlens_q, max_seqlen_q = torch.arange(num + 1, dtype=torch.int32, device=q.device), 1
    check_dtype(name, "cu_seqlens_q", cu_seqlens_q, INTS)
    check_device(name, q, cu_seqlens_q=cu_seqlens_q)
    require(cu_seqlens_q.shape == (num + 1,), f"{name}: cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}; expected "
            f"({num + 1},), one more than sequences")  # fmt: skip
    scale = q.shape[2] ** -0.5 if scale is None else scale
    longest = len(q) if max_seqlen_q is None else max_seqlen_q
    q = q if q.stride(-1) == 1 else q.contiguous()
    out: Tensor = _ATTENTION(q, k_cache, v_cache, block_tables, context_lens, cu_seqlens_q, longest, window or 0, scale)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Put the keys and values of new tokens into their places in a paged cache.

    Args:
        k: [tokens, kv_heads, dim], any strides with the last dimension contiguous; converted to the cache's dtype.
        v: as k.
        k_cache: [pages, kv_heads, page_size, dim], written in place.
        v_cache: as k_cache.
        slots: [tokens], int32 or int64: page * page_size + row of each token, all different; a negative one is left
            out (padding).

    Raises:
        KernelArgumentError: shapes, dtypes or devices that do not fit; on the CPU also a slot outside the cache.
    """
    name = "write_kv"
    require(
        k.dim() == 3 and k.shape == v.shape,
        f"{name}: k has shape {tuple(k.shape)}, v {tuple(v.shape)}; expected both [tokens, kv_heads, dim]",
    )
    _check_caches(name, k, k_cache, v_cache, v=v, slots=slots)
    require(k.shape[1] == k_cache.shape[1], f"{name}: k has {k.shape[1]} heads, the cache {k_cache.shape[1]}")
    check_dtype(name, "slots", slots, INTS)
    require(slots.shape == k.shape[:1], f"{name}: slots has shape {tuple(slots.shape)}; expected ({len(k)},)")
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with torch.no_grad():
        _WRITE(k, v, k_cache, v_cache, slots)


def _check_caches(name: str, x: Tensor, k_cache: Tensor, v_cache: Tensor, **others: Tensor) -> None:
    check_dtype(name, "the first argument", x)
    for which, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(
            cache.dim() == 4 and cache.shape[-1] == x.shape[-1],
            f"{name}: {which} has shape {tuple(cache.shape)}; expected [pages, kv_heads, page_size, {x.shape[-1]}]",
        )
        require(cache.stride(-1) == 1 or cache.shape[-1] == 1,
                f"{name}: {which} has strides {cache.stride()}; expected a contiguous last dimension")  # fmt: skip
    require(
        k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype,
        f"{name}: k_cache is {tuple(k_cache.shape)} of {k_cache.dtype}, v_cache {tuple(v_cache.shape)} of "
        f"{v_cache.dtype}; they must be alike",
    )
    check_device(name, x, k_cache=k_cache, v_cache=v_cache, **others)
    require(x.device.type == "cpu" or x.shape[-1] <= MAX_TRITON_DIM,
            f"{name}: head dimension {x.shape[-1]} on {x.device}; supported are up to {MAX_TRITON_DIM}")  # fmt: skip


def _attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor,
    cu_q: Tensor, max_q: int, window: int, scale: float,
) -> Tensor:  # fmt: skip
    backend = backend_for(q)
    if backend == "triton":
        from ds_kernels.ops.paged_attention import triton

        return triton.paged_attention(q, k_cache, v_cache, block_tables, context_lens, cu_q, max_q, window, scale)
    if backend == "cpu":
        return cpu.paged_attention(q, k_cache, v_cache, block_tables, context_lens, cu_q, window, scale)
    return reference.paged_attention(q, k_cache, v_cache, block_tables, context_lens, cu_q, window, scale)


def _attention_fake(q: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    backend = backend_for(k)
    if backend == "triton":
        from ds_kernels.ops.paged_attention import triton

        triton.write_kv(k, v, k_cache, v_cache, slots)
    elif backend == "cpu":
        cpu.write_kv(k, v, k_cache, v_cache, slots)
    else:
        reference.write_kv(k, v, k_cache, v_cache, slots)


def _write_fake(*_arguments: Tensor) -> None:
    return None


_ATTENTION = Op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens, Tensor cu_q, "
    "SymInt max_q, SymInt window, float scale) -> Tensor",
    _attention,
    fake=_attention_fake,
)
_WRITE = Op(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    _write,
    fake=_write_fake,
    mutates=("k_cache", "v_cache"),
)
