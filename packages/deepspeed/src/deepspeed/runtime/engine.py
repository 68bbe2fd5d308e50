"""Upstream's path of the engine."""

from deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
