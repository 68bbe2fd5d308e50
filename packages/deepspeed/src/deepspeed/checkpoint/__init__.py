"""Upstream's package of checkpoint helpers: constants of its files; modules are imported on first use."""

from deepspeed._lazy import attach
from deepspeed.checkpoint.constants import *  # noqa: F403

_NAMES = ("get_layer_ckpt_name_for_rank", "get_model_ckpt_name_for_rank", "get_zero_ckpt_name_for_rank")

__getattr__, __dir__ = attach(
    __name__, {name: f"deepspeed.checkpoint.utils:{name}" for name in _NAMES}, ("constants", "utils")
)
