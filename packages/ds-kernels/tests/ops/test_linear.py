"""linear and quantize_weight against their formulas in fp64: every format, row count, dtype, gradients, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from numerics import DTYPES, assert_accurate
from torch import Tensor

from ds_kernels import KernelArgumentError, QuantizedWeight, bind_linear, linear, quantize_weight, use_backend
from ds_kernels.ops.linear import cpu as linear_cpu
from ds_kernels.ops.linear.reference import quantize_activations
from ds_kernels.ops.linear.weight import pack, unpack

SHAPES = [(48, 64), (33, 100), (5, 7), (16, 288)]
FORMATS = [(8, True), (8, False), (4, True), (4, False)]


def made(outputs: int, columns: int, bits: int, symmetric: bool, group_size: int = 64) -> QuantizedWeight:
    weight = torch.randn(outputs, columns) + (0.0 if symmetric else 0.5)
    return quantize_weight(weight, bits, group_size=group_size, symmetric=symmetric)


def check(x: Tensor, packed: QuantizedWeight, bias: Tensor | None, activation_bits: int | None) -> None:
    """`linear` against the product in fp64; with 8-bit activations the formula's own are multiplied."""
    y = linear(x, packed, bias, activation_bits=activation_bits)
    wide, weight = x.double(), packed.dequantize(torch.float64)
    if activation_bits == 8:
        codes, unit = quantize_activations(x, packed.group_size)
        wide = codes.double() * unit.double().repeat_interleave(packed.group_size, -1)[..., : x.shape[-1]]
    expected = wide @ weight.t() + (0.0 if bias is None else bias.double())
    assert y.dtype == x.dtype and y.is_contiguous()
    # What is summed are products of codes before their middle is taken away. On CPU activations of 16 bits carry 15
    # bits and a sign of the largest in their group.
    magnitude = float(x.abs().amax().double() * weight.abs().sum(1).amax())
    fixed = 0.0 if activation_bits == 8 or x.dtype == torch.float32 else 2.0**-16 / torch.finfo(torch.float32).eps
    assert_accurate(y, expected, magnitude=magnitude, fp32_terms=16.0 + fixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_alone(backend: str, shape: tuple[int, int], bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    packed = made(*shape, bits, symmetric)
    for rows in (1, 2, 3, 8, 17) if backend == "cpu" else (3,):
        check(torch.randn(rows, shape[1]).to(dtype), packed, torch.randn(shape[0]).to(dtype), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), FORMATS)
def test_activations_of_8_bits(backend: str, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    for group_size in (32, 64):
        packed = made(33, 100, bits, symmetric, group_size)
        for rows in (1, 8, 17) if backend == "cpu" else (3,):
            check(torch.randn(rows, 100).to(dtype), packed, None, 8)


def test_shapes_around(backend: str) -> None:
    packed = made(20, 40, 8, True, 32)
    check(torch.randn(2, 3, 40), packed, None, None)
    check(torch.randn(40), packed, torch.randn(20, dtype=torch.bfloat16), None)
    check(torch.randn(40, 5).t(), packed, torch.randn(40)[::2], None)
    assert linear(torch.randn(0, 40), packed).shape == (0, 20)
    check(torch.randn(70, 40).bfloat16(), packed, None, None)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_extreme_values(backend: str, scale: float) -> None:
    packed = made(16, 64, 8, True)
    check(torch.randn(2, 64) * scale, packed, None, None)
    x = torch.randn(2, 64)
    x[0, :8] *= 1e4  # outliers cost their own group's precision only, within what fp32 sums cost anyway
    check(x, packed, None, None)


def test_not_a_number_stays_in_its_row(backend: str) -> None:
    packed = made(16, 64, 4, True)
    x = torch.randn(3, 64)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    y = linear(x, packed)
    assert y[0].isfinite().all() and y[1].isnan().all() and not y[2].isfinite().any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 96), (7, 33), (1, 64), (9, 5), (70, 2090)], ids=str)
def test_bf16_weights(backend: str, shape: tuple[int, int], bias: bool) -> None:
    outputs, columns = shape
    weight = torch.randn(shape).bfloat16()
    shift = torch.randn(outputs).bfloat16() if bias else None
    for rows in (1, 2, 3, 4, 5, 8, 9):
        x = torch.randn(rows, columns).bfloat16()
        expected = x.double() @ weight.double().t() + (0.0 if shift is None else shift.double())
        magnitude = float((x.abs().double() @ weight.abs().double().t()).max())
        assert_accurate(linear(x, weight, shift), expected, magnitude=magnitude)


@pytest.mark.parametrize("shape", [(48, 64), (33, 100), (300, 576)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bf16_weights_without_numba(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rows: int, with_bias: bool
) -> None:
    monkeypatch.setattr(linear_cpu, "HAS_NUMBA", False)
    monkeypatch.setattr(linear_cpu, "_HAS_VECTORS", True)
    weight = torch.randn(shape).bfloat16().requires_grad_()
    bias = torch.randn(shape[0]) if with_bias else None
    x = torch.randn(rows, 1, shape[1]).bfloat16().requires_grad_()
    y = linear(x, weight, bias)
    assert linear_cpu.takes_vectors(x, weight, bias) == (rows <= (1 if with_bias else 2))
    exact = x.detach().double() @ weight.detach().double().t()
    if bias is not None:
        exact += bias.bfloat16().double()
    magnitude = float(x.detach().abs().amax().double() * weight.detach().abs().sum(1).amax())
    assert_accurate(y.detach(), exact, magnitude=magnitude, fp32_terms=16.0)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), grad)
    torch.testing.assert_close(found[0], grad @ weight, rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(found[1], grad.flatten(0, 1).t() @ x.flatten(0, 1), rtol=1e-2, atol=1e-1)


def test_onednn_is_on_again_when_the_last_thread_has_left() -> None:
    switch = linear_cpu.WithoutOneDNN()
    with switch:
        with switch:
            assert not torch.backends.mkldnn.enabled
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False)])
def test_gradients(backend: str, bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    packed = made(33, 100, bits, symmetric)
    x, bias = torch.randn(2, 3, 100).to(dtype).requires_grad_(), torch.randn(33).requires_grad_()
    grad = torch.randn(2, 3, 33).to(dtype)
    got = torch.autograd.grad(linear(x, packed, bias), [x, bias], grad)
    weight = packed.dequantize(torch.float64)
    assert got[0].dtype == dtype
    assert_accurate(got[0], grad.double() @ weight, magnitude=float(weight.abs().sum(0).max() * grad.abs().max()))
    assert_accurate(got[1], grad.double().sum((0, 1)), magnitude=float(grad.abs().double().sum((0, 1)).max()))


def test_gradients_of_bf16_weights(backend: str) -> None:
    x, weight = (torch.randn(4, 64).bfloat16().requires_grad_() for _ in range(2))
    bias = torch.randn(4).bfloat16().requires_grad_()
    grad = torch.randn(4, 4).bfloat16()
    got = torch.autograd.grad(linear(x, weight, bias), [x, weight, bias], grad)
    wanted = grad.double() @ weight.double(), grad.double().t() @ x.double(), grad.double().sum(0)
    for mine, theirs in zip(got, wanted, strict=True):
        assert_accurate(mine, theirs.detach())


@pytest.mark.parametrize(("bits", "bound"), [(8, 1 / 254), (4, 1 / 15)])
def test_error_of_quantisation(bits: int, bound: float) -> None:
    """No element is off by more than half a step of its group (at 4 bits a whole one on the shorter side)."""
    weight = torch.randn(64, 200)
    for symmetric in (True, False):
        packed = quantize_weight(weight, bits, group_size=32, symmetric=symmetric)
        padded = torch.nn.functional.pad(weight, (0, 24)).view(64, 7, 32)
        span = 2 * padded.abs().amax(-1) if symmetric else padded.amax(-1) - padded.amin(-1)
        error = torch.nn.functional.pad((packed.dequantize() - weight).abs(), (0, 24)).view(64, 7, 32).amax(-1)
        steps = 1.1 if symmetric and bits == 4 else 0.55
        assert (error <= steps * bound * 1.01 * span + 1e-6).all()
    plain, searched = (quantize_weight(weight, bits, group_size=32, search=search) for search in (False, True))
    assert (searched.dequantize() - weight).square().sum() <= (plain.dequantize() - weight).square().sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_reversible(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (32, 64), dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
    packed = made(100, 64, bits, False)
    assert packed.codes.is_contiguous() and packed.nbytes == 112 * (64 * bits // 8 + 4)
    whole = packed.dequantize()
    for first, part in packed.split(40):
        assert torch.equal(part.dequantize(), whole[first : first + part.outputs])
    assert torch.equal(packed.to("cpu").dequantize(), whole)


def test_a_row_of_zeros_stays() -> None:
    weight = torch.randn(4, 64)
    weight[1] = 0
    for bits, symmetric in FORMATS:
        assert not quantize_weight(weight, bits, symmetric=symmetric).dequantize()[1].any()


def test_threads_do_not_change_bits() -> None:
    packed, dense = made(300, 96, 4, False), torch.randn(300, 96).bfloat16()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            inputs = [torch.randn(rows, 96).bfloat16() for rows in (1, 3, 40)]
            found.append([linear(x, w) for x in inputs for w in (packed, dense) if len(x) <= 8 or w is packed])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.cpu_extra
def test_the_same_bits_without_vnni() -> None:
    """The vector code for any CPU, in a process whose numba compiles for an older one."""
    pytest.importorskip("numba")
    code = (
        "import torch; from ds_kernels import linear, quantize_weight; torch.manual_seed(3);"
        "x, w = torch.randn(3, 96).bfloat16(), torch.randn(40, 96);"
        "print(linear(x, quantize_weight(w, 4)).double().tolist());"
        "print((linear(x[:1], w.bfloat16()).double() - x[:1].double() @ w.bfloat16().double().t()).abs().max().item())"
    )
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    outputs = []
    for extra in ({}, older):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **extra}
        )
        products, error = done.stdout.splitlines()
        outputs.append(products)
        assert float(error) < 0.15
    assert outputs[0] == outputs[1]


def test_compiles_without_graph_break(backend: str) -> None:
    packed = made(32, 64, 8, True)
    x, bias = torch.randn(4, 64, requires_grad=True), torch.randn(32, requires_grad=True)
    run = lambda x, bias: linear(x, packed, bias)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x, bias).sin().sum(), [x, bias])
    got = torch.autograd.grad(compiled(x, bias).sin().sum(), [x, bias])
    assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
    dense, few = torch.randn(16, 64).bfloat16(), torch.randn(2, 64).bfloat16()
    assert torch.equal(torch.compile(linear, fullgraph=True, backend="aot_eager")(few, dense), linear(few, dense))


def test_fp64_goes_to_the_reference() -> None:
    packed, x = made(16, 40, 8, True), torch.randn(2, 40, dtype=torch.float64)
    assert_accurate(linear(x, packed), x @ packed.dequantize(torch.float64).t())
    with use_backend("reference"):
        check(torch.randn(2, 40), packed, None, 8)


def test_bad_input() -> None:
    weight, x = torch.randn(16, 64), torch.randn(2, 64)
    packed = quantize_weight(weight)
    with pytest.raises(KernelArgumentError, match="bits is 5; supported are 8 and 4"):
        quantize_weight(weight, 5)
    with pytest.raises(KernelArgumentError, match="group_size is 48; it must be a multiple of 32 from 32 to 65536"):
        quantize_weight(weight, group_size=48)
    with pytest.raises(KernelArgumentError, match="group_size is 65568"):  # sums of 32 bits would overflow
        quantize_weight(weight, group_size=65568)
    with pytest.raises(KernelArgumentError, match=r"weight has shape \(64,\)"):
        quantize_weight(weight[0])
    with pytest.raises(KernelArgumentError, match="infinite or NaN"):
        quantize_weight(weight / 0)
    with pytest.raises(KernelArgumentError, match=r"last dimension must be 64"):
        linear(x[:, :63], packed)
    with pytest.raises(KernelArgumentError, match=r"bias has shape \(15,\); expected \(16,\)"):
        linear(x, packed, torch.randn(15))
    with pytest.raises(KernelArgumentError, match="activation_bits is 4; supported are 8 and None"):
        linear(x, packed, activation_bits=4)
    with pytest.raises(KernelArgumentError, match="activation_bits is for quantised weights"):
        linear(x, weight, activation_bits=8)
    with pytest.raises(KernelArgumentError, match=r"x is of dtype torch\.int64"):
        linear(torch.ones(2, 64, dtype=torch.int64), packed)
    with pytest.raises(KernelArgumentError, match=r"weight is of dtype torch.float32, x of torch.bfloat16"):
        linear(x.bfloat16(), weight)
    with pytest.raises(KernelArgumentError, match="weight is on cpu"):
        linear(x.to("meta"), packed)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_bound_to_buffers(backend: str, rows: int) -> None:
    x, bias = torch.randn(rows, 96).bfloat16(), torch.randn(40).bfloat16()
    for weight in (made(40, 96, 4, False), torch.randn(40, 96).bfloat16()):
        y = torch.empty(rows, 40, dtype=torch.bfloat16)
        call = bind_linear(x, weight, y, bias)
        for _ in range(2):
            x.normal_()
            call()
            assert torch.equal(y, linear(x, weight, bias))
    with pytest.raises(KernelArgumentError, match=r"y is torch.bfloat16 \(\d+, 40\)"):
        bind_linear(x, weight, torch.empty(rows + 1, 40, dtype=torch.bfloat16))
