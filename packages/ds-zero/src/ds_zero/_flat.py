"""Memory for tensors that stay, in one piece of its own.

Masters live as long as the model, the optimizer's moments from the first step on, gradients from backward to step.
Activations come and go between them. If all share malloc's heap, what stays is scattered among what goes, the holes
between are too small for the next forward's activations, and the heap grows by memory that nobody uses (measured for
SmolLM2-135M on two ranks: 380 MB of 2,650 MB). A piece above malloc's largest threshold is a mapping of its own: it
leaves no holes, its pages come when they are first written, and all of it returns to the system when it is dropped.

Invariants
  - A tensor begins at a multiple of ALIGNMENT elements from an aligned address: kernels round as in memory of its own.
  - Tensors are no views of one another: each has its own version counter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from ds_zero.layout import ALIGNMENT

__all__ = ["FlatMemory", "trim_heap"]


class FlatMemory:
    """Hands out 1-D tensors from one allocation, which is made at the first request.

    Args:
        numels: elements of each tensor that will be asked for. What exceeds their sum, is of another dtype than the
            first, or is not on the CPU (other allocators keep large tensors apart) gets memory of its own.
    """

    def __init__(self, numels: Iterable[int]) -> None:
        self._numel = sum(_padded(numel) for numel in numels)
        self._used = 0
        self._whole: Tensor | None = None

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor [numel] of undefined content."""
        if device.type != "cpu" or self._used + _padded(numel) > self._numel:
            return torch.empty(numel, dtype=dtype, device=device)
        if self._whole is None:
            self._whole = torch.empty(self._numel, dtype=dtype)
        if self._whole.dtype != dtype:
            return torch.empty(numel, dtype=dtype)
        offset = self._used
        self._used += _padded(numel)
        return torch.empty(0, dtype=dtype).set_(self._whole.untyped_storage(), offset, (numel,), (1,))


def _padded(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def trim_heap() -> None:
    """Give the free pages of malloc's heap back to the system, as far as this C library (glibc) can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
