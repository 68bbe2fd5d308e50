"""cross_entropy in Triton: a program per row forward (online softmax), a program per row and block backward."""
# mypy: disable-error-code="import-untyped,misc,untyped-decorator,no-untyped-call,no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_kernels._triton import Build, next_power_of_2
from ds_kernels.ops.cross_entropy import reference

__all__ = ["builds", "cross_entropy", "cross_entropy_backward", "gradient"]

BLOCK = 4096
"""Logits that a program holds at a time."""
NUM_WARPS = 8


@triton.jit
def _forward(logits, target, loss, lse, vocabulary, ignore_index, smoothing, z_loss, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(target + row)
    source = logits + row * vocabulary
    maximum, exps, sums = -float("inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < vocabulary
        values = tl.load(source + cols, mask, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(maximum, tl.max(values, 0))
        anchor = tl.where(largest == -float("inf"), 0.0, largest)
        exps = exps * tl.exp(maximum - anchor) + tl.sum(tl.exp(values - anchor), 0)
        sums += tl.sum(tl.where(mask, values, 0.0), 0)
        maximum = largest
    normaliser = maximum + tl.log(exps)
    valid = column != ignore_index
    inside = valid & (column >= 0) & (column < vocabulary)
    picked = tl.load(source + column, inside, other=float("nan")).to(tl.float32)
    result = normaliser - (1.0 - smoothing) * picked + z_loss * normaliser * normaliser
    # without smoothing a logit of -inf must not meet 0 * -inf
    result -= tl.where(smoothing > 0.0, smoothing / vocabulary * sums, 0.0)
    tl.store(lse + row, normaliser)
    tl.store(loss + row, tl.where(valid, result, 0.0))


@triton.jit
def _gradient(
    grad, logits, out, target, lse, vocabulary, ignore_index, smoothing, z_loss, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < vocabulary
    column, normaliser = tl.load(target + row), tl.load(lse + row)
    values = tl.load(logits + row * vocabulary + cols, mask, other=0.0).to(tl.float32)
    result = tl.exp(values - normaliser) * (1.0 + 2.0 * z_loss * normaliser) - smoothing / vocabulary
    result -= tl.where(cols == column, 1.0 - smoothing, 0.0)
    result = tl.where(column != ignore_index, result * tl.load(grad + row), 0.0)
    tl.store(out + row * vocabulary + cols, result.to(out.dtype.element_ty), mask)


def _block(vocabulary: int) -> int:
    return min(BLOCK, next_power_of_2(vocabulary))


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    rows, vocabulary = logits.shape
    if logits.dtype == torch.float64 or not rows:
        return reference.cross_entropy(logits, target, ignore_index, smoothing, z_loss)
    loss, lse = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    _forward[(rows,)](
        logits, target, loss, lse, vocabulary, ignore_index, smoothing, z_loss, _block(vocabulary), num_warps=NUM_WARPS
    )
    return loss, lse


def gradient(
    grad: Tensor, logits: Tensor, out: Tensor, target: Tensor, lse: Tensor, ignore_index: int, smoothing: float,
    z_loss: float,
) -> None:  # fmt: skip
    """Write the gradient of the logits [rows, vocabulary] into `out`, which may be the logits."""
    rows, vocabulary = logits.shape
    block = _block(vocabulary)
    _gradient[(rows, triton.cdiv(vocabulary, block))](
        grad, logits, out, target, lse, vocabulary, ignore_index, smoothing, z_loss, block, num_warps=NUM_WARPS
    )


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> Tensor:
    """As the reference, which takes fp64."""
    if logits.dtype == torch.float64 or not logits.numel():
        return reference.cross_entropy_backward(grad, logits, target, lse, ignore_index, smoothing, z_loss)
    result = torch.empty_like(logits)
    gradient(grad, logits, result, target, lse, ignore_index, smoothing, z_loss)
    return result


def builds() -> Iterator[Build]:
    """Every specialisation that is launched, at the block of every vocabulary that is not tiny."""
    for name in ("bf16", "fp16", "fp32"):
        common = {
            "logits": f"*{name}", "target": "*i64", "lse": "*fp32", "vocabulary": "i32", "ignore_index": "i32",
            "smoothing": "fp32", "z_loss": "fp32",
        }  # fmt: skip
        yield Build(_forward, {**common, "loss": "*fp32"}, {"BLOCK": BLOCK}, NUM_WARPS)
        yield Build(_gradient, {**common, "grad": "*fp32", "out": f"*{name}"}, {"BLOCK": BLOCK}, NUM_WARPS)
