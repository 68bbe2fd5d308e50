"""quantize against its formula in fp64: every format, both kinds, awkward shapes, exactness where promised."""

from __future__ import annotations

import pytest
import torch
from numerics import DTYPES
from torch import Tensor

from ds_kernels import KernelArgumentError, quantize

CASES = [("int8", True), ("int8", False), ("int4", True), ("int4", False), ("fp8_e4m3", True), ("fp8_e5m2", True)]
LIMITS = {"int8": 127, "int4": 7, "fp8_e4m3": 448, "fp8_e5m2": 57344}
STEPS = {"int8": 255, "int4": 15}
FRACTION = {"fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3}


def half_step(x: Tensor, name: str, block_size: int, symmetric: bool) -> Tensor:
    """The largest error that the format allows per element of x (fp64)."""
    parts = []
    for block in x.double().split(block_size, -1):
        largest = block.abs().amax(-1, keepdim=True)
        if name in FRACTION:  # relative, and the step of the subnormal numbers (2^-9 and 2^-16 of the scaled range)
            lowest = largest / LIMITS[name] * (2.0**-10 if name == "fp8_e4m3" else 2.0**-17)
            parts.append(torch.maximum(block.abs() * FRACTION[name], lowest.expand_as(block)))
        else:
            span = block.amax(-1, keepdim=True) - block.amin(-1, keepdim=True)
            step = largest / LIMITS[name] if symmetric else span / STEPS[name]
            parts.append((step / 2).expand_as(block))
    return torch.cat(parts, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7, 128), (3, 5, 33), (1, 1), (2, 300), (17,), (1100, 130)], ids=str)
@pytest.mark.parametrize(("name", "symmetric"), CASES)
def test_error_is_half_a_step(name: str, symmetric: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) + (0 if symmetric else 3)).to(dtype)
    packed = quantize(x, name, block_size=32, symmetric=symmetric)
    back = packed.dequantize(torch.float32)
    assert back.shape == x.shape and packed.dequantize().dtype == dtype
    error = (back.double() - x.double()).abs()
    assert (error <= 1.001 * half_step(x, name, 32, symmetric) + 1e-6 * x.double().abs().amax()).all()


@pytest.mark.parametrize(("name", "symmetric"), CASES)
def test_what_is_on_the_grid_comes_back(name: str, symmetric: bool) -> None:
    packed = quantize(torch.randn(4, 64), name, block_size=16, symmetric=symmetric)
    once = packed.dequantize()
    twice = quantize(once, name, block_size=16, symmetric=symmetric).dequantize()
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=1e-6)
    constant = torch.full((2, 32), 0.0 if symmetric else -2.5)
    assert torch.equal(quantize(constant, name, block_size=16, symmetric=symmetric).dequantize(), constant)


def test_sizes() -> None:
    x = torch.randn(10, 100)
    assert quantize(x).nbytes == 10 * 100 + 10 * 4
    packed = quantize(x[:, :99], "int4", block_size=32, symmetric=False)
    assert packed.codes.shape == (10, 50) and packed.nbytes == 10 * 50 + 10 * 2 * 4 * 4
    assert quantize(x, "fp8_e5m2").codes.dtype == torch.float8_e5m2


@pytest.mark.parametrize(("name", "symmetric"), CASES)
def test_chunks_change_nothing(name: str, symmetric: bool) -> None:
    x = torch.randn(1100, 130)  # more than a chunk
    whole = quantize(x, name, block_size=64, symmetric=symmetric)
    first = quantize(x[:3], name, block_size=64, symmetric=symmetric)
    assert torch.equal(whole.codes[:3].view(torch.uint8), first.codes.view(torch.uint8))
    assert torch.equal(whole.dequantize()[:3], first.dequantize())


def test_non_contiguous_and_no_rows() -> None:
    x = torch.randn(64, 6).t()
    assert torch.equal(quantize(x).dequantize(), quantize(x.contiguous()).dequantize())
    assert quantize(torch.randn(0, 8)).dequantize().shape == (0, 8)


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_extreme_values(scale: float) -> None:
    x = torch.randn(4, 64) * scale
    error = (quantize(x).dequantize().double() - x.double()).abs()
    assert (error <= 0.51 * x.abs().amax().double() / 127).all()


def test_compiles() -> None:
    x = torch.randn(4, 64)
    compiled = torch.compile(lambda x: quantize(x, "int4").dequantize(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), quantize(x, "int4").dequantize())


def test_bad_input() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(KernelArgumentError, match="format is 'int3'; supported are int8, int4, fp8_e4m3, fp8_e5m2"):
        quantize(x, "int3")
    with pytest.raises(KernelArgumentError, match="block_size is 5"):
        quantize(x, block_size=5)
    with pytest.raises(KernelArgumentError, match="fp8_e4m3 is symmetric only"):
        quantize(x, "fp8_e4m3", symmetric=False)
    with pytest.raises(KernelArgumentError, match=r"x has shape \(\)"):
        quantize(torch.tensor(1.0))
    with pytest.raises(KernelArgumentError, match=r"x is of dtype torch\.int32"):
        quantize(torch.ones(4, dtype=torch.int32))
