"""Indexed data files and batches of bounded length; imported on first use."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, {}, ("indexed_dataset", "variable_batch_size_and_lr"))
