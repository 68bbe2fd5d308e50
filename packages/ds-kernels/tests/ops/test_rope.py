"""rope against complex multiplication in fp64: forward, both gradients, layouts, partial rotary, positions, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_accurate, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, rope


def tables(seq: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(seq)[:, None] * 100.0 ** -(torch.arange(half) / half)
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation as multiplication by cos + i sin."""
    half = cos.shape[-1]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = head.unflatten(-1, (half, 2)) if interleaved else head.unflatten(-1, (2, half)).transpose(-1, -2)
    rotated = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    flat = (rotated if interleaved else rotated.transpose(-1, -2)).flatten(-2)
    return torch.cat([flat, rest], -1)


def specification(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.cat([turned(q, cos, sin, interleaved), turned(k, cos, sin, interleaved)], 1)


def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.cat(rope(q, k, cos, sin, interleaved), 1)


def heads(batch: int, count: int, seq: int, dim: int, layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """[batch, count, seq, dim]; in memory heads outside, positions outside (as a projection leaves it), or neither."""
    if layout == "heads":
        x = torch.randn(batch, count, seq, dim)
    elif layout == "positions":
        x = torch.randn(batch, seq, count, dim).transpose(1, 2)
    else:
        x = torch.randn(batch, seq, count, 3, dim)[:, :, :, 1].transpose(1, 2)
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("layout", ["heads", "positions", "neither"])
@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 16), (1, 3, 3, 17, 10), (1, 1, 1, 1, 2)], ids=str)
def test_forward_and_gradients(backend: str, shape: Any, layout: str, interleaved: bool) -> None:
    batch, q_heads, k_heads, seq, dim = shape
    q, k = heads(batch, q_heads, seq, dim, layout), heads(batch, k_heads, seq, dim, layout)
    check_against(apply, specification, q, k, *tables(seq, dim // 2), interleaved)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    q, k = heads(2, 3, 9, 8, "positions", dtype), heads(2, 1, 9, 8, "positions", dtype)
    check_against(apply, specification, q, k, *(table.to(dtype) for table in tables(9, 4)), False)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_partial_rotary(backend: str, interleaved: bool) -> None:
    q, k = heads(1, 2, 4, 11, "positions"), heads(1, 2, 4, 11, "heads")
    check_against(apply, specification, q, k, *tables(4, 3), interleaved)
    assert torch.equal(rope(q, k, *tables(4, 3), interleaved)[0][..., 6:], q[..., 6:])


def test_positions_are_rows_of_the_tables(backend: str) -> None:
    q, k = heads(2, 2, 3, 8, "positions"), heads(2, 1, 3, 8, "positions")
    cos, sin = tables(20, 4)
    positions = torch.tensor([[4, 5, 19], [0, 1, 0]])
    expected = rope(q, k, cos[positions], sin[positions])
    for got in (rope(q, k, cos, sin, positions=positions), rope(q, k, cos, sin, positions=positions.int())):
        assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    first = rope(q, k, cos, sin, positions=positions[0])
    assert torch.equal(first[0][0], expected[0][0]) and not torch.equal(first[0][1], expected[0][1])


def test_layout_is_kept(backend: str) -> None:
    for layout in ("heads", "positions"):
        q, k = heads(2, 4, 6, 8, layout), heads(2, 2, 6, 8, layout)
        out_q, out_k = rope(q, k, *tables(6, 4))
        assert (out_q.stride(), out_k.stride()) == (q.stride(), k.stride())


def test_norms_and_differences_of_positions_survive(backend: str) -> None:
    q, k = heads(1, 1, 12, 32, "heads"), heads(1, 1, 12, 32, "heads")
    with torch.no_grad():
        q.copy_(q[:, :, :1].clone().expand_as(q))
        k.copy_(k[:, :, :1].clone().expand_as(k))
    out_q, out_k = (x.detach() for x in rope(q, k, *tables(12, 16)))
    assert_accurate(out_q.norm(dim=-1), q.detach().norm(dim=-1).double(), fp32_terms=8)
    scores = (out_q @ out_k.transpose(-1, -2))[0, 0]
    for shift in range(-3, 4):
        diagonal = scores.diagonal(shift)
        assert_accurate(diagonal, diagonal[:1].double().expand_as(diagonal), fp32_terms=64, magnitude=32.0)


def test_no_positions_no_heads(backend: str) -> None:
    out = rope(torch.randn(2, 3, 0, 8), torch.randn(2, 0, 0, 8), torch.zeros(0, 4), torch.zeros(0, 4))
    assert [tuple(x.shape) for x in out] == [(2, 3, 0, 8), (2, 0, 0, 8)]


def test_double_precision(backend: str) -> None:
    q, k = (x.detach().double().requires_grad_() for x in (heads(1, 2, 3, 6, "positions"), heads(1, 1, 3, 6, "heads")))
    cos, sin = (table.double() for table in tables(3, 2))
    assert torch.autograd.gradcheck(lambda a, b: rope(a, b, cos, sin, True), (q, k))


@pytest.mark.parametrize("layout", ["heads", "positions", "neither"])
def test_compiles_without_graph_break(backend: str, layout: str) -> None:
    q, k, (cos, sin) = heads(2, 4, 6, 8, layout), heads(2, 2, 6, 8, layout), tables(6, 4)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(rope(q, k, cos, sin), 1).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, got = torch.autograd.grad(loss(q, k), [q, k]), torch.autograd.grad(compiled(q, k), [q, k])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    q, k, (cos, sin) = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), tables(6, 4)
    with pytest.raises(KernelArgumentError, match=r"q is \(2, 4, 6, 8\), k is \(2, 2, 5, 8\)"):
        rope(q, k[:, :, :5], cos, sin)
    with pytest.raises(KernelArgumentError, match=r"cos is \(1, 6, 8\); .* at most dim 8 \(one angle per pair\)"):
        rope(q, k, *tables(6, 8))
    with pytest.raises(KernelArgumentError, match=r"sin has shape \(6, 3\)"):
        rope(q, k, cos, sin[:, :3])
    with pytest.raises(KernelArgumentError, match=r"positions are \(5,\) of torch.int64"):
        rope(q, k, cos, sin, positions=torch.arange(5))
    with pytest.raises(KernelArgumentError, match=r"k is of dtype torch.bfloat16; expected torch.float32"):
        rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(KernelArgumentError, match="constants"):
        rope(q, k, cos.requires_grad_(), sin)
    with pytest.raises(IndexError):
        rope(q, k, cos.detach(), sin, positions=torch.arange(6) + 1)
