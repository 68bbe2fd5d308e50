"""Gated linear units: swiglu and geglu."""

from __future__ import annotations

from ds_kernels.ops.glu.op import geglu, swiglu

__all__ = ["geglu", "swiglu"]
