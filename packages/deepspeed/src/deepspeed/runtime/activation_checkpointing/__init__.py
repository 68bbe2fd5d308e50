"""Activation checkpointing (see `checkpointing.py`, which is also `deepspeed.checkpointing`)."""
