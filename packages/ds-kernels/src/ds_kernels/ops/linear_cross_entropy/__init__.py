"""Cross entropy of a linear layer's output, which is never materialised."""

from __future__ import annotations

from ds_kernels.ops.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
