"""linear_cross_entropy against the loss of materialised logits, in fp64: both ways through, and what is not kept.

In 16 bits logits are rounded before the softmax, as F.linear's are, so the bound is that of the unfused computation:
every result is at most as far from fp64 as twice that of F.linear and F.cross_entropy in the same dtype,
plus one ulp and fp32 rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import DTYPES, wide
from test_cross_entropy import OPTIONS, formula
from torch import Tensor
from torch.nn import functional

from ds_kernels import KernelArgumentError, linear_cross_entropy
from ds_kernels.ops.linear_cross_entropy import cpu


def problem(
    rows: int, dim: int, classes: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, target; every fifth row ignored."""
    x, weight, bias = torch.randn(rows, dim), torch.randn(classes, dim) / dim**0.5, torch.randn(classes)
    target = torch.randint(0, classes, (rows,))
    target[::5] = -100
    return *(tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)), target  # type: ignore[return-value]


def unfused(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> Tensor:
    logits = functional.linear(x, weight, bias)
    return formula(logits if logits.dtype == torch.float64 else logits.float(), target, **options)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options: Any) -> None:
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    loss = linear_cross_entropy(x, weight, target, bias, **options)
    plain = unfused(x, weight, bias, target, **options)
    inputs64 = [wide(tensor) for tensor in inputs]
    exact = unfused(inputs64[0], inputs64[1], inputs64[2] if bias is not None else None, target, **options)
    grad = torch.randn_like(loss)
    compare(loss, plain, exact, "loss")
    grads = [
        torch.autograd.grad(value, leaves, grad.to(value.dtype))
        for value, leaves in ((loss, inputs), (plain, inputs), (exact, inputs64))
    ]
    for index, values in enumerate(zip(*grads, strict=True)):
        compare(*values, f"gradient {index}")


def compare(got: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """Norm-wise: at most twice the unfused error and an ulp."""
    assert got.shape == exact.shape and got.dtype == plain.dtype
    assert got.isfinite().all(), what
    error, bound = (got.double() - exact).norm(), (plain.double() - exact).norm()
    allowed = 2 * bound + (torch.finfo(got.dtype).eps + 4 * torch.finfo(torch.float32).eps) * exact.norm()
    assert error <= allowed, f"{what}: error {error:.3g}, unfused {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(7, 33, 101), (1, 16, 5), (70, 24, 4500), (3, 1, 1), (130, 8, 70)], ids=str)
def test_forward_and_gradients(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, target = problem(*sizes, dtype)
    check(x, weight, bias, torch.where(target < 0, 0, target))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend: str, options: dict[str, Any], reduction: str) -> None:
    x, weight, bias, target = problem(40, 16, 300)
    target[target == -100] = options.get("ignore_index", -100)
    check(x, weight, bias, target, **options, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_chunks_of_rows(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reduction: str) -> None:
    """Limits made small, so that sums run over chunks and tiles: three (16-bit sums) and more (fp32 sums)."""
    monkeypatch.setattr(cpu, "TILE", 64)
    monkeypatch.setattr(cpu, "ROWS", 48)
    monkeypatch.setattr(cpu, "SMALL_NBYTES", 1)
    for large in (1 << 30, 1):
        monkeypatch.setattr(cpu, "LARGE_NBYTES", large)
        check(*problem(150, 16, 300, dtype), reduction=reduction)


def test_leading_dimensions_strides_and_no_bias(backend: str) -> None:
    x, weight, _, target = problem(12, 8, 40)
    strided = torch.randn(8, 12, requires_grad=True)
    check(strided.t(), weight, None, target)
    loss = linear_cross_entropy(x.view(3, 4, 8), weight, target.view(3, 4), reduction="none")
    assert loss.shape == (3, 4)
    torch.testing.assert_close(loss.flatten(), unfused(x, weight, None, target, reduction="none"))


def test_a_tied_weight_gets_both_gradients(backend: str) -> None:
    weight = torch.randn(50, 8, requires_grad=True)
    tokens = torch.randint(0, 50, (10,))
    got, expected = (
        torch.autograd.grad(loss(weight[tokens].tanh()), weight)[0]
        for loss in (
            lambda x: linear_cross_entropy(x, weight, tokens),
            lambda x: functional.cross_entropy(x @ weight.t(), tokens),
        )
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_what_is_needed(backend: str, needed: tuple[bool, bool, bool]) -> None:
    x, weight, bias, target = problem(9, 8, 30)
    tensors = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip((x, weight, bias), needed, strict=True)]
    loss = linear_cross_entropy(tensors[0], tensors[1], target, tensors[2])
    loss.backward()
    expected = torch.autograd.grad(unfused(x, weight, bias, target), [x, weight, bias])
    for tensor, wanted, grad in zip(tensors, needed, expected, strict=True):
        assert (tensor.grad is not None) == wanted
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, grad)


def test_without_gradient_nothing_is_kept(backend: str) -> None:
    x, weight, bias, target = problem(9, 8, 30)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, target, bias)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, unfused(x, weight, bias, target).detach())


def test_backward_twice_through_one_graph(backend: str) -> None:
    x, weight, bias, target = problem(9, 8, 30)
    loss = linear_cross_entropy(x, weight, target, bias)
    for _ in range(3):  # accumulated in place into what the first pass gave away
        loss.backward(retain_graph=True)
    expected = torch.autograd.grad(unfused(x, weight, bias, target) * 3, [x, weight, bias])
    for tensor, grad in zip((x, weight, bias), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_all_rows_ignored_or_none_at_all(backend: str) -> None:
    weight = torch.randn(20, 8, requires_grad=True)
    for rows in (3, 0):
        x, target = torch.randn(rows, 8, requires_grad=True), torch.full((rows,), -100)
        for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
            loss = linear_cross_entropy(x, weight, target, reduction=reduction)
            torch.testing.assert_close(loss, torch.tensor(expected), equal_nan=True)
            grads = torch.autograd.grad(loss, [x, weight])
            assert not any(grad.any() for grad in grads)


def test_ignored_rows_take_no_part(backend: str) -> None:
    x, weight, _, target = problem(10, 8, 30)
    with torch.no_grad():
        x[::5] = torch.inf
    kept = target != -100
    loss = linear_cross_entropy(x, weight, target)
    torch.testing.assert_close(loss, unfused(x[kept], weight, None, target[kept]))


def test_autocast() -> None:
    x, weight, _, target = problem(6, 8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, target)
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32
    torch.testing.assert_close(loss, unfused(x, weight, None, target), rtol=1e-2, atol=1e-2)


def test_threads_do_not_change_bits() -> None:
    x, weight, bias, target = problem(65, 16, 3000, torch.bfloat16)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            loss = linear_cross_entropy(x, weight, target, bias)
            found.append((loss, *torch.autograd.grad(loss, [x, weight, bias])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_break(backend: str, reduction: str) -> None:
    x, weight, bias, target = problem(8, 16, 50)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x * 2, weight, target, bias, reduction=reduction).sum() * 3

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, got = (torch.autograd.grad(function(x, weight, bias), [x, weight, bias]) for function in (run, compiled))
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_bad_input() -> None:
    x, weight, bias, target = problem(4, 8, 30)
    bias = bias.detach()
    for arguments, message in (
        ((x, weight[:, :7], target), r"weight has shape \(30, 7\) and x \(4, 8\); expected \[vocabulary, dim\]"),
        ((x, weight.bfloat16(), target), "weight is of dtype torch.bfloat16; expected torch.float32, that of x"),
        ((x, weight, target, bias[:9]), r"bias has shape \(9,\); expected \(30,\)"),
        ((x, weight, target, bias.half()), "bias is of dtype torch.float16"),
        ((x, weight, target[:2]), r"target has shape \(2,\); expected \(4,\)"),
        ((x, weight, target.float()), "target is of dtype torch.float32"),
        ((x, weight, torch.full((4,), 30)), "target holds 30; expected 0 to 29"),
        ((x, weight.to("meta"), target), "weight is on meta"),
    ):
        with pytest.raises(KernelArgumentError, match=message):
            linear_cross_entropy(*arguments)  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match="reduction is 'avg'"):
        linear_cross_entropy(x, weight, target, reduction="avg")
