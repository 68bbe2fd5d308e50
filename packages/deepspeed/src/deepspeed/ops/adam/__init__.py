"""Adam optimizers under upstream's names (see `adam.py`)."""

from deepspeed.ops.adam.adam import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]
