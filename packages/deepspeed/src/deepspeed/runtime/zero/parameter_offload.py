"""Upstream's path of what stands for the optimizer when a model is sharded without one (ZeRO-3 inference)."""

from deepspeed._lazy import explain_absent
from ds_zero import ShardedModel as DeepSpeedZeRoOffload

__all__ = ["DeepSpeedZeRoOffload"]

explain_absent(__name__)
