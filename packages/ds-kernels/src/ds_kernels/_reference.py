"""What the references share: the precision they compute in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["column_sum", "wide"]


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 if that is what x is."""
    return x if x.dtype == torch.float64 else x.float()


def column_sum(x: Tensor) -> Tensor:
    """[..., dim] -> [dim]."""
    return x.reshape(-1, x.shape[-1]).sum(0)
