"""Tokens to the rows of their experts and back."""

from __future__ import annotations

from ds_kernels.ops.moe_dispatch.op import moe_combine, moe_dispatch

__all__ = ["moe_combine", "moe_dispatch"]
