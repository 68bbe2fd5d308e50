"""The optimizers' updates in Triton: one program per block of the flat tensors. Signatures as in `reference`."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build

__all__ = ["adagrad", "adam", "builds", "lamb_apply", "lamb_moments", "lion", "sgd"]

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _at(numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offsets, offsets < numel


@triton.jit
def _get(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def _put(pointer, offsets, mask, value, seed, STOCHASTIC: tl.constexpr):
    if pointer.dtype.element_ty == tl.bfloat16:
        # rounded by hand, so that every backend (the interpreter's cast truncates) gives the same bits
        bits = value.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            h = offsets.to(tl.uint32) * 0x9E3779B9 + seed.to(tl.uint32)
            h = (h ^ (h >> 16)) * 0x7FEB352D
            h = (h ^ (h >> 15)) * 0x846CA68B
            h = h ^ (h >> 16)
            bits = bits + (h & 0xFFFF)
        else:
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value != value, value, rounded)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask)


@triton.jit
def _adam(
    p, g, m, v, x, out, numel, scale, beta1, beta2, decay, keep, size, root, eps, seed,
    HAS_X: tl.constexpr, HAS_OUT: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, mask = _at(numel, BLOCK)
    param = _get(p, offsets, mask)
    grad = _get(g, offsets, mask) * scale + decay * param
    mean = beta1 * _get(m, offsets, mask) + (1.0 - beta1) * grad
    square = beta2 * _get(v, offsets, mask) + (1.0 - beta2) * grad * grad
    _put(m, offsets, mask, mean, seed + 1, STOCHASTIC)
    _put(v, offsets, mask, square, seed + 2, STOCHASTIC)
    if HAS_X:
        square = tl.maximum(_get(x, offsets, mask), square, propagate_nan=tl.PropagateNan.ALL)
        _put(x, offsets, mask, square, seed + 3, STOCHASTIC)
    param = keep * param - size * mean / (root * tl.sqrt(square) + eps)
    _put(p, offsets, mask, param, seed, STOCHASTIC)
    if HAS_OUT:
        _put(out, offsets, mask, param, seed, False)


@triton.jit
def _adagrad(
    p, g, s, out, numel, scale, decay, lr, eps, seed,
    HAS_OUT: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, mask = _at(numel, BLOCK)
    param = _get(p, offsets, mask)
    grad = _get(g, offsets, mask) * scale + decay * param
    square = _get(s, offsets, mask) + grad * grad
    _put(s, offsets, mask, square, seed + 1, STOCHASTIC)
    param = param - lr * grad / (tl.sqrt(square) + eps)
    _put(p, offsets, mask, param, seed, STOCHASTIC)
    if HAS_OUT:
        _put(out, offsets, mask, param, seed, False)


@triton.jit
def _lion(
    p, g, m, out, numel, scale, beta1, beta2, keep, lr, seed,
    HAS_OUT: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, mask = _at(numel, BLOCK)
    param, grad, mean = _get(p, offsets, mask), _get(g, offsets, mask) * scale, _get(m, offsets, mask)
    c = beta1 * mean + (1.0 - beta1) * grad
    _put(m, offsets, mask, beta2 * mean + (1.0 - beta2) * grad, seed + 1, STOCHASTIC)
    param = keep * param - lr * (tl.where(c > 0, 1.0, 0.0) - tl.where(c < 0, 1.0, 0.0))
    _put(p, offsets, mask, param, seed, STOCHASTIC)
    if HAS_OUT:
        _put(out, offsets, mask, param, seed, False)


@triton.jit
def _sgd(
    p, g, b, out, numel, scale, decay, momentum, rest, ahead, behind, lr, seed,
    HAS_B: tl.constexpr, HAS_OUT: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, mask = _at(numel, BLOCK)
    param = _get(p, offsets, mask)
    grad = _get(g, offsets, mask) * scale + decay * param
    if HAS_B:
        buffer = momentum * _get(b, offsets, mask) + rest * grad
        _put(b, offsets, mask, buffer, seed + 1, STOCHASTIC)
        grad = ahead * grad + behind * buffer
    param = param - lr * grad
    _put(p, offsets, mask, param, seed, STOCHASTIC)
    if HAS_OUT:
        _put(out, offsets, mask, param, seed, False)


@triton.jit
def _direction(param, mean, square, size, root, eps, inside, decay):
    return size * mean / (root * tl.sqrt(square + inside) + eps) + decay * param


@triton.jit
def _sum_of_squares(value):
    wide = value.to(tl.float64)
    return tl.sum(wide * wide, 0)


@triton.jit
def _lamb_moments(
    p, g, m, v, sums, numel, scale, beta1, beta2, size, root, eps, inside, decay, seed,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, mask = _at(numel, BLOCK)
    param, grad = _get(p, offsets, mask), _get(g, offsets, mask) * scale
    mean = beta1 * _get(m, offsets, mask) + (1.0 - beta1) * grad
    square = beta2 * _get(v, offsets, mask) + (1.0 - beta2) * grad * grad
    _put(m, offsets, mask, mean, seed + 1, STOCHASTIC)
    _put(v, offsets, mask, square, seed + 2, STOCHASTIC)
    update = tl.where(mask, _direction(param, mean, square, size, root, eps, inside, decay), 0.0)
    tl.store(sums + 2 * tl.program_id(0), _sum_of_squares(param))
    tl.store(sums + 2 * tl.program_id(0) + 1, _sum_of_squares(update))


@triton.jit
def _lamb_apply(
    p, m, v, out, numel, step, size, root, eps, inside, decay, seed,
    HAS_OUT: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets, mask = _at(numel, BLOCK)
    param = _get(p, offsets, mask)
    update = _direction(param, _get(m, offsets, mask), _get(v, offsets, mask), size, root, eps, inside, decay)
    param = param - step * update
    _put(p, offsets, mask, param, seed, STOCHASTIC)
    if HAS_OUT:
        _put(out, offsets, mask, param, seed, False)


def _grid(param: Tensor) -> tuple[int]:
    return (triton.cdiv(param.numel(), BLOCK),)


def _rounding(seed: int | None) -> tuple[int, bool]:
    # triton specialises integers that are 1 or divisible by 16; a signed value of one width avoids a build per seed
    return (0, False) if seed is None else (seed - (1 << 32) if seed >= 1 << 31 else seed, True)


def adam(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None, out: Tensor | None,
    *, scale: float, beta1: float, beta2: float, decay: float, keep: float, size: float, root: float, eps: float,
    seed: int | None,
) -> None:  # fmt: skip
    bits, stochastic = _rounding(seed)
    _adam[_grid(param)](
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, out, param.numel(), scale, beta1, beta2, decay, keep, size,
        root, eps, bits, max_exp_avg_sq is not None, out is not None, stochastic, BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def adagrad(
    param: Tensor, grad: Tensor, total: Tensor, out: Tensor | None,
    *, scale: float, decay: float, lr: float, eps: float, seed: int | None,
) -> None:  # fmt: skip
    bits, stochastic = _rounding(seed)
    _adagrad[_grid(param)](
        param, grad, total, out, param.numel(), scale, decay, lr, eps, bits, out is not None, stochastic, BLOCK,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def lion(
    param: Tensor, grad: Tensor, exp_avg: Tensor, out: Tensor | None,
    *, scale: float, beta1: float, beta2: float, keep: float, lr: float, seed: int | None,
) -> None:  # fmt: skip
    bits, stochastic = _rounding(seed)
    _lion[_grid(param)](
        param, grad, exp_avg, out, param.numel(), scale, beta1, beta2, keep, lr, bits, out is not None, stochastic,
        BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def sgd(
    param: Tensor, grad: Tensor, buffer: Tensor | None, out: Tensor | None,
    *, scale: float, decay: float, momentum: float, rest: float, ahead: float, behind: float, lr: float,
    seed: int | None,
) -> None:  # fmt: skip
    bits, stochastic = _rounding(seed)
    _sgd[_grid(param)](
        param, grad, buffer, out, param.numel(), scale, decay, momentum, rest, ahead, behind, lr, bits,
        buffer is not None, out is not None, stochastic, BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def lamb_moments(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    *, scale: float, beta1: float, beta2: float, size: float, root: float, eps: float, inside: float, decay: float,
    seed: int | None,
) -> Tensor:  # fmt: skip
    bits, stochastic = _rounding(seed)
    sums = torch.empty(*_grid(param), 2, dtype=torch.float64, device=param.device)
    _lamb_moments[_grid(param)](
        param, grad, exp_avg, exp_avg_sq, sums, param.numel(), scale, beta1, beta2, size, root, eps, inside, decay,
        bits, stochastic, BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return sums.sum(0)


def lamb_apply(
    param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, out: Tensor | None,
    *, step: float, size: float, root: float, eps: float, inside: float, decay: float, seed: int | None,
) -> None:  # fmt: skip
    bits, stochastic = _rounding(seed)
    _lamb_apply[_grid(param)](
        param, exp_avg, exp_avg_sq, out, param.numel(), step, size, root, eps, inside, decay, bits, out is not None,
        stochastic, BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def builds() -> Iterator[Build]:
    """Each kernel once, with mixed dtypes and everything switched on."""
    tensors = {"p": "*bf16", "g": "*bf16", "m": "*fp32", "v": "*bf16", "x": "*bf16", "s": "*bf16", "b": "*bf16"}
    tensors |= {"out": "*fp16", "sums": "*fp64", "numel": "i32", "seed": "i32"}
    for kernel in (_adam, _adagrad, _lion, _sgd, _lamb_moments, _lamb_apply):
        names = kernel.arg_names
        constants: dict[str, Any] = {name: True for name in names if name.isupper()} | {"BLOCK": BLOCK}
        signature = {name: tensors.get(name, "fp32") for name in names if name not in constants}
        yield Build(kernel, signature, constants, NUM_WARPS)
