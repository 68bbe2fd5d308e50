"""softmax against its formula in fp64: masks of every kind and shape, causal, empty rows, gradients, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, assert_accurate, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, softmax


def specification(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    scores = x * scale
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        rows, cols = x.shape[-2:]
        hidden = torch.arange(cols) > torch.arange(rows)[:, None] + cols - rows
        scores = scores.masked_fill(hidden, -torch.inf)
    # as the formula, but without 0 / 0 where nothing is seen
    powers = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return powers / powers.sum(-1, keepdim=True).clamp(min=1e-300)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Backward starts from the rounded result (cut off, in triton's interpreter): an ulp in each term of its sum."""
    return {} if dtype == torch.float32 else {"ulps": 2.0, "fp32_terms": 2 * torch.finfo(dtype).eps / 2**-23}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 33), (1, 1), (7, 576), (4, 9001), (13,), (2, 2, 2, 3, 9)], ids=str)
def test_forward_and_gradient(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape)).to(dtype).requires_grad_()
    assert_accurate(softmax(x, None, 0.7).detach(), specification(x.detach().double(), None, 0.7, False))
    check_against(softmax, specification, x, None, 0.7, False, **tolerance(dtype))


MASKS = [(2, 3, 5, 33), (2, 1, 1, 33), (2, 1, 5, 33), (1, 3, 5, 1), (5, 33), (33,), (1, 1, 1, 33), (3, 1, 1), (1,)]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(backend: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
    mask = torch.rand(shape) > 0.4 if kind == torch.bool else torch.randn(shape).to(kind)
    x = torch.randn(2, 3, 5, 33, requires_grad=True)
    check_against(softmax, specification, x, mask, 1.3, False)


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_masks_of_other_numbers_of_dimensions(backend: str, dims: int) -> None:
    x = torch.randn((2, 3, 2, 4, 9)[-dims:], requires_grad=True)
    for shape in ((4, 9), (1, 9), (*x.shape[:1], *[1] * (dims - 1))):
        check_against(softmax, specification, x, torch.rand(shape) > 0.3, 1.0, False)


def test_mask_with_strides(backend: str) -> None:
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    check_against(softmax, specification, x, torch.randn(8, 5).t(), 1.0, False)
    check_against(softmax, specification, x, torch.randn(2, 5, 1, 8).transpose(1, 2), 1.0, False)


@pytest.mark.parametrize("shape", [(2, 5, 5), (3, 4, 9), (2, 9, 4), (1, 7), (6, 1)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_causal(backend: str, shape: tuple[int, ...], masked: bool) -> None:
    """Also where there are more rows than columns: the first rows see nothing and are zero."""
    x = torch.randn(shape, requires_grad=True)
    check_against(softmax, specification, x, torch.rand(shape[-1]) > 0.3 if masked else None, 0.5, True)


def test_causal_does_not_look_at_what_it_hides(backend: str) -> None:
    x = torch.randn(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), float("nan")).requires_grad_()
    y = softmax(x, causal=True)
    (grad,) = torch.autograd.grad(y, x, torch.randn(6, 6))
    assert y.isfinite().all() and grad.isfinite().all()


def test_rows_that_see_nothing_are_zero(backend: str) -> None:
    x = torch.randn(4, 6, requires_grad=True)
    for mask in (torch.zeros(4, 6, dtype=torch.bool), torch.full((6,), -torch.inf)):
        y = softmax(x, mask)
        assert not y.any()
        assert not torch.autograd.grad(y.sum(), x)[0].any()


def test_extreme_values(backend: str) -> None:
    x = torch.tensor([[1e30, -1e30, 0.0], [3e4, 3e4 - 1, -3e4], [-1e30, -1e30, -1e30], [-torch.inf, 5.0, 5.0]])
    check_against(softmax, specification, x, None, 1.0, False)
    check_against(softmax, specification, x[1:2], torch.full((3,), torch.finfo(torch.float32).min / 4), 1.0, False)


def test_not_a_number_stays_in_its_row(backend: str) -> None:
    for value in (float("nan"), -float("nan"), float("inf")):
        x = torch.randn(3, 40)
        x[1, 2] = value
        y = softmax(x)
        assert y[1].isnan().any() and y[[0, 2]].isfinite().all()


def test_non_contiguous_and_empty(backend: str) -> None:
    x = torch.randn(9, 5, 2)[..., 0].t().requires_grad_()
    check_against(softmax, specification, x, None, 1.0, True)
    empty = torch.randn(0, 3, 8, requires_grad=True)
    softmax(empty, torch.ones(8, dtype=torch.bool), causal=True).sum().backward()
    assert empty.grad is not None and softmax(torch.randn(3, 0)).shape == (3, 0)


def test_threads_do_not_change_bits() -> None:
    x = torch.randn(301, 96, dtype=torch.bfloat16, requires_grad=True)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = softmax(x, causal=True)
            found.append((y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_double_precision(backend: str) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: softmax(x, torch.randn(5).new_ones(5), 0.7, True), x)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_compiles_without_graph_break(backend: str, kind: str) -> None:
    x = torch.randn(2, 4, 32, requires_grad=True)
    mask: Any = {"none": None, "bool": torch.rand(4, 32) > 0.5, "float": torch.randn(32)}[kind]
    compiled = torch.compile(softmax, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(softmax(x, mask, 0.5, True).sin().sum(), x)
    got = torch.autograd.grad(compiled(x, mask, 0.5, True).sin().sum(), x)
    assert torch.equal(got[0], expected[0])


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(KernelArgumentError, match=r"mask has shape \(3, 8\); .* broadcasts to x, \(4, 8\)"):
        softmax(x, torch.zeros(3, 8))
    with pytest.raises(KernelArgumentError, match=r"mask has shape \(1, 4, 8\)"):
        softmax(x, torch.zeros(1, 4, 8))
    with pytest.raises(KernelArgumentError, match=r"mask is of dtype torch.int64; supported are bool, float32"):
        softmax(x, torch.zeros(8, dtype=torch.int64))
    with pytest.raises(KernelArgumentError, match="mask is a constant"):
        softmax(x, torch.zeros(8, requires_grad=True))
    with pytest.raises(KernelArgumentError, match=r"x has shape \(8,\); expected"):
        softmax(x[0], causal=True)


def test_a_row_of_nan_of_either_sign_is_nan(backend: str) -> None:
    for sign in (1.0, -1.0):
        nan = torch.copysign(torch.full((3, 8), float("nan")), torch.tensor(sign))
        assert softmax(nan).isnan().all()
