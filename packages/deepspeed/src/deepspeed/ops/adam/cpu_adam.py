"""Upstream's module path of DeepSpeedCPUAdam."""

from deepspeed.ops.adam.adam import DeepSpeedCPUAdam

__all__ = ["DeepSpeedCPUAdam"]
