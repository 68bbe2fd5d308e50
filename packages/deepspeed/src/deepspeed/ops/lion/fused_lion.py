"""Upstream's path of FusedLion."""

from deepspeed.ops.lion.lion import FusedLion

__all__ = ["FusedLion"]
