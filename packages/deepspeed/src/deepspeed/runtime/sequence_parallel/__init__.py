"""Upstream's import paths of sequence parallelism for Hugging Face's models."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(__name__, {}, ("parallel_state_sp", "ulysses_sp"))
