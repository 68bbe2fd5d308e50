"""Upstream's path of the hybrid engine."""

from deepspeed._lazy import explain_absent
from deepspeed.hybrid.engine import DeepSpeedHybridEngine

__all__ = ["DeepSpeedHybridEngine"]

explain_absent(__name__)
