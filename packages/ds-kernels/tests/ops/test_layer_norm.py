"""layer_norm against its formula in fp64: forward, every gradient, the fused residual, awkward shapes, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_accurate, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, layer_norm

SHAPES = [(7, 33), (1, 576), (2, 3, 64), (37, 128), (3, 9001), (17,)]


def specification(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def with_sum(y: Tensor, total: Tensor) -> Tensor:
    return torch.stack([y, total])


def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return with_sum(*layer_norm(x, weight, bias, 1e-5, residual=residual))


def apart(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return with_sum(specification(x + residual, weight, bias, 1e-5), x + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight, bias = (torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(2))
    check_against(layer_norm, specification, x, weight, bias, 1e-5)


def test_one_column(backend: str) -> None:
    """A row of one element is its own mean: y is the bias, and x gets no gradient."""
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((5, 1), (1,), (1,)))
    y = layer_norm(x, weight, bias)
    grad_x, grad_weight = torch.autograd.grad(y.sum(), [x, weight])
    assert torch.equal(y, bias.expand(5, 1)) and not grad_x.any() and not grad_weight.any()


def test_without_weight_or_bias_and_mixed_dtypes(backend: str) -> None:
    weight, bias = torch.randn(40, requires_grad=True), torch.randn(40, requires_grad=True)
    check_against(layer_norm, specification, torch.randn(5, 40, requires_grad=True), None, None, 1e-5)
    check_against(layer_norm, specification, torch.randn(5, 40, requires_grad=True), weight, None, 1e-5)
    check_against(layer_norm, specification, torch.randn(5, 40, requires_grad=True), None, bias, 1e-5)
    x = torch.randn(5, 40, dtype=torch.bfloat16, requires_grad=True)
    check_against(layer_norm, specification, x, weight, bias, 1e-5)


@pytest.mark.parametrize("shape", [(7, 33), (65, 128), (2, 9001)], ids=str)
def test_fused_residual(backend: str, shape: Any) -> None:
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    check_against(fused, apart, x, residual, weight, bias)


@pytest.mark.parametrize("shape", [(5, 33), (5, 4100)], ids=str)
def test_more_rows_than_programs(backend: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rows per group of the Triton backward pass, whose sums are held in registers or in memory."""
    if backend == "triton":
        monkeypatch.setattr("ds_kernels.ops.layer_norm.triton.NUM_GROUPS", 2)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], requires_grad=True) for _ in range(2))
    check_against(fused, apart, x, residual, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_residual_rounds_the_sum_first(backend: str, dtype: torch.dtype) -> None:
    """In 16 bits the sum is what torch's own addition gives, and y is the norm of exactly that."""
    x, residual, weight, bias = (torch.randn(9, 50).to(dtype) for _ in range(4))
    y, total = layer_norm(x, weight[0], bias[0], residual=residual)
    if backend == "cpu":  # triton's interpreter cuts bf16 off instead of rounding it
        assert torch.equal(total, x + residual)
    else:
        assert_accurate(total, x.double() + residual.double())
    assert torch.equal(y, layer_norm(total, weight[0], bias[0]))


@pytest.mark.parametrize("used", ["y", "total"])
def test_gradients_where_one_output_is_not_used(backend: str, used: str) -> None:
    x, residual = (torch.randn(4, 20, requires_grad=True) for _ in range(2))
    y, total = layer_norm(x, residual=residual)
    grad = torch.randn(4, 20)
    got = torch.autograd.grad(y if used == "y" else total, [x, residual], grad)
    assert torch.equal(got[0], got[1])
    if used == "total":
        assert torch.equal(got[0], grad)
    else:
        wide = total.detach().double().requires_grad_()
        expected = torch.autograd.grad(specification(wide, None, None, 1e-5), wide, grad.double())
        assert_accurate(got[0], expected[0])


def test_non_contiguous(backend: str) -> None:
    x = torch.randn(40, 6, 2)[..., 0].t().requires_grad_()
    check_against(layer_norm, specification, x, torch.randn(40), torch.randn(40), 1e-5)


def test_no_rows(backend: str) -> None:
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    y, total = layer_norm(x, weight, residual=x)
    (y.sum() + total.sum()).backward()
    assert y.shape == total.shape == (0, 8)
    assert weight.grad is not None and not weight.grad.any()


def test_extreme_values(backend: str) -> None:
    for scale in (1e-20, 1e15):
        check_against(layer_norm, specification, torch.randn(4, 100) * scale, torch.randn(100), None, 1e-6)
    # a mean that is large beside the deviation: what counts is how exactly fp32 holds x
    far = torch.randn(4, 100) + 1e4
    y = layer_norm(far)
    assert_accurate(y, specification(far.double(), None, None, 1e-5), magnitude=1e4)


def test_not_a_number_stays_in_its_row(backend: str) -> None:
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    y = layer_norm(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_threads_do_not_change_bits() -> None:
    x, residual = (torch.randn(301, 96, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(96, requires_grad=True) for _ in range(2))
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = fused(x, residual, weight, bias)
            gradients = torch.autograd.grad(y.float().square().sum(), [x, residual, weight, bias])
            found.append((y.detach(), *gradients))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_double_precision(backend: str) -> None:
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(fused, (x, residual, weight, bias))


def test_compiles_without_graph_break(backend: str) -> None:
    x, residual = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(32, requires_grad=True) for _ in range(2))
    for op, arguments in ((fused, [x, residual, weight, bias]), (layer_norm, [x, weight, bias])):
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        expected = torch.autograd.grad(op(*arguments).sin().sum(), arguments)
        got = torch.autograd.grad(compiled(*arguments).sin().sum(), arguments)
        assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(KernelArgumentError, match=r"bias has shape \(7,\); expected \(8,\)"):
        layer_norm(x, torch.ones(8), torch.ones(7))
    with pytest.raises(KernelArgumentError, match=r"residual is \(4, 8\) of torch.bfloat16; expected \(4, 8\) of"):
        layer_norm(x, residual=x.bfloat16())
    with pytest.raises(KernelArgumentError, match=r"weight is of dtype torch.int64"):
        layer_norm(x, torch.ones(8, dtype=torch.int64))
    with pytest.raises(KernelArgumentError, match="residual is on meta"):
        layer_norm(x, residual=x.to("meta"))


def test_rows_without_spread_and_eps_zero(backend: str) -> None:
    x = torch.randn(64, 33)
    x[3], x[40] = 0.0, 0.0
    y = layer_norm(x, eps=0.0)
    assert y[[3, 40]].isnan().all()
    assert_accurate(y[[0, 4, 63]], specification(x[[0, 4, 63]].double(), None, None, 0.0))


def test_vectors_with_strides(backend: str) -> None:
    x, vector, one = torch.randn(5, 33), torch.randn(66)[::2], torch.full((1,), 3.0).expand(33)
    for weight in (vector, one):
        torch.testing.assert_close(layer_norm(x, weight, weight), layer_norm(x, weight.clone(), weight.clone()))
