"""Upstream's module path of FusedAdam."""

from deepspeed.ops.adam.adam import FusedAdam

__all__ = ["FusedAdam"]
