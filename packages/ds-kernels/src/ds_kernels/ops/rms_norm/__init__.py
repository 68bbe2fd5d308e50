"""Root-mean-square normalisation."""

from __future__ import annotations

from ds_kernels.ops.rms_norm.op import rms_norm

__all__ = ["rms_norm"]
