"""Rotary position embedding."""

from __future__ import annotations

from ds_kernels.ops.rope.op import rope

__all__ = ["rope"]
