"""Scaled masked softmax."""

from __future__ import annotations

from ds_kernels.ops.softmax.op import softmax

__all__ = ["softmax"]
