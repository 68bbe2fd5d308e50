"""The sum of squares behind the gradient norm: exact enough that layouts agree, with numba and without."""

from __future__ import annotations

import math

import pytest
import torch

from ds_zero import _norm

pytestmark = pytest.mark.cpu_extra

SIZES = (1, 31, 4096, 70_001, 200_003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", SIZES)
def test_sum_of_squares_equals_fp64(dtype, numel):
    values = (torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * 3).to(dtype)
    expected = float(values.double().square().sum())
    assert float(_norm.sum_of_squares(values)) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutting_a_gradient_elsewhere_gives_the_same_fp32_norm(dtype):
    values = (torch.randn(100_000, generator=torch.Generator().manual_seed(5)) * 1e-3).to(dtype)
    whole = float(_norm.sum_of_squares(values).sqrt().float())
    for cut in (1, 32, 4097, 65_536, 99_999):
        parts = _norm.sum_of_squares(values[:cut].clone()) + _norm.sum_of_squares(values[cut:].clone())
        assert float(parts.sqrt().float()) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_element_is_seen(dtype, bad):
    values = torch.ones(70_001, dtype=dtype)
    values[70_000] = bad
    assert not math.isfinite(float(_norm.sum_of_squares(values)))


def test_large_values_do_not_overflow_in_fp32():
    assert float(_norm.sum_of_squares(torch.full((4,), 1e30))) == pytest.approx(4e60, rel=1e-6)


def test_numba_is_used_where_it_is_installed():
    numba_there = _norm.importlib.util.find_spec("numba") is not None
    assert (_norm._compiled() is not None) == numba_there
