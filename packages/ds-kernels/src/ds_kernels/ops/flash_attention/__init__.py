"""Attention over whole sequences, forward and backward."""

from __future__ import annotations

from ds_kernels.ops.flash_attention.op import flash_attention

__all__ = ["flash_attention"]
