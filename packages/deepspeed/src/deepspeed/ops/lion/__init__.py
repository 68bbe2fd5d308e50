"""Lion optimizers under upstream's names (see `lion.py`)."""

from deepspeed.ops.lion.lion import DeepSpeedCPULion, FusedLion

__all__ = ["DeepSpeedCPULion", "FusedLion"]
