"""Which tokens go to which experts."""

from __future__ import annotations

from ds_kernels.ops.moe_gating.op import Routing, moe_capacity, moe_gate

__all__ = ["Routing", "moe_capacity", "moe_gate"]
