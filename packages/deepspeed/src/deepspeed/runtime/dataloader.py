"""Upstream's path of the data loader."""

from deepspeed._lazy import explain_absent
from deepspeed.dataloader import DeepSpeedDataLoader, RepeatingLoader

__all__ = ["DeepSpeedDataLoader", "RepeatingLoader"]

explain_absent(__name__)
