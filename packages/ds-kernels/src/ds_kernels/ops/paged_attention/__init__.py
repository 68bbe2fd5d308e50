"""Attention over a paged cache of keys and values, and writing that cache."""

from __future__ import annotations

from ds_kernels.ops.paged_attention.op import paged_attention, write_kv

__all__ = ["paged_attention", "write_kv"]
