"""The one-pass sums against a plain fp32 loop, and the two implementations against each other, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ds_comm import kernels
from ds_comm.transport._reduce import reduce_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [1, 2, 7, 2047, 2048, 2049, 32768, 40001]

pytestmark = pytest.mark.cpu_extra


@pytest.fixture(params=["torch", "numba"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv("DS_COMM_KERNELS", "torch" if request.param == "torch" else "auto")
    kernels._numba.cache_clear()
    assert kernels.backend() == request.param
    yield request.param
    monkeypatch.undo()
    kernels._numba.cache_clear()


def reference(rows: Tensor, scale: float = 1.0) -> Tensor:
    total = rows[0].to(torch.float32)
    for row in rows[1:]:
        total = total + row.to(torch.float32)
    return total * torch.tensor(scale, dtype=torch.float32) if scale != 1.0 else total


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, except that one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    bits = torch.int32 if actual.dtype == torch.float32 else torch.int16
    same = (actual.view(bits) == expected.view(bits)) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), f"{int((~same).sum())} elements differ, first at {int((~same).nonzero()[0])}"


def all_bit_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("numel", SIZES)
def test_sum_is_the_fp32_loop(dtype: torch.dtype, num_rows: int, numel: int) -> None:
    generator = torch.Generator().manual_seed(numel * 10 + num_rows)
    rows = (torch.randn(num_rows, numel, generator=generator) * 100).to(dtype)
    out = torch.empty(numel)
    kernels.sum_rows(rows, out)
    assert_same_bits(out, reference(rows))
    if dtype != torch.float32:
        rounded = torch.empty(numel, dtype=dtype)
        kernels.sum_rows(rows, rounded)
        assert_same_bits(rounded, reference(rows).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_accumulate(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 5001).to(dtype)
    before = torch.randn(5001)
    out = before.clone()
    kernels.sum_rows(rows, out, accumulate=True, scale=0.3)
    assert_same_bits(out, before + reference(rows, 0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1 / 3, 2.0**-30])
def test_every_bit_pattern_with_every_kind_of_partner(dtype: torch.dtype, scale: float) -> None:
    patterns = all_bit_patterns(dtype)
    for shift in (0, 1, 777, 31744, 32768, 40000):
        rows = torch.stack([patterns, patterns.roll(shift), patterns.flip(0)])
        out = torch.empty(patterns.numel())
        kernels.sum_rows(rows, out, scale=scale)
        assert_same_bits(out, reference(rows, scale))
        rounded = torch.empty(patterns.numel(), dtype=dtype)
        kernels.sum_rows(rows, rounded, scale=scale)
        assert_same_bits(rounded, reference(rows, scale).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_round_to_even_and_subnormals_survive(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal * step
    ones = torch.tensor([1.0, 1.0 + step, 1.0, tiny, torch.finfo(dtype).max], dtype=dtype)
    halves = torch.tensor([step / 2, step / 2, -step / 4, tiny, torch.finfo(dtype).max], dtype=dtype)
    out = torch.empty(5, dtype=dtype)
    kernels.sum_rows(torch.stack([ones, halves]), out)
    assert out.tolist() == [1.0, 1.0 + 2 * step, 1.0, 2 * tiny, float("inf")]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_apart_and_out_may_be_one_of_them(dtype: torch.dtype) -> None:
    table = torch.randn(4, 9000).to(dtype)
    expected = reference(table[:, 100:5103]).to(dtype)
    rows = table[:, 100:5103]
    kernels.sum_rows(rows, rows[2])
    assert_same_bits(rows[2].clone(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32, torch.int64])
def test_other_dtypes_add_in_themselves(dtype: torch.dtype) -> None:
    rows = (torch.randn(3, 1001, dtype=torch.float64) * 20).to(dtype)
    out = torch.empty(1001, dtype=dtype)
    kernels.sum_rows(rows, out)
    assert torch.equal(out, rows[0] + rows[1] + rows[2])


def test_nothing_to_sum() -> None:
    kernels.sum_rows(torch.empty(2, 0), torch.empty(0))


@given(
    values=st.lists(st.lists(st.floats(width=32), min_size=6, max_size=6), min_size=1, max_size=4),
    scale=st.floats(min_value=2.0**-20, max_value=4.0, width=32),
)
@settings(max_examples=50, deadline=None)
def test_any_fp32_values(values: list[list[float]], scale: float) -> None:
    rows = torch.tensor(values, dtype=torch.float32)
    out = torch.empty(6)
    kernels.sum_rows(rows, out, scale=scale)
    assert_same_bits(out, reference(rows, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int32])
@pytest.mark.parametrize("op", ["PRODUCT", "MIN", "MAX", "SUM"])
def test_reductions(dtype: torch.dtype, op: str) -> None:
    rows = (torch.randn(3, 33) * 5).to(dtype)
    out = torch.empty(33, dtype=dtype)
    reduce_rows(rows, out, getattr(torch.distributed.ReduceOp, op))
    wide = rows.to(torch.float32) if dtype.is_floating_point else rows
    combine = {"PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum, "SUM": torch.add}[op]
    assert torch.equal(out, combine(combine(wide[0], wide[1]), wide[2]).to(dtype))


def test_average_divides_once_at_the_end() -> None:
    rows = torch.randn(3, 33).to(torch.bfloat16)
    out = torch.empty(33, dtype=torch.bfloat16)
    reduce_rows(rows, out, torch.distributed.ReduceOp.AVG)
    assert torch.equal(out, (reference(rows) / 3).to(torch.bfloat16))
    with pytest.raises(ValueError, match="AVG needs a floating dtype"):
        reduce_rows(
            torch.ones(2, 3, dtype=torch.int32), torch.ones(3, dtype=torch.int32), torch.distributed.ReduceOp.AVG
        )


def test_the_compiler_is_forgotten_and_comes_back(implementation: str) -> None:
    if implementation == "torch":
        pytest.skip("nothing is compiled")
    rows = torch.randn(3, 4097).bfloat16()
    before, after = torch.empty(4097), torch.empty(4097)
    kernels.sum_rows(rows, before)
    assert kernels.forget_compiler() > 1 << 20
    assert kernels.forget_compiler() < 1 << 20
    kernels.sum_rows(rows, after)
    assert_same_bits(after, before)
    import numba

    assert numba.njit(lambda x: x + 1)(41) == 42


def test_only_unchanged_read_only_pages_of_the_file_are_found() -> None:
    header = "{} {} 00000000 08:01 42    /a b/{}\n"
    sizes = "Rss:      {} kB\nAnonymous:  {} kB\nVmFlags: rd ex\n"
    smaps = (
        header.format("10-20", "r-xp", "libllvmlite.so")
        + sizes.format(8, 0)
        + header.format("20-30", "rw-p", "libllvmlite.so")
        + sizes.format(4, 4)
        + header.format("30-40", "r-xp", "libother.so")
        + sizes.format(4, 0)
        + "40-50 rw-p 00000000 00:00 0 \n"
        + sizes.format(4, 4)
        + header.format("50-60", "r--p", "libllvmlite.so")
        + sizes.format(4, 4)
    )
    found = list(kernels._mappings(smaps, "libllvmlite"))
    assert [(start, stop, fields["Rss"], fields["Anonymous"]) for start, stop, fields in found] == [
        (0x10, 0x20, 8192, 0),
        (0x50, 0x60, 4096, 4096),
    ]
