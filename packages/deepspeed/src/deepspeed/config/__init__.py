"""Configuration of the engine: from any input form to one frozen, complete config whose values know where they came
from.

`resolve(config, dp_world_size=...)` is the way in; `ResolvedConfig` is what everything reads. The sections are typed
in `model_*`, what each key does is in `support`, and `ConfigGetters` gives the engine upstream's accessors.
"""

from __future__ import annotations

from deepspeed.config.base import Section
from deepspeed.config.batch import Batch, solve_batch
from deepspeed.config.document import json_schema
from deepspeed.config.getters import ConfigGetters
from deepspeed.config.model import ConfigModel
from deepspeed.config.resolve import parse_config, resolve
from deepspeed.config.resolved import ResolvedConfig
from deepspeed.config.source import LoadedConfig, choose_config, load_config
from deepspeed.config.support import ACCEPTED_AND_IGNORED, SUPPORT, Support, support_of

__all__ = [
    "ACCEPTED_AND_IGNORED",
    "SUPPORT",
    "Batch",
    "ConfigGetters",
    "ConfigModel",
    "LoadedConfig",
    "ResolvedConfig",
    "Section",
    "Support",
    "choose_config",
    "json_schema",
    "load_config",
    "parse_config",
    "resolve",
    "solve_batch",
    "support_of",
]
