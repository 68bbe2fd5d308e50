"""grouped_gemm against one product per group in fp64: sizes of groups, few and many rows, gradients, layouts."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, use_backend
from ds_kernels.ops.grouped_gemm import grouped_gemm

SIZES = [[3, 0, 17, 1], [0, 0, 40], [1, 2, 4, 5, 8], [70]]


def specification(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    """One product per group; rows of no group are zero."""
    low, parts = 0, []
    for group, high in enumerate(ends.tolist()):
        part = x[low:high] @ weight[group].t()
        parts.append(part if bias is None else part + bias[group])
        low = high
    return torch.cat([*parts, x.new_zeros(x.shape[0] - low, weight.shape[1])])


def case(sizes: list[int], spare: int, inner: int, out: int, dtype: torch.dtype, bias: bool = True) -> list[Tensor]:
    ends = torch.tensor(sizes).cumsum(0)
    x = torch.randn(sum(sizes) + spare, inner).to(dtype).requires_grad_()
    weight = (torch.randn(len(sizes), out, inner) / max(1, inner) ** 0.5).to(dtype).requires_grad_()
    return [x, weight, ends, torch.randn(len(sizes), out).to(dtype).requires_grad_() if bias else None]  # type: ignore[list-item]


def check(*args: object) -> None:
    check_against(grouped_gemm, specification, *args, fp32_terms=64, magnitude=16.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_gradients(backend: str, sizes: list[int], dtype: torch.dtype) -> None:
    check(*case(sizes, spare=5, inner=33, out=70, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_without_bias_and_both_integers(backend: str, dtype: torch.dtype) -> None:
    x, weight, ends, _ = case([4, 9], 0, 130, 40, torch.bfloat16, bias=False)
    check(x, weight, ends.to(dtype), None)


def test_weight_stored_the_other_way_round(backend: str) -> None:
    weight = torch.randn(3, 24, 40).transpose(1, 2).requires_grad_()
    check(torch.randn(20, 24, requires_grad=True), weight, torch.tensor([2, 12, 20]), None)


def test_non_contiguous(backend: str) -> None:
    x = torch.randn(16, 20).t().requires_grad_()
    check(x, torch.randn(6, 8, 16)[::3].requires_grad_(), torch.tensor([2, 20]), None)


@pytest.mark.parametrize(("rows", "inner", "out"), [(0, 8, 6), (4, 8, 0), (4, 0, 6)])
def test_nothing_to_do(backend: str, rows: int, inner: int, out: int) -> None:
    check(*case([rows, 0], 0, inner, out, torch.float32))


def test_some_gradients_only(backend: str) -> None:
    for wanted in (0, 1, 3):
        args = case([3, 8], 1, 12, 9, torch.float32)
        for index in (0, 1, 3):
            args[index] = args[index].detach().requires_grad_(index == wanted)
        check(*args)


def test_extreme_values(backend: str) -> None:
    """Another group's infinity is not met: rows and groups do not touch each other."""
    x, weight, ends, _ = (t.detach() if t is not None else t for t in case([2, 30], 0, 16, 8, torch.float32, False))
    weight[0] = float("inf")
    x[0] = 1e30
    y = grouped_gemm(x, weight, ends)
    assert not y[:2].isfinite().any()
    check(x[2:], weight[1:], ends[1:] - 2, None)
    assert y[2:].isfinite().all()


def test_few_rows_do_not_depend_on_threads() -> None:
    x, weight, ends, _ = (
        t.detach() if t is not None else t for t in case([1, 3, 2], 0, 96, 300, torch.bfloat16, False)
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(grouped_gemm(x, weight, ends))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_fp64_takes_the_reference() -> None:
    with use_backend("reference"):
        x, weight, ends, bias = (
            t.detach().double() if t.is_floating_point() else t for t in case([3, 2], 1, 5, 4, torch.float32)
        )
        assert torch.allclose(grouped_gemm(x, weight, ends, bias), specification(x, weight, ends, bias), atol=1e-14)


def test_compiles_without_graph_break(backend: str) -> None:
    args = case([3, 6], 1, 16, 12, torch.float32)
    leaves = [args[0], args[1], args[3]]
    compiled = torch.compile(grouped_gemm, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(grouped_gemm(*args).sin().sum(), leaves)
    got = torch.autograd.grad(compiled(*args).sin().sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    x, weight, ends = torch.randn(4, 8), torch.randn(2, 6, 8), torch.tensor([2, 4])
    with pytest.raises(KernelArgumentError, match=r"x has shape \(4, 8\) and weight \(2, 6, 7\)"):
        grouped_gemm(x, torch.randn(2, 6, 7), ends)
    with pytest.raises(KernelArgumentError, match=r"ends has shape \(3,\); expected \(2,\)"):
        grouped_gemm(x, weight, torch.tensor([1, 2, 4]))
    with pytest.raises(KernelArgumentError, match=r"ends is \[3, 2\]; expected numbers that do not decrease"):
        grouped_gemm(x, weight, torch.tensor([3, 2]))
    with pytest.raises(KernelArgumentError, match=r"at most 4 rows"):
        grouped_gemm(x, weight, torch.tensor([3, 5]))
    with pytest.raises(KernelArgumentError, match=r"ends is of dtype torch.float32; supported are int32, int64"):
        grouped_gemm(x, weight, ends.float())
    with pytest.raises(KernelArgumentError, match=r"bias has shape \(6,\); expected \(2, 6\)"):
        grouped_gemm(x, weight, ends, torch.randn(6))
    with pytest.raises(KernelArgumentError, match=r"weight is of dtype torch.bfloat16; expected x's, torch.float32"):
        grouped_gemm(x, weight.bfloat16(), ends)
