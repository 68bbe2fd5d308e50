"""Upstream's path of the engine."""

from deepspeed._lazy import explain_absent
from deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]

explain_absent(__name__)
