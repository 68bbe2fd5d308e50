"""cross_entropy on CPU: one read of the logits forward, one read and one write backward (torch without numba: more).

`Statistics` and `gradient` work on tiles of the vocabulary, so that linear_cross_entropy shares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_kernels._cpu.dtypes import CODES
from ds_kernels._cpu.launch import HAS_NUMBA, launch
from ds_kernels.errors import KernelArgumentError
from ds_kernels.ops.cross_entropy import reference

__all__ = ["Statistics", "check_range", "cross_entropy", "cross_entropy_backward", "gradient"]


def check_range(op: str, target: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Every target is a class or `ignore_index` (looks at the values: cheap on CPU, a synchronisation on a GPU).

    Raises:
        KernelArgumentError: naming the first that is not.
    """
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bad.any():
        raise KernelArgumentError(
            f"{op}: target holds {int(target[bad][0])}; expected 0 to {vocabulary - 1} or ignore_index ({ignore_index})"
        )


def _by_numba(tile: Tensor) -> bool:
    return HAS_NUMBA and tile.dtype in CODES and tile.numel() > 0


class Statistics:
    """What the loss of every row needs to know of its logits, gathered tile by tile."""

    def __init__(self, rows: int, need_sums: bool) -> None:
        self.maximum = torch.full((rows,), -torch.inf)
        self.exps = torch.zeros(rows)
        self.picked = torch.zeros(rows)
        self.sums = torch.zeros(rows)
        self.need_sums = need_sums

    def add(self, tile: Tensor, target: Tensor, first: int) -> None:
        """Take in the logits [rows, width] of the classes from `first` on; contiguous."""
        rows, width = tile.shape
        if not _by_numba(tile):
            self._add_by_torch(tile, target, first)
            return
        from ds_kernels.ops.cross_entropy.cpu_numba import accumulate

        launch(
            accumulate, tile, target, self.maximum, self.exps, self.picked, self.sums, rows, width, first,
            CODES[tile.dtype], int(self.need_sums), items=rows, grain=_grain(width),
        )  # fmt: skip

    def _add_by_torch(self, tile: Tensor, target: Tensor, first: int) -> None:
        values = tile.float()
        maximum = torch.maximum(self.maximum, values.amax(-1))
        anchor = torch.where(maximum == -torch.inf, 0.0, maximum)  # -inf alone: nothing to add, and no inf - inf
        self.exps.mul_(torch.exp(self.maximum - anchor)).add_(torch.exp(values - anchor.unsqueeze(-1)).sum(-1))
        self.maximum = maximum
        if self.need_sums:
            self.sums += values.sum(-1)
        column = target - first
        inside = (column >= 0) & (column < tile.shape[1])
        picked = values.gather(-1, torch.where(inside, column, 0).unsqueeze(-1)).squeeze(-1)
        self.picked = torch.where(inside, picked, self.picked)

    def lse(self) -> Tensor:
        """log(sum(exp(logits))) of every row."""
        return self.maximum + torch.log(self.exps)

    def losses(
        self, lse: Tensor, target: Tensor, ignore_index: int, vocabulary: int, smoothing: float, z_loss: float
    ) -> Tensor:
        """The losses [rows]; 0 where ignored."""
        valid = target != ignore_index
        return reference.row_losses(lse, self.picked, self.sums, valid, vocabulary, smoothing, z_loss)


def gradient(
    tile: Tensor, out: Tensor, target: Tensor, lse: Tensor, grad: Tensor, first: int, vocabulary: int,
    smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """Write the gradient of a tile of logits into `out`, which may be the tile; `grad` is 0 in ignored rows (fp32)."""
    rows, width = tile.shape
    if _by_numba(tile):
        from ds_kernels.ops.cross_entropy import cpu_numba

        launch(
            cpu_numba.gradient, tile, out, target, lse, grad, rows, width, first, CODES[tile.dtype], 1.0 - smoothing,
            smoothing / vocabulary, float(z_loss), items=rows, grain=_grain(width),
        )  # fmt: skip
        return
    result = torch.exp(tile.float() - lse.unsqueeze(-1))
    result.mul_((grad * (1.0 + 2.0 * z_loss * lse)).unsqueeze(-1)).sub_((grad * (smoothing / vocabulary)).unsqueeze(-1))
    row = torch.nonzero((target >= first) & (target < first + width)).squeeze(-1)
    result[row, target[row] - first] -= (1.0 - smoothing) * grad[row]
    out.copy_(torch.where((grad != 0).unsqueeze(-1), result, 0.0))


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """As the reference, which takes fp64."""
    rows, vocabulary = logits.shape
    check_range("cross_entropy", target, ignore_index, vocabulary)
    if logits.dtype == torch.float64:
        return reference.cross_entropy(logits, target, ignore_index, smoothing, z_loss)
    statistics = Statistics(rows, need_sums=smoothing > 0.0)
    if rows:
        statistics.add(logits, target, 0)
    lse = statistics.lse()
    return statistics.losses(lse, target, ignore_index, vocabulary, smoothing, z_loss), lse


def cross_entropy_backward(
    grad: Tensor, logits: Tensor, target: Tensor, lse: Tensor, ignore_index: int, smoothing: float, z_loss: float
) -> Tensor:
    """As the reference, which takes fp64."""
    if logits.dtype == torch.float64:
        return reference.cross_entropy_backward(grad, logits, target, lse, ignore_index, smoothing, z_loss)
    result = torch.empty_like(logits)
    scale = torch.where(target == ignore_index, 0.0, grad)
    if logits.numel():
        gradient(logits, result, target, lse, scale, 0, logits.shape[1], smoothing, z_loss)
    return result


def _grain(width: int) -> int:
    """Rows handed out at a time: about 32K logits."""
    return max(1, (1 << 15) // max(1, width))
