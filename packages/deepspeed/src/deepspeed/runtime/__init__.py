"""Upstream's import paths of the training runtime; each module below re-exports, and is imported on first use."""

from deepspeed._lazy import attach

__getattr__, __dir__ = attach(
    __name__,
    {},
    (
        "activation_checkpointing",
        "base_optimizer",
        "compiler",
        "config",
        "config_utils",
        "dataloader",
        "engine",
        "fp16",
        "lr_schedules",
        "pipe",
        "sequence_parallel",
        "utils",
        "zero",
    ),
)
