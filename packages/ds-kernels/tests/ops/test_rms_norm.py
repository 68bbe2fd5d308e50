"""rms_norm against its formula in fp64: forward, both gradients, awkward shapes, torch.compile, bad input."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES, assert_accurate, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, rms_norm

SHAPES = [(7, 33), (1, 576), (2, 3, 64), (5, 1), (37, 128), (3, 9001), (17,)]


def specification(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (offset + weight)


def apply(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    return rms_norm(x, weight, eps, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(shape[-1]).to(dtype).requires_grad_()
    # one column: the gradient is a difference of two nearly equal terms of the size of grad * rstd
    magnitude = 64.0 if shape[-1] == 1 else None
    check_against(apply, specification, x, weight, 1e-6, 1.0, magnitude=magnitude)


def test_no_weight_and_mixed_dtypes(backend: str) -> None:
    check_against(apply, specification, torch.randn(5, 40, requires_grad=True), None, 1e-5, 0.0)
    x = torch.randn(5, 40, dtype=torch.bfloat16, requires_grad=True)
    check_against(apply, specification, x, torch.randn(40, requires_grad=True), 1e-5, 0.0)


def fused(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.stack(rms_norm(x, weight, 1e-6, offset=1.0, residual=residual))


def apart(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([specification(x + residual, weight, 1e-6, 1.0), x + residual])


@pytest.mark.parametrize("shape", [(7, 33), (65, 128), (2, 9001)], ids=str)
def test_fused_residual(backend: str, shape: tuple[int, ...]) -> None:
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    check_against(fused, apart, x, residual, torch.randn(shape[-1], requires_grad=True))


@pytest.mark.parametrize("shape", [(5, 33), (5, 4100)], ids=str)
def test_more_rows_than_programs(backend: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows per group of the Triton backward pass, whose sums are held in registers or in memory."""
    if backend == "triton":
        monkeypatch.setattr("ds_kernels.ops.rms_norm.triton.NUM_GROUPS", 2)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight = torch.randn(shape[-1], requires_grad=True)
    check_against(fused, apart, x, residual, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_residual_rounds_the_sum_first(backend: str, dtype: torch.dtype) -> None:
    """In 16 bits the sum is what torch's own addition gives, and y is the norm of exactly that."""
    x, residual, weight = (torch.randn(9, 50).to(dtype) for _ in range(3))
    y, total = rms_norm(x, weight[0], residual=residual)
    if backend == "cpu":  # triton's interpreter cuts bf16 off instead of rounding it
        assert torch.equal(total, x + residual)
    else:
        assert_accurate(total, x.double() + residual.double())
    assert torch.equal(y, rms_norm(total, weight[0]))


@pytest.mark.parametrize("used", [0, 1], ids=["y", "total"])
def test_gradients_where_one_output_is_not_used(backend: str, used: int) -> None:
    x, residual, grad = (torch.randn(4, 20, requires_grad=True) for _ in range(3))
    got = torch.autograd.grad(rms_norm(x, residual=residual)[used], [x, residual], grad)
    total = (x + residual).detach().requires_grad_()
    expected = torch.autograd.grad(rms_norm(total), total, grad)[0] if used == 0 else grad
    assert torch.equal(got[0], expected) and torch.equal(got[1], expected)


def test_non_contiguous(backend: str) -> None:
    x = torch.randn(40, 6, 2)[..., 0].t().requires_grad_()
    check_against(apply, specification, x, torch.randn(40, requires_grad=True), 1e-6, 0.0)


def test_no_rows(backend: str) -> None:
    x = torch.randn(0, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_values(backend: str, scale: float) -> None:
    check_against(apply, specification, torch.randn(4, 100) * scale, torch.randn(100), 1e-6, 0.0)


def test_not_a_number_stays_in_its_row(backend: str) -> None:
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    y = rms_norm(x, torch.ones(16))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_threads_do_not_change_bits() -> None:
    x = torch.randn(301, 96, dtype=torch.bfloat16)
    weight = torch.randn(96, requires_grad=True)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = rms_norm(x.requires_grad_(), weight)
            found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, weight])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_compiles_without_graph_break(backend: str) -> None:
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(rms_norm(x, weight).sin().sum(), [x, weight])
    got = torch.autograd.grad(compiled(x, weight).sin().sum(), [x, weight])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    residual = torch.randn(4, 32, requires_grad=True)
    together = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(fused(x, residual, weight).sin().sum(), [x, residual, weight])
    got = torch.autograd.grad(together(x, residual, weight).sin().sum(), [x, residual, weight])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(KernelArgumentError, match=r"weight has shape \(7,\); expected \(8,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(KernelArgumentError, match=r"x is of dtype torch.int64; supported are float32"):
        rms_norm(torch.ones(4, 8, dtype=torch.int64))
    with pytest.raises(KernelArgumentError, match="weight is on meta"):
        rms_norm(x, torch.ones(8, device="meta"))
    with pytest.raises(KernelArgumentError, match=r"residual is \(4, 7\) of torch.float32; expected \(4, 8\)"):
        rms_norm(x, residual=torch.randn(4, 7))
    with pytest.raises(KernelArgumentError, match="scalar"):
        rms_norm(torch.tensor(1.0))


def test_rows_without_spread_and_eps_zero(backend: str) -> None:
    x = torch.randn(64, 33)
    x[3], x[40] = 0.0, 0.0
    y = rms_norm(x, eps=0.0)
    assert y[[3, 40]].isnan().all()
    assert_accurate(y[[0, 4, 63]], specification(x[[0, 4, 63]].double(), None, 0.0, 0.0))


def test_vectors_with_strides(backend: str) -> None:
    x, vector, one = torch.randn(5, 33), torch.randn(66)[::2], torch.full((1,), 3.0).expand(33)
    for weight in (vector, one):
        torch.testing.assert_close(rms_norm(x, weight), rms_norm(x, weight.clone()))
