"""`log_dist` logs exactly where upstream's does."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from deepspeed.utils import logging as module
from deepspeed.utils.logging import (
    get_caller_func,
    log_dist,
    log_dist_once,
    logger,
    print_json_dist,
    set_log_level_from_string,
)
from ds_comm.testing import run_ranks


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def logged(*calls: Any) -> list[str]:
    handler = Lines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for function, *args in calls:
            function(*args)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return handler.lines


def on_ranks() -> list[str]:
    calls = [("none", None), ("empty", []), ("zero", [0]), ("one", [1]), ("both", [0, 1]), ("all", [-1])]
    return [line.split()[-1] for line in logged(*((log_dist, name, ranks) for name, ranks in calls))]


def test_after_initialisation_only_on_the_chosen_ranks() -> None:
    assert run_ranks(on_ranks, 2) == [["zero", "both", "all"], ["one", "both", "all"]]


def test_before_initialisation_always_under_rank_minus_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ds_comm, "is_initialized", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    lines = logged((log_dist, "a"), (log_dist, "b", [3]))
    assert lines == ["[Rank -1] a", "[Rank -1] b"]


def test_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ds_comm, "is_initialized", lambda: False)
    assert len(logged((log_dist_once, "only once", [0]), (log_dist_once, "only once", [0]))) == 1


def test_levels_by_name() -> None:
    own = logging.getLogger("a logger of this test")
    set_log_level_from_string("Warning", own)
    assert own.level == logging.WARNING
    with pytest.raises(ValueError, match="'loud'"):
        set_log_level_from_string("loud", own)


def test_json_carries_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ds_comm, "is_initialized", lambda: False)
    print_json_dist({"loss": 1}, path=str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text()) == {"loss": 1, "rank": -1}


def test_caller() -> None:
    def inner() -> str:
        return get_caller_func(2)

    assert inner() == "test_caller"


def test_it_is_a_standard_logger() -> None:
    assert type(logger) is logging.Logger and logger.name == "DeepSpeed"
