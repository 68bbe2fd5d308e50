"""linear_cross_entropy on CPU: torch's matrix products over tiles that stay in the cache, numba for what is between.

The vocabulary is cut into tiles of TILE classes. Two ways through them:
    at once   every row's gradient has the same factor (reduction "mean", "sum"), which backward can apply at the end;
              so forward computes the gradients of the sum as well, a chunk of rows at a time: logits of the chunk (all
              tiles, kept in x's dtype), their gradient in place, both products. Three products, as many as unfused.
    by rows   forward keeps only each row's lse; backward makes a tile's logits again. Four products, one tile kept.

Sums over chunks and tiles are in fp32: a 16-bit product is rounded once and added to an fp32 sum; only with two or
three chunks the weight's gradient is summed in its own dtype. fp16 is computed in fp32 (CPUs multiply it slowly).
Rows that are ignored take no part at all.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.ops.cross_entropy.cpu import Statistics, check_range, gradient
from ds_kernels.ops.linear_cross_entropy import reference

__all__ = ["Terms", "linear_cross_entropy", "linear_cross_entropy_backward", "loss_and_gradients"]

TILE = 2048
"""Classes of a tile: with some hundred rows its logits, and its part of the weight, fit the cache."""
ROWS = 2048
"""Rows at a time where logits are not kept."""
SMALL_NBYTES, LARGE_NBYTES = 16 << 20, 96 << 20
"""Kept logits of one chunk: no need to cut below the first, never more than the second."""


@dataclasses.dataclass(frozen=True)
class Terms:
    """What of the loss does not depend on the row: see the reference of cross_entropy."""

    ignore_index: int
    smoothing: float
    z_loss: float


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms
) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    vocabulary = weight.shape[0]
    check_range("linear_cross_entropy", target, terms.ignore_index, vocabulary)
    if x.dtype == torch.float64:
        return reference.linear_cross_entropy(
            x, weight, bias, target, terms.ignore_index, terms.smoothing, terms.z_loss
        )
    keep = _kept_rows(target, terms)
    rows = x if keep is None else x[keep]
    classes = target if keep is None else target[keep]
    loss, lse = (torch.zeros(target.shape[0]) for _ in range(2))
    parts = []
    for low in range(0, rows.shape[0], ROWS):
        part, part_target = _computable(rows[low : low + ROWS]), classes[low : low + ROWS]
        statistics = Statistics(part.shape[0], terms.smoothing > 0.0)
        tile = part.new_empty(part.shape[0] * min(TILE, vocabulary))
        for first in range(0, vocabulary, TILE):
            statistics.add(_logits(part, weight, bias, first, tile), part_target, first)
        part_lse = statistics.lse()
        parts.append((statistics.losses(part_lse, part_target, *_of(terms, vocabulary)), part_lse))
    if parts:
        index = slice(None) if keep is None else keep
        loss[index] = torch.cat([part for part, _ in parts])
        lse[index] = torch.cat([part for _, part in parts])
    return loss, lse


def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, terms: Terms,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the reference, which takes fp64."""
    if x.dtype == torch.float64:
        return reference.linear_cross_entropy_backward(
            grad, x, weight, bias, target, lse, terms.ignore_index, terms.smoothing, terms.z_loss
        )
    keep = _kept_rows(target, terms)
    rows, classes, scale = (x, target, grad) if keep is None else (x[keep], target[keep], grad[keep])
    lse = lse if keep is None else lse[keep]
    rows = _computable(rows)
    vocabulary, dim = weight.shape
    grad_rows = torch.zeros(rows.shape[0], dim)
    grad_weight = torch.empty_like(weight)
    grad_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    tile = rows.new_empty(min(ROWS, rows.shape[0]) * min(TILE, vocabulary))
    for first in range(0, vocabulary, TILE):
        own_weight = torch.zeros(min(TILE, vocabulary - first), dim)
        own_bias = torch.zeros(own_weight.shape[0])
        for low in range(0, rows.shape[0], ROWS):
            part = slice(low, low + ROWS)
            logits = _logits(rows[part], weight, bias, first, tile)
            gradient(
                logits, logits, classes[part], lse[part], scale[part], first, vocabulary, terms.smoothing, terms.z_loss
            )
            _add(grad_rows[part], logits @ weight[first : first + TILE].to(logits.dtype))
            _add(own_weight, logits.t() @ rows[part])
            own_bias += logits.sum(0, dtype=torch.float32)
        grad_weight[first : first + TILE] = own_weight
        if bias is not None:
            grad_bias[first : first + TILE] = own_bias
    return _spread(grad_rows.to(x.dtype), keep, x), grad_weight, grad_bias


def loss_and_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms, need: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, the lse [rows], the sum's gradients of x, weight and bias (empty if not needed)."""
    vocabulary, dim = weight.shape
    check_range("linear_cross_entropy", target, terms.ignore_index, vocabulary)
    keep = _kept_rows(target, terms)
    rows, classes = (x, target) if keep is None else (x[keep], target[keep])
    count = rows.shape[0]
    loss, lse = torch.zeros(()), torch.zeros(count)
    grad_rows = torch.zeros(count, dim, dtype=x.dtype) if need[0] else None
    chunk = _chunk_rows(count, vocabulary, x.element_size())
    weight_sum = _WeightSum(weight, -(-count // chunk)) if need[1] else None
    bias_sum = torch.zeros(vocabulary) if need[2] else None
    kept = x.new_empty(min(chunk, count) * vocabulary)
    ones = torch.ones(count)
    for low in range(0, count, chunk):
        part = slice(low, low + chunk)
        own, own_target = rows[part], classes[part]
        statistics = Statistics(own.shape[0], terms.smoothing > 0.0)
        for first in range(0, vocabulary, TILE):
            statistics.add(_logits(own, weight, bias, first, kept[own.shape[0] * first :]), own_target, first)
        lse[part] = statistics.lse()
        loss += statistics.losses(lse[part], own_target, *_of(terms, vocabulary)).sum()
        grad_own = torch.zeros(own.shape[0], dim) if grad_rows is not None else None
        for first in range(0, vocabulary, TILE):
            width = min(TILE, vocabulary - first)
            tile = kept[own.shape[0] * first :][: own.shape[0] * width].view(-1, width)
            gradient(tile, tile, own_target, lse[part], ones[part], first, vocabulary, terms.smoothing, terms.z_loss)
            if grad_own is not None:
                _add_product(grad_own, tile, weight[first : first + TILE])
            if weight_sum is not None:
                weight_sum.add(first, tile, own)
            if bias_sum is not None:
                bias_sum[first : first + TILE] += tile.sum(0, dtype=torch.float32)
        if grad_rows is not None and grad_own is not None:
            grad_rows[part] = grad_own
    nothing = x.new_empty(0)
    return (
        loss,
        _spread(lse, keep, target),
        nothing if grad_rows is None else _spread(grad_rows, keep, x),
        nothing if weight_sum is None else weight_sum.result(),
        nothing if bias_sum is None or bias is None else bias_sum.to(bias.dtype),
    )


class _WeightSum:
    """The weight's gradient, summed over chunks of rows: in its own dtype up to three chunks, else in fp32."""

    def __init__(self, weight: Tensor, num_chunks: int) -> None:
        self._dtype = weight.dtype
        wide = weight.dtype != torch.float32 and num_chunks > 3
        self._sum = torch.empty_like(weight, dtype=torch.float32 if wide else weight.dtype)
        self._filled = 0 if num_chunks else self._sum.zero_().shape[0]
        self._wide = wide

    def add(self, first: int, tile: Tensor, rows: Tensor) -> None:
        """Add `tile.T @ rows` to the classes from `first` on; tiles come in order."""
        own = self._sum[first : first + tile.shape[1]]
        fresh = self._filled <= first
        self._filled = max(self._filled, first + tile.shape[1])
        if self._wide:
            product = tile.t() @ rows
            own.copy_(product) if fresh else _add(own, product)
        elif fresh:
            torch.mm(tile.t(), rows, out=own)
        else:
            own.addmm_(tile.t(), rows)

    def result(self) -> Tensor:
        return self._sum.to(self._dtype)


def _of(terms: Terms, vocabulary: int) -> tuple[int, int, float, float]:
    return terms.ignore_index, vocabulary, terms.smoothing, terms.z_loss


def _kept_rows(target: Tensor, terms: Terms) -> Tensor | None:
    """Indices of the rows that count, None for all."""
    valid = target != terms.ignore_index
    return None if bool(valid.all()) else torch.nonzero(valid).squeeze(-1)


def _spread(kept: Tensor, keep: Tensor | None, like: Tensor) -> Tensor:
    """Values of the kept rows put back between zeros."""
    return kept if keep is None else kept.new_zeros(like.shape).index_copy_(0, keep, kept)


def _chunk_rows(rows: int, vocabulary: int, itemsize: int) -> int:
    """Rows whose logits are kept at a time: a third of them in 16 bits, a seventh in 32, within the limits."""
    row_nbytes = vocabulary * itemsize
    if rows * row_nbytes <= SMALL_NBYTES:
        return max(1, rows)
    share = -(-rows // (3 if itemsize == 2 else 7))
    largest = max(32, LARGE_NBYTES // row_nbytes)
    return -(-min(share, largest) // 8) * 8


def _computable(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype == torch.float16 else rows


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None, first: int, space: Tensor) -> Tensor:
    """The logits [rows, up to TILE] of the classes from `first` on, in memory of `space`."""
    part = weight[first : first + TILE].to(rows.dtype)
    out = space[: rows.shape[0] * part.shape[0]].view(rows.shape[0], part.shape[0])
    if bias is None:
        return torch.mm(rows, part.t(), out=out)
    return torch.addmm(bias[first : first + TILE].to(rows.dtype), rows, part.t(), out=out)


def _add_product(total: Tensor, tile: Tensor, weight: Tensor) -> None:
    """total (fp32) += tile @ weight."""
    if tile.dtype == torch.float32:
        total.addmm_(tile, weight)
    else:
        _add(total, tile @ weight)


def _add(total: Tensor, part: Tensor) -> None:
    """total (fp32, contiguous) += part."""
    if not HAS_NUMBA or part.dtype == torch.float32:
        total += part
        return
    from ds_kernels.ops.cross_entropy.cpu_numba import add_into

    launch(add_into, total, part, total.numel(), CODES[part.dtype], items=total.numel(), grain=1 << 15)
