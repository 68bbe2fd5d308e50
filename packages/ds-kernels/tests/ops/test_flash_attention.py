"""flash_attention against its formula in fp64: dense and packed, causal, windows, grouped queries, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES
from torch import Tensor

from ds_kernels import KernelArgumentError, flash_attention

SMALL = [  # batch, heads, kv_heads, q_len, k_len, dim
    (2, 2, 2, 17, 17, 16),
    (1, 6, 2, 9, 23, 33),
    (1, 3, 1, 21, 13, 8),
    (1, 1, 1, 1, 40, 64),
]
LARGE = [(1, 2, 1, 700, 900, 64), (2, 3, 3, 257, 257, 128), (1, 1, 1, 1100, 1100, 40), (1, 9, 3, 150, 150, 96)]
MASKS = [(False, None), (True, None), (True, 5), (False, 7), (True, 300)]


def visible(q_len: int, k_len: int, causal: bool, window: int | None) -> Tensor:
    """Query i stands at i + k_len - q_len; written once more on purpose, element by element."""
    ahead = torch.arange(k_len)[None, :] - torch.arange(q_len)[:, None] - (k_len - q_len)
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if window is not None:
        seen &= (ahead > -window) & (ahead < window)
    return seen


def specification(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = visible(q.shape[2], k.shape[2], causal, window)
    weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen.any(-1, keepdim=True)
    return weights @ v


def inputs(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, q_len, k_len, dim = case
    q = torch.randn(batch, heads, q_len, dim).to(dtype).requires_grad_()
    k, v = (torch.randn(batch, kv_heads, k_len, dim).to(dtype).requires_grad_() for _ in range(2))
    return q, k, v


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Within the rounding of the weights (and, backward, of the scores' gradients) to the dtype, and of fp32 sums.

    Each of the terms summed is off by at most half an ulp, and their signs are random: a few eps of the largest result.
    """
    eps = max(torch.finfo(actual.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    allowed = 2 * eps * expected.abs() + 2 * eps * expected.abs().max().clamp(min=1.0)
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), (
        f"{what}: off by {error.max():.3g}, {(error / allowed).max():.2f} x what is allowed"
    )


def check(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None = None) -> None:
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    actual = flash_attention(q, k, v, causal=causal, window=window, scale=scale)
    expected = specification(*wide, causal, window, scale)
    assert actual.dtype == q.dtype
    assert_close(actual.detach(), expected.detach(), "forward")
    grad = torch.randn(actual.shape).to(actual.dtype)
    got = torch.autograd.grad(actual, [q, k, v], grad)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    for name, mine, theirs in zip("qkv", got, wanted, strict=True):
        assert mine.dtype == q.dtype
        assert_close(mine, theirs, f"gradient of {name}")


@pytest.mark.parametrize(("causal", "window"), MASKS, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_and_gradients(backend: str, case: tuple[int, ...], causal: bool, window: int | None) -> None:
    check(*inputs(case, torch.float32), causal, window)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_16_bit(backend: str, case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*inputs(case, dtype), True, None)
    check(*inputs(case, dtype), False, 4)


@pytest.mark.cpu_extra
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_many_blocks(case: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for causal, window in MASKS:
        check(*inputs(case, dtype), causal, window)


def test_many_blocks_small_window(backend: str) -> None:
    check(*inputs((1, 2, 1, 130, 200, 16), torch.float32), True, 33, 0.5)


def test_fp64_is_exact() -> None:
    q, k, v = inputs((1, 4, 2, 30, 40, 24), torch.float64)
    torch.testing.assert_close(
        flash_attention(q, k, v, causal=True), specification(q, k, v, True, None, None), rtol=1e-13, atol=1e-13
    )
    torch.autograd.gradcheck(
        lambda *x: flash_attention(*x, causal=True, window=9), inputs((1, 2, 1, 5, 7, 4), torch.float64)
    )


def test_packed_is_each_sequence_alone(backend: str) -> None:
    lengths_q, lengths_k = [5, 0, 30, 1, 3], [5, 4, 41, 9, 0]
    heads, kv_heads, dim = 4, 2, 16
    q = torch.randn(sum(lengths_q), heads, dim, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), kv_heads, dim, requires_grad=True) for _ in range(2))
    starts = [torch.tensor([0, *torch.tensor(each).cumsum(0)], dtype=torch.int32) for each in (lengths_q, lengths_k)]
    for causal, window in MASKS[:3]:
        options: dict[str, Any] = {"causal": causal, "window": window}
        out, lse = flash_attention(q, k, v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], return_lse=True, **options)
        assert out.shape == q.shape and lse.shape == (heads, len(q))
        parts, totals = [], []
        for one, k_one, v_one in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True):
            dense = [x.transpose(0, 1).unsqueeze(0) for x in (one, k_one, v_one)]
            part, total = flash_attention(*dense, return_lse=True, **options)
            parts.append(part.squeeze(0).transpose(0, 1))
            totals.append(total.squeeze(0))
        expected = torch.cat(parts)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, torch.cat(totals, 1))
        grad = torch.randn_like(out)
        got, wanted = (torch.autograd.grad(y, [q, k, v], grad) for y in (out, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_packed_same_starts(backend: str) -> None:
    x = torch.randn(7, 2, 8)
    starts = torch.tensor([0, 3, 7])
    torch.testing.assert_close(
        flash_attention(x, x, x, causal=True, cu_seqlens_q=starts),
        flash_attention(x, x, x, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=4, max_seqlen_k=4),
    )


def test_log_sum_exp(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs((1, 2, 1, 6, 4, 16), torch.float32))
    _, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    scores = (q @ k.mT * 0.25).masked_fill(~visible(6, 4, True, None), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert lse[..., :2].isneginf().all(), "queries that see no key"


def test_no_gradient_through_lse(backend: str) -> None:
    q, k, v = inputs((1, 1, 1, 4, 4, 8), torch.float32)
    assert not flash_attention(q, k, v, return_lse=True)[1].requires_grad


def test_strides(backend: str) -> None:
    """[batch, len, heads, dim] seen as [batch, heads, len, dim], one tensor for q, k and v, and a strided last dim."""
    q, k, v = torch.randn(2, 11, 3, 4, 16, requires_grad=True).unbind(2)
    check(*(x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)), True, None)
    strided = [torch.randn(1, 2, 9, 16, 2)[..., 0].requires_grad_() for _ in range(3)]
    check(*strided, False, None)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)], ids=str)
def test_no_queries(backend: str, shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    k = torch.randn(shape[0], 2, 5, 8, requires_grad=True)
    out = flash_attention(q, k, k)
    out.sum().backward()
    assert out.shape == shape and k.grad is not None and not k.grad.any()


def test_no_keys(backend: str) -> None:
    k = torch.randn(1, 2, 0, 8)
    out, lse = flash_attention(torch.randn(1, 2, 3, 8), k, k, return_lse=True)
    assert not out.any() and lse.isneginf().all()


@pytest.mark.parametrize("size", [1e-18, 60.0])
def test_extreme_scores(backend: str, size: float) -> None:
    q, k, v = inputs((1, 1, 1, 20, 20, 16), torch.float32)
    q, k = ((x.detach() * size).requires_grad_() for x in (q, k))
    out = flash_attention(q, k, v)
    expected = specification(q.detach().double(), k.detach().double(), v.detach().double(), False, None, None)
    # scores of up to 1e4 carry an absolute error of 1e-3 in fp32, which is the weights' relative error
    torch.testing.assert_close(out.double(), expected, rtol=5e-3, atol=5e-3)


def test_not_a_number_stays_with_those_who_see_it(backend: str) -> None:
    q, k, v = (x.detach() for x in inputs((1, 1, 1, 12, 12, 16), torch.float32))
    k[0, 0, 6] = float("nan")
    out = flash_attention(q, k, v, causal=True)
    assert out[0, 0, 6:].isnan().all() and out[0, 0, :6].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_do_not_change_bits(dtype: torch.dtype) -> None:
    q, k, v = inputs((2, 3, 1, 300, 300, 32), dtype)
    grad = torch.randn(q.shape).to(dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = flash_attention(q, k, v, causal=True)
            found.append((out.detach(), *torch.autograd.grad(out, [q, k, v], grad)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_compiles_without_graph_break(backend: str) -> None:
    q, k, v = inputs((1, 2, 1, 9, 9, 16), torch.float32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total: Tensor = flash_attention(q, k, v, causal=True, window=4).sin().sum()
        return total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, v), [q, k, v])
    got = torch.autograd.grad(compiled(q, k, v), [q, k, v])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    starts = torch.tensor([0, 3, 5])
    for match, args, options in [
        (r"q has shape \(4, 5, 8\); expected \[batch, heads", (q[0], k, v), {}),
        (r"q has shape \(1, 4, 5, 8\); expected \[tokens, heads", (q, k, v), {"cu_seqlens_q": starts}),
        ("q has 3 heads, k 2", (q[:, :3], k, v), {}),
        ("head dimension of q is 7, of k 8", (q[..., :7], k, v), {}),
        (r"k has shape \(1, 2, 5, 8\), v \(1, 2, 4, 8\)", (q, k, v[:, :, :4]), {}),
        ("k is of dtype torch.bfloat16, q of torch.float32", (q, k.bfloat16(), v.bfloat16()), {}),
        ("q is of dtype torch.int64; supported are float32", (q.long(), k, v), {}),
        ("window is 0; expected at least 1", (q, k, v), {"window": 0}),
        ("batch of q is 2, of k 1", (q.expand(2, 4, 5, 8), k, v), {}),
        ("cu_seqlens_k is given without cu_seqlens_q", (q, k, v), {"cu_seqlens_k": starts}),
        ("k is on meta", (q, k.to("meta"), v.to("meta")), {}),
    ]:
        with pytest.raises(KernelArgumentError, match=match):
            flash_attention(*args, **options)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    for match, wrong in [
        (r"cu_seqlens_q is \[0, 3, 4\]; expected an ascent from 0 to the number of tokens, 5", torch.tensor([0, 3, 4])),
        (r"cu_seqlens_q is \[0, 6, 5\]", torch.tensor([0, 6, 5])),
        ("cu_seqlens_q is of dtype torch.float32; supported are int32, int64", torch.tensor([0.0, 5.0])),
    ]:
        with pytest.raises(KernelArgumentError, match=match):
            flash_attention(q, k, v, cu_seqlens_q=wrong)
    with pytest.raises(KernelArgumentError, match=r"cu_seqlens_k has shape \(2,\)"):
        flash_attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=torch.tensor([0, 5]))


def test_bad_starts_in_a_compiled_function() -> None:
    """Nothing below checks bounds, so what torch.compile traced must be looked at when it runs."""
    q, k, v = (torch.randn(5, 2, 16) for _ in range(3))
    compiled = torch.compile(
        lambda starts: flash_attention(q, k, v, cu_seqlens_q=starts), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(torch.tensor([0, 5])), flash_attention(q, k, v, cu_seqlens_q=torch.tensor([0, 5])))
    with pytest.raises(KernelArgumentError, match=r"cu_seqlens_q is \[0, 900\]"):
        compiled(torch.tensor([0, 900]))


@pytest.mark.parametrize("window", [None, 30])
def test_many_more_queries_than_keys(backend: str, window: int | None) -> None:
    q = torch.randn(1, 2, 20, 16, requires_grad=True)
    k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(2))
    check(q, k, v, False, window)
