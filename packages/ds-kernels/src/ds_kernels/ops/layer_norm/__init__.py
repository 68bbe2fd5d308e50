"""Layer normalisation."""

from __future__ import annotations

from ds_kernels.ops.layer_norm.op import layer_norm

__all__ = ["layer_norm"]
