"""Activation checkpointing (see `checkpointing.py`, which is also `deepspeed.checkpointing`)."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, {}, ("checkpointing", "offload_activations"))
