"""How the engine tells a model with experts, without importing their layers."""

from __future__ import annotations

from typing import Any

__all__ = ["engine_has_moe_layers"]


def engine_has_moe_layers(engine: Any) -> bool:
    """Whether an engine's model has layers of `deepspeed.moe`; the engine's attribute `has_moe_layers`."""
    return any(hasattr(module, "deepspeed_moe") for module in engine.module.modules())
