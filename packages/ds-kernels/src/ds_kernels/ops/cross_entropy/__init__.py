"""Cross entropy of logits against class indices."""

from __future__ import annotations

from ds_kernels.ops.cross_entropy.op import cross_entropy

__all__ = ["cross_entropy"]
