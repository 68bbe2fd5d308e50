"""Process-wide settings follow the config where it says something, and only there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from deepspeed.comm import log as comm_log
from deepspeed.config import resolve
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.settings import apply_settings
from deepspeed.utils.logging import logger


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level = logger.level
    yield
    logger.setLevel(level)
    checkpointing.reset()
    comm_log.configure(enabled=False, verbose=False, prof_all=True, prof_ops=(), debug=False)


def apply(**keys: Any) -> None:
    apply_settings(resolve({"train_batch_size": 8, **keys}, dp_world_size=1))


def test_log_level() -> None:
    logger.setLevel(logging.INFO)
    apply()
    assert logger.level == logging.INFO
    apply(log_level="Error")
    assert logger.level == logging.ERROR


def test_comms_logger() -> None:
    apply(comms_logger={"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]})
    chosen = comm_log.settings()
    assert chosen.enabled and not chosen.prof_all and list(chosen.prof_ops) == ["all_reduce"]
    apply()
    assert comm_log.settings().enabled, "a config without the section leaves the log alone"


def test_activation_checkpointing() -> None:
    checkpointing.reset()
    apply()
    assert not checkpointing.is_configured()
    apply(activation_checkpointing={"cpu_checkpointing": True})
    assert checkpointing.is_configured()
