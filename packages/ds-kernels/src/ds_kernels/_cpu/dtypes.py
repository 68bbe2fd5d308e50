"""Dtype codes of the numba kernels, apart from `intrinsics` so that asking for one does not import numba."""

from __future__ import annotations

import torch

__all__ = ["CODES"]

CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What `intrinsics.load` and `store` take as `code`."""
