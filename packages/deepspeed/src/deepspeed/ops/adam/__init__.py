"""Adam optimizers under upstream's names (see `adam.py`)."""

from deepspeed._lazy import explain_absent
from deepspeed.ops.adam.adam import DeepSpeedCPUAdam, FusedAdam

__all__ = ["DeepSpeedCPUAdam", "FusedAdam"]

explain_absent(__name__)
