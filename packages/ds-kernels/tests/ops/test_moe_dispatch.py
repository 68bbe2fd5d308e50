"""moe_dispatch and moe_combine against one-hot products in fp64: drops, padding, gradients of tokens and weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from numerics import DTYPES, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError
from ds_kernels.ops.grouped_gemm import grouped_gemm
from ds_kernels.ops.moe_dispatch import moe_combine, moe_dispatch
from ds_kernels.ops.moe_gating import Routing, moe_gate

CASES = [(9, 4, 2, None, False), (30, 5, 3, 4, False), (30, 5, 3, 4, True), (1, 3, 1, 2, True)]


def one_hot(routing: Routing) -> Tensor:
    """[tokens, k, rows] in fp64: the dense dispatch tensor of GShard."""
    slots = routing.slots
    return torch.nn.functional.one_hot(slots + 1, routing.num_rows + 1)[..., 1:].double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_dispatch(backend: str, case: tuple[int, int, int, int | None, bool], dtype: torch.dtype) -> None:
    tokens, num_experts, top_k, capacity, padded = case
    routing = moe_gate(torch.randn(tokens, num_experts), top_k, capacity=capacity, padded=padded)
    x = torch.randn(tokens, 37).to(dtype).requires_grad_()
    check_against(lambda x: moe_dispatch(x, routing), lambda x: torch.einsum("tkr,th->rh", one_hot(routing), x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_combine(backend: str, case: tuple[int, int, int, int | None, bool], dtype: torch.dtype) -> None:
    tokens, num_experts, top_k, capacity, padded = case
    routing = moe_gate(torch.randn(tokens, num_experts), top_k, capacity=capacity, padded=padded)
    y = torch.randn(routing.num_rows, 37).to(dtype).requires_grad_()
    weights = routing.weights.detach().requires_grad_()
    check_against(
        lambda y, weights: moe_combine(y, dataclasses.replace(routing, weights=weights)),
        lambda y, weights: torch.einsum("tkr,tk,rh->th", one_hot(routing), weights, y),
        y,
        weights,
    )


def test_infinity_of_an_unused_row_reaches_nobody(backend: str) -> None:
    routing = moe_gate(torch.randn(6, 3), 1, capacity=4, padded=True)
    y = torch.where((routing.sources < 0).unsqueeze(1), float("nan"), torch.randn(12, 8))
    assert moe_combine(y, routing).isfinite().all()


def test_no_tokens(backend: str) -> None:
    routing = moe_gate(torch.randn(0, 3), 2, capacity=2, padded=True)
    x = torch.randn(0, 5, requires_grad=True)
    rows = moe_dispatch(x, routing)
    assert rows.shape == (6, 5) and not rows.any()
    moe_combine(rows, routing).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 5)


def mixture(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    routing = moe_gate(x @ router, 2)
    rows = torch.relu(grouped_gemm(moe_dispatch(x, routing), up, routing.ends))
    return moe_combine(grouped_gemm(rows, down, routing.ends), routing)


def dense_mixture(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert sees every token; its weight is zero where it was not chosen."""
    probs = torch.softmax(x @ router, -1)
    best = probs.topk(2)
    weights = torch.zeros_like(probs).scatter(1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    y = torch.einsum("teo,edo->ted", torch.relu(torch.einsum("td,eod->teo", x, up)), down)
    return torch.einsum("te,ted->td", weights, y)


def test_whole_mixture(backend: str) -> None:
    shapes = [(25, 16), (16, 6), (6, 20, 16), (6, 16, 20)]
    args = [torch.randn(shape).mul(0.5).requires_grad_() for shape in shapes]
    check_against(mixture, dense_mixture, *args, fp32_terms=64, magnitude=64.0)


def test_compiles_without_graph_break(backend: str) -> None:
    shapes = [(10, 8), (8, 3), (3, 6, 8), (3, 8, 6)]
    args = [torch.randn(shape, requires_grad=True) for shape in shapes]
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(mixture(*args).sin().sum(), args)
    got = torch.autograd.grad(compiled(*args).sin().sum(), args)
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    routing = moe_gate(torch.randn(4, 3), 2)
    with pytest.raises(KernelArgumentError, match=r"x has shape \(5, 8\); expected \(4, hidden\)"):
        moe_dispatch(torch.randn(5, 8), routing)
    with pytest.raises(KernelArgumentError, match=r"y has shape \(4, 8\); expected \(8, hidden\)"):
        moe_combine(torch.randn(4, 8), routing)
    with pytest.raises(KernelArgumentError, match=r"x is of dtype torch.int64"):
        moe_dispatch(torch.ones(4, 8, dtype=torch.int64), routing)


def test_weights_wider_than_rows(backend: str) -> None:
    routing = moe_gate(torch.randn(6, 4, dtype=torch.float64).requires_grad_(), 2)
    y = torch.randn(12, 8, requires_grad=True)
    narrow = dataclasses.replace(routing, weights=routing.weights.float())
    out = moe_combine(y, routing)
    torch.testing.assert_close(out, moe_combine(y, narrow))
    (grad,) = torch.autograd.grad(out.sum(), routing.weights)
    assert grad.dtype == torch.float64
    torch.testing.assert_close(grad.float(), y.detach().sum(1)[routing.slots])
