"""Upstream's path of DeepSpeedCPULion."""

from deepspeed.ops.lion.lion import DeepSpeedCPULion

__all__ = ["DeepSpeedCPULion"]
