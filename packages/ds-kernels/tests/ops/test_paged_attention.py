"""paged_attention and write_kv against plain attention over each context, put together again from its pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES
from torch import Tensor

from ds_kernels import KernelArgumentError, flash_attention, paged_attention, write_kv


class Cache:
    """Random contexts in pages that are handed out in random order; the rest of the cache is NaN."""

    def __init__(
        self, lengths: list[int], kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, rows_first: bool = False
    ) -> None:
        self.lengths = lengths
        per = [-(-length // page_size) for length in lengths]
        pages, most = sum(per) + 3, max([1, *per])
        shape = (pages, page_size, kv_heads, dim) if rows_first else (pages, kv_heads, page_size, dim)
        caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
        self.k, self.v = (cache.transpose(1, 2) for cache in caches) if rows_first else caches
        order = torch.randperm(pages).tolist()
        self.tables = torch.full((len(lengths), most), -7, dtype=torch.int32)
        self.keys, self.values = [], []
        for i, length in enumerate(lengths):
            own, order = order[: per[i]], order[per[i] :]
            self.tables[i, : per[i]] = torch.tensor(own, dtype=torch.int32)
            k, v = torch.randn(2, length, kv_heads, dim).to(dtype)
            slots = torch.tensor([own[j // page_size] * page_size + j % page_size for j in range(length)])
            write_kv(k, v, self.k, self.v, slots.long())
            self.keys.append(k)
            self.values.append(v)
        self.context_lens = torch.tensor(lengths, dtype=torch.int32)


def specification(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """One sequence in fp64: q [queries, heads, dim], k and v [keys, kv_heads, dim]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    ahead = torch.arange(k.shape[1])[None, :] - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    seen = (ahead <= 0) & (ahead > -(window or 1 << 30))
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~seen, -1e300)
    return ((scores.softmax(-1) * seen.any(-1, keepdim=True)) @ v).transpose(0, 1)


def check(cache: Cache, queries: list[int] | None, heads: int, window: int | None = None, **options: Any) -> None:
    counts = [1] * len(cache.lengths) if queries is None else queries
    dtype, dim = cache.k.dtype, cache.k.shape[-1]
    q = torch.randn(sum(counts), heads, dim).to(dtype)
    starts = None if queries is None else torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
    got = paged_attention(
        q, cache.k, cache.v, cache.tables, cache.context_lens, cu_seqlens_q=starts, window=window, **options
    )
    assert got.shape == q.shape and got.dtype == dtype and got.is_contiguous()
    eps = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    at = 0
    for count, k, v in zip(counts, cache.keys, cache.values, strict=True):
        if count and len(k):
            expected = specification(q[at : at + count], k, v, window, options.get("scale"))
            error = (got[at : at + count].double() - expected).abs()
            allowed = 2 * eps * expected.abs() + 2 * eps * expected.abs().max().clamp(min=1.0)
            assert (error <= allowed).all(), f"off by {error.max():.3g}"
        elif count:
            assert not got[at : at + count].any()
        at += count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(3, 1, 64), (8, 2, 32), (4, 2, 64), (2, 2, 16), (5, 1, 80)], ids=str
)
def test_decode(backend: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    check(Cache([1, 37, 16, 33], kv_heads, dim, 16, dtype), None, heads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [1, 5, 32])
def test_mixed_chunks_and_decode(backend: str, page_size: int, dtype: torch.dtype) -> None:
    """A whole prompt, a chunk of one, decoding, a chunk of one token, a sequence left out, a padding sequence."""
    cache = Cache([9, 30, 21, 1, 12, 0], 2, 32, page_size, dtype)
    check(cache, [9, 7, 1, 1, 0, 1], 4)
    check(cache, [3, 30, 1, 1, 2, 0], 4, window=6, scale=0.3)


def test_long_contexts_are_split(backend: str) -> None:
    cache = Cache([700, 3, 256, 257], 1, 16, 16, torch.float32)
    check(cache, None, 2)
    check(cache, None, 2, window=300)


@pytest.mark.cpu_extra
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_mixed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = Cache([2000, 1, 900, 4000, 513], 3, 64, 16, dtype, rows_first=True)
    check(cache, [200, 1, 1, 1, 513], 9)
    check(cache, [1, 1, 130, 1, 2], 9, window=700)


@pytest.mark.parametrize("dim", [8, 33])
def test_other_head_dimensions(backend: str, dim: int) -> None:
    check(Cache([20, 4], 1, dim, 8, torch.float32), None, 2)
    check(Cache([20, 4], 1, dim, 8, torch.bfloat16), [4, 1], 2)


def test_strides(backend: str) -> None:
    """A cache of [pages, page_size, kv_heads, dim], q cut from a wider tensor, int64 tables that are not contiguous."""
    cache = Cache([19, 40], 2, 32, 16, torch.float32, rows_first=True)
    wide = torch.randn(2, 12, 32)
    q = wide[:, 4:8]
    got = paged_attention(q, cache.k, cache.v, cache.tables.long().t().contiguous().t(), cache.context_lens.long())
    for i in range(2):
        torch.testing.assert_close(
            got[i : i + 1].double(), specification(q[i : i + 1], cache.keys[i], cache.values[i], None, None),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip


def test_chunks_of_a_prompt_are_the_prompt(backend: str) -> None:
    """Written and attended to chunk by chunk, as a serving engine does it: the same as causal attention at once."""
    heads, kv_heads, dim, size = 2, 1, 16, 4
    q, k, v = torch.randn(19, heads, dim), torch.randn(19, kv_heads, dim), torch.randn(19, kv_heads, dim)
    expected = flash_attention(q, k, v, causal=True, cu_seqlens_q=torch.tensor([0, 19]))
    k_cache, v_cache = torch.zeros(2, 6, kv_heads, size, dim)
    table = torch.tensor([[3, 0, 5, 1, 4]], dtype=torch.int32)
    found, at = [], 0
    for count in (7, 1, 10, 1):
        places = torch.arange(at, at + count)
        write_kv(k[places], v[places], k_cache, v_cache, table[0, places // size] * size + places % size)
        at += count
        starts = torch.tensor([0, count])
        found.append(
            paged_attention(
                q[places], k_cache, v_cache, table, torch.tensor([at]), cu_seqlens_q=starts, max_seqlen_q=count
            )
        )
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_write(backend: str, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 5, 3, 8).to(dtype)
    k_cache, v_cache = torch.zeros(2, 4, 3, 2, 8).to(dtype)
    slots = torch.tensor([7, -1, 0, 3, -5], dtype=torch.int32)
    write_kv(k.transpose(0, 1).contiguous().transpose(0, 1), v, k_cache, v_cache, slots)
    for new, cache in ((k, k_cache), (v, v_cache)):
        expected = torch.zeros(8, 3, 8, dtype=dtype)
        expected[[7, 0, 3]] = new[[0, 2, 3]]
        assert torch.equal(cache.transpose(1, 2).reshape(8, 3, 8), expected)


def test_write_converts(backend: str) -> None:
    k = torch.randn(2, 1, 8).bfloat16().float()  # triton's interpreter does not round to nearest
    caches = torch.zeros(2, 1, 1, 4, 8, dtype=torch.bfloat16)
    write_kv(k, k, caches[0], caches[1], torch.tensor([2, 1]))
    assert torch.equal(caches[0, 0, 0, [2, 1]], k[:, 0].bfloat16())


def test_nothing_to_do(backend: str) -> None:
    caches = torch.zeros(2, 3, 1, 4, 16)
    none = torch.zeros(0, dtype=torch.int32)
    assert paged_attention(torch.randn(0, 2, 16), *caches, torch.zeros(0, 2, dtype=torch.int32), none).shape == (
        0,
        2,
        16,
    )
    write_kv(torch.randn(0, 1, 16), torch.randn(0, 1, 16), *caches, none)
    assert not caches.any()


def test_threads_do_not_change_bits() -> None:
    torch.manual_seed(0)
    cache = Cache([900, 30, 400], 1, 32, 16, torch.bfloat16)
    q, starts = torch.randn(42, 3, 32, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 42])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(paged_attention(q, cache.k, cache.v, cache.tables, cache.context_lens, cu_seqlens_q=starts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_compiles_without_graph_break(backend: str) -> None:
    cache = Cache([9, 4], 1, 16, 4, torch.float32)
    new = torch.randn(2, 1, 16)

    def step(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        write_kv(new, new, k_cache, v_cache, slots)
        return paged_attention(q, k_cache, v_cache, cache.tables, cache.context_lens) * 2

    slots = torch.tensor([int(cache.tables[0, 0]) * 4, int(cache.tables[1, 0]) * 4 + 1])
    q, caches = torch.randn(2, 2, 16), [(cache.k.clone(), cache.v.clone()) for _ in range(2)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, *caches[0]), step(q, *caches[1]))
    assert torch.equal(caches[0][0].nan_to_num(), caches[1][0].nan_to_num())


def test_bad_input() -> None:
    cache = Cache([9, 4], 2, 16, 4, torch.float32)
    q = torch.randn(2, 4, 16)
    good = {
        "q": q,
        "k_cache": cache.k,
        "v_cache": cache.v,
        "block_tables": cache.tables,
        "context_lens": cache.context_lens,
    }
    for match, wrong in [
        (r"q has shape \(4, 16\); expected \[tokens", {"q": q[0]}),
        ("q has 3 heads, the cache 2", {"q": q[:, :3]}),
        (r"k_cache has shape \(.*\); expected \[pages, kv_heads, page_size, 8\]", {"q": q[..., :8]}),
        ("q is of dtype torch.bfloat16, the cache of torch.float32", {"q": q.bfloat16()}),
        ("v_cache .* must be alike", {"v_cache": cache.v.bfloat16()}),
        ("k_cache has strides", {"k_cache": cache.k.mT.contiguous().mT}),
        ("q has 3 tokens for 2 sequences", {"q": torch.randn(3, 4, 16)}),
        (r"block_tables has shape \(1, 3\), context_lens \(2,\)", {"block_tables": cache.tables[:1]}),
        ("block_tables is of dtype torch.float32; supported are int32, int64", {"block_tables": cache.tables.float()}),
        (r"cu_seqlens_q has shape \(2,\); expected \(3,\)", {"cu_seqlens_q": torch.tensor([0, 2])}),
        ("window is -1", {"window": -1}),
        ("context_lens is on meta", {"context_lens": cache.context_lens.to("meta")}),
        ("context_lens has 13; expected at most 12, 3 pages of 4", {"context_lens": torch.tensor([13, 1])}),
        ("block_tables names a page outside the cache's 7", {"block_tables": torch.full((2, 3), 7)}),
        ("block_tables names a page outside the cache's 7", {"block_tables": torch.full((2, 3), -1)}),
        ("requires a gradient", {"q": q.clone().requires_grad_()}),
    ]:
        with pytest.raises(KernelArgumentError, match=match):
            paged_attention(**{**good, **wrong})
    with pytest.raises(KernelArgumentError, match="names a page outside"):
        paged_attention(**{**good, "block_tables": torch.full((2, 3), 9), "cu_seqlens_q": torch.tensor([0, 2, 2])})
    k, slots = torch.randn(2, 2, 16), torch.tensor([0, 1])
    for match, args in [
        (r"k has shape \(2, 2, 16\), v \(2, 1, 16\)", (k, k[:, :1], cache.k, cache.v, slots)),
        ("k has 1 heads, the cache 2", (k[:, :1], k[:, :1], cache.k, cache.v, slots)),
        (r"slots has shape \(1,\); expected \(2,\)", (k, k, cache.k, cache.v, slots[:1])),
        ("slots names one outside the cache's 28", (k, k, cache.k, cache.v, slots + 27)),
        ("slots is of dtype torch.float32", (k, k, cache.k, cache.v, slots.float())),
    ]:
        with pytest.raises(KernelArgumentError, match=match):
            write_kv(*args)


@pytest.mark.parametrize("starts", [[0, 1, 5], [0, 3, 2], [-1, 1, 2]], ids=str)
def test_starts_outside_the_queries(starts: list[int]) -> None:
    cache = Cache([9, 4], 2, 16, 4, torch.float32)
    arguments = (torch.randn(2, 4, 16), cache.k, cache.v, cache.tables, cache.context_lens)
    with pytest.raises(KernelArgumentError, match=r"cu_seqlens_q is .* expected an ascent"):
        paged_attention(*arguments, cu_seqlens_q=torch.tensor(starts))


def test_negative_context() -> None:
    cache = Cache([9, 4], 2, 16, 4, torch.float32)
    with pytest.raises(KernelArgumentError, match="context_lens has -20; expected 0 or more"):
        paged_attention(torch.randn(2, 4, 16), cache.k, cache.v, cache.tables, torch.tensor([-20, 4]))


def test_tokens_of_no_sequence_are_zero(backend: str) -> None:
    cache = Cache([9, 4], 2, 16, 4, torch.float32)
    q = torch.randn(5, 4, 16)
    out = paged_attention(q, cache.k, cache.v, cache.tables, cache.context_lens, cu_seqlens_q=torch.tensor([1, 2, 3]))
    assert out[1:3].abs().amin() > 0 and not out[[0, 3, 4]].any()
