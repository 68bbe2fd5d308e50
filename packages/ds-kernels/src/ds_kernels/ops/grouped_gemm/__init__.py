"""Matrix products of contiguous groups of rows, each with a weight of its own."""

from __future__ import annotations

from ds_kernels.ops.grouped_gemm.op import grouped_gemm

__all__ = ["grouped_gemm"]
