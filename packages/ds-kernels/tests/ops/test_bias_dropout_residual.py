"""bias_dropout_residual: the mask (its frequencies, its sameness everywhere), forward and gradients given the mask."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES, assert_accurate, check_against
from torch import Tensor

from ds_kernels import KernelArgumentError, available_backends, bias_dropout_residual, use_backend

SHAPES = [(7, 33), (1, 576), (2, 3, 64), (5, 1), (70, 8), (2, 1025), (17,)]


def mask(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """What the op keeps: dropout of ones."""
    return bias_dropout_residual(torch.ones(shape), p=p, seed=seed) != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_forward_and_gradients(backend: str, p: float, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kept = mask(shape, p, 7)

    def specification(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + torch.where(kept, (x + bias) / (1 - p), 0.0)

    def apply(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_residual(x, bias, residual, p, seed=7)

    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    bias = torch.randn(shape[-1]).to(dtype).requires_grad_()
    check_against(apply, specification, x, bias, residual, magnitude=8.0)


def test_more_rows_than_programs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per group of the Triton backward pass."""
    if backend == "triton":
        monkeypatch.setattr("ds_kernels.ops.bias_dropout_residual.triton.NUM_GROUPS", 2)
    x, bias, grad = torch.randn(19, 33, requires_grad=True), torch.randn(33, requires_grad=True), torch.randn(19, 33)
    got = torch.autograd.grad(bias_dropout_residual(x, bias, None, 0.5, seed=4), [x, bias], grad)
    expected = torch.where(mask((19, 33), 0.5, 4), 2 * grad, 0.0)
    assert torch.equal(got[0], expected)
    assert_accurate(got[1], expected.double().sum(0))


def test_parts_are_optional(backend: str) -> None:
    x, bias = torch.randn(6, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    kept = mask((6, 40), 0.5, 3)
    assert torch.equal(bias_dropout_residual(x, None, None, 0.5, seed=3), torch.where(kept, 2 * x, 0.0))
    assert torch.equal(bias_dropout_residual(x, bias, None, 0.5, seed=3), torch.where(kept, 2 * (x + bias), 0.0))
    assert torch.equal(bias_dropout_residual(x, None, x, 0.5, seed=3), x + torch.where(kept, 2 * x, 0.0))
    assert torch.equal(bias_dropout_residual(x, bias, x, 0.5, training=False), x + bias + x)


def test_every_probability_has_its_frequency(backend: str) -> None:
    rows, dim = (64, 128) if backend == "triton" else (512, 512)
    for p in (0.1, 0.5, 0.9):
        kept = mask((rows, dim), p, 11).double()
        deviation = (p * (1 - p)) ** 0.5
        assert abs(kept.mean() - (1 - p)) < 5 * deviation / (rows * dim) ** 0.5
        assert ((kept.mean(0) - (1 - p)).abs() < 6 * deviation / rows**0.5).all()
        assert ((kept.mean(1) - (1 - p)).abs() < 6 * deviation / dim**0.5).all()
    assert mask((5, 5), 0.0, 1).all() and not mask((5, 5), 1.0, 1).any()


def test_elements_rows_columns_and_seeds_are_independent(backend: str) -> None:
    """Products of pairs of neighbouring signs, and of the same element under other seeds, average to zero."""
    rows, dim = (64, 128) if backend == "triton" else (256, 256)
    signs = mask((rows, dim), 0.5, 5).double() * 2 - 1
    bound = 5 / (rows * dim) ** 0.5
    for shift in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 16), (16, 0)):
        assert abs((signs * signs.roll(shift, (0, 1))).mean()) < bound
    for other in (4, 6, 5 + 2**32, 5 - 2**63, -5):
        assert abs((signs * (mask((rows, dim), 0.5, other).double() * 2 - 1)).mean()) < bound


@pytest.mark.parametrize("shape", [(7, 33), (3, 1025), (2, 5, 16)], ids=str)
def test_mask_is_the_same_on_every_backend(backend: str, shape: tuple[int, ...]) -> None:
    seeds = (0, 1, -1, 2**63 + 12345, 987654321987)
    expected = [mask(shape, 0.3, seed) for seed in seeds]
    for other in available_backends():
        with use_backend(other):
            assert all(torch.equal(mask(shape, 0.3, seed), kept) for seed, kept in zip(seeds, expected, strict=True))


def test_mask_is_pinned() -> None:
    """A change of the hash would change every run that is resumed."""
    words = mask((2, 16), 0.5, 2023).int()
    assert ["".join(map(str, row.tolist())) for row in words] == ["1101010100000101", "0011000110110011"]


def test_seed_comes_from_torchs_generator(backend: str) -> None:
    x = torch.ones(8, 64)
    torch.manual_seed(3)
    first, second = bias_dropout_residual(x, p=0.5), bias_dropout_residual(x, p=0.5)
    torch.manual_seed(3)
    assert torch.equal(bias_dropout_residual(x, p=0.5), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    bias_dropout_residual(x, p=0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)
    one = torch.tensor([41])
    assert torch.equal(bias_dropout_residual(x, p=0.5, seed=one), bias_dropout_residual(x, p=0.5, seed=41))


def test_infinity_that_is_dropped_is_zero(backend: str) -> None:
    x = torch.full((4, 32), float("inf"))
    y = bias_dropout_residual(x, p=0.5, seed=1)
    assert torch.equal(y == 0, ~mask((4, 32), 0.5, 1)) and not y.isnan().any()


def test_non_contiguous_and_no_rows(backend: str) -> None:
    x, residual = (torch.randn(40, 6, 2)[..., i].t() for i in range(2))
    assert torch.equal(
        bias_dropout_residual(x, None, residual, 0.5, seed=2),
        bias_dropout_residual(x.contiguous(), None, residual.contiguous(), 0.5, seed=2),
    )
    x, bias = torch.randn(0, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    bias_dropout_residual(x, bias, x, 0.5).sum().backward()
    assert bias.grad is not None and not bias.grad.any()


def test_threads_do_not_change_bits() -> None:
    x, bias = torch.randn(301, 96, dtype=torch.bfloat16, requires_grad=True), torch.randn(96, requires_grad=True)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = bias_dropout_residual(x, bias, x, 0.3, seed=5)
            found.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, bias])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_double_precision(backend: str) -> None:
    x, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,)))
    y = bias_dropout_residual(x, bias, None, 0.5, seed=9)
    assert_accurate(y.detach(), torch.where(mask((3, 5), 0.5, 9), 2 * (x + bias), 0.0).detach())
    assert torch.autograd.gradcheck(lambda x, bias: bias_dropout_residual(x, bias, x, 0.5, seed=9), (x, bias))


def test_compiles_without_graph_break(backend: str) -> None:
    x, bias, residual = (torch.randn(shape, requires_grad=True) for shape in ((4, 32), (32,), (4, 32)))

    def loss(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bias_dropout_residual(x, bias, residual, 0.5, seed=3).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, bias, residual), [x, bias, residual])
    got = torch.autograd.grad(compiled(x, bias, residual), [x, bias, residual])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    drawn = torch.compile(lambda x: bias_dropout_residual(x, p=0.5), fullgraph=True, backend="aot_eager")
    assert not torch.equal(drawn(x), drawn(x))


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(KernelArgumentError, match=r"p is .*; expected a probability in \[0, 1\]"):
            bias_dropout_residual(x, p=p)
    with pytest.raises(KernelArgumentError, match=r"residual is \(4, 7\) of torch.float32; expected \(4, 8\)"):
        bias_dropout_residual(x, residual=torch.randn(4, 7))
    with pytest.raises(KernelArgumentError, match=r"bias has shape \(7,\)"):
        bias_dropout_residual(x, torch.ones(7))
    with pytest.raises(KernelArgumentError, match=r"seed is \(2,\) of torch.int64 on cpu; expected one int64"):
        bias_dropout_residual(x, p=0.5, seed=torch.zeros(2, dtype=torch.int64))


def test_bias_with_strides(backend: str) -> None:
    x = torch.randn(5, 33)
    for bias in (torch.randn(66)[::2], torch.full((1,), 3.0).expand(33)):
        torch.testing.assert_close(bias_dropout_residual(x, bias), bias_dropout_residual(x, bias.contiguous()))
