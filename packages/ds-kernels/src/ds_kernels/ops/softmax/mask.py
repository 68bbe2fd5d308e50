"""A mask as the kernels address it: broadcast over [outer, inner, rows] by strides, contiguous along the columns."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_rows"]


def as_rows(mask: Tensor, x: Tensor) -> Tensor:
    """The mask broadcast to x as [outer, inner, rows, cols] with stride 1 in cols: a view, or a copy of what it is."""
    if mask.shape[-1] != x.shape[-1]:
        mask = mask.expand(*mask.shape[:-1], x.shape[-1])
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    view = mask.expand(x.shape)
    while view.dim() < 4:
        view = view.unsqueeze(0)
    return view.flatten(0, -4)
