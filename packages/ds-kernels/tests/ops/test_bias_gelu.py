"""bias_gelu against its formula in fp64: forward, both gradients, awkward shapes, torch.compile, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, bias_gelu

both_forms = pytest.mark.parametrize("approximate", ["none", "tanh"])


def specification(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 33), (1, 576), (2, 3, 64), (5, 1), (70, 8), (2, 1025), (17,)], ids=str)
@both_forms
def test_forward_and_gradients(backend: str, approximate: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (2 * torch.randn(shape)).to(dtype).requires_grad_()
    bias = torch.randn(shape[-1]).to(dtype).requires_grad_()
    check_against(bias_gelu, specification, x, bias, approximate, magnitude=8.0 if len(shape) == 1 else None)


def test_more_rows_than_programs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per group of the Triton backward pass."""
    if backend == "triton":
        monkeypatch.setattr("ds_kernels.ops.bias_gelu.triton.NUM_GROUPS", 2)
    x, bias = torch.randn(19, 33, requires_grad=True), torch.randn(33, requires_grad=True)
    check_against(bias_gelu, specification, x, bias, "tanh")


@both_forms
def test_without_bias_and_with_another_dtype(backend: str, approximate: str) -> None:
    check_against(bias_gelu, specification, torch.randn(5, 40, requires_grad=True), None, approximate)
    x = torch.randn(5, 40, dtype=torch.bfloat16, requires_grad=True)
    check_against(bias_gelu, specification, x, torch.randn(40, requires_grad=True), approximate)


@both_forms
def test_extreme_values(backend: str, approximate: str) -> None:
    far = torch.tensor([200.0, 1e13, 1e30, 0.0])
    x = torch.cat([far, -far]).requires_grad_()
    y = bias_gelu(x, torch.zeros(8), approximate)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x.clamp(min=0))
    assert torch.equal(grad, torch.where(x == 0, 0.5, (x > 0).float()))


def test_non_contiguous_and_no_rows(backend: str) -> None:
    x = torch.randn(40, 6, 2)[..., 0].t().requires_grad_()
    check_against(bias_gelu, specification, x, torch.randn(40, requires_grad=True), "none")
    bias = torch.randn(8, requires_grad=True)
    bias_gelu(torch.randn(0, 8, requires_grad=True), bias).sum().backward()
    assert bias.grad is not None and not bias.grad.any()


def test_not_a_number_stays_where_it_is(backend: str) -> None:
    x = torch.randn(3, 40)
    x[1, 3] = float("nan")
    assert torch.equal(bias_gelu(x).isnan(), x.isnan())


def test_threads_do_not_change_bits() -> None:
    x, bias = torch.randn(301, 96, dtype=torch.bfloat16, requires_grad=True), torch.randn(96, requires_grad=True)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = bias_gelu(x, bias)
            found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, bias])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@both_forms
def test_double_precision(backend: str, approximate: str) -> None:
    x, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,)))
    assert torch.autograd.gradcheck(lambda x, bias: bias_gelu(x, bias, approximate), (x, bias))


def test_compiles_without_graph_break(backend: str) -> None:
    x, bias = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(bias_gelu(x, bias).sin().sum(), [x, bias])
    got = torch.autograd.grad(compiled(x, bias).sin().sum(), [x, bias])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(KernelArgumentError, match=r"bias has shape \(4, 8\); expected \(8,\)"):
        bias_gelu(x, x)
    with pytest.raises(KernelArgumentError, match="approximate is 'fast'; supported are 'none'"):
        bias_gelu(x, approximate="fast")
    with pytest.raises(KernelArgumentError, match=r"x is of dtype torch.int32; supported are float32"):
        bias_gelu(x.int())


def test_bias_with_strides(backend: str) -> None:
    x = torch.randn(5, 33)
    for bias in (torch.randn(66)[::2], torch.full((1,), 3.0).expand(33)):
        torch.testing.assert_close(bias_gelu(x, bias), bias_gelu(x, bias.contiguous()))
