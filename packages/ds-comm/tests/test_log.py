"""Rank-aware logging: who logs, what the line says, and that nobody's logging configuration is touched."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

from ds_comm.log import configure, current_rank, get_logger, log_dist
from ds_comm.testing import fake_world, run_ranks


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger that nobody else has used."""
    made = logging.getLogger(f"test.{uuid.uuid4()}")
    made.setLevel(logging.DEBUG)
    yield made
    made.handlers.clear()


def test_plain_without_ranks(caplog: pytest.LogCaptureFixture, logger: logging.Logger) -> None:
    assert get_logger(logger.name) is logger
    logger.info("%d items", 3)
    assert caplog.messages == ["3 items"]


def test_prefix_from_the_environment(
    caplog: pytest.LogCaptureFixture, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_logger(logger.name)
    monkeypatch.setenv("RANK", "5")
    logger.info("%d items", 3)
    assert caplog.messages == ["[rank 5] 3 items"]
    assert current_rank() == 5


def test_prefix_from_the_world_and_only_once(caplog: pytest.LogCaptureFixture, logger: logging.Logger) -> None:
    with fake_world(rank=3, world_size=4):
        for _ in range(3):
            get_logger(logger.name).warning("late")
    get_logger(logger.name).warning("alone")
    assert caplog.messages == ["[rank 3] late"] * 3 + ["alone"]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(None, [0]), ([1, 2], [1, 2]), ((-1,), [0, 1, 2]), ([], []), ([7], [])],
)
def test_log_dist_chooses_ranks(
    caplog: pytest.LogCaptureFixture, logger: logging.Logger, ranks: list[int] | None, expected: list[int]
) -> None:
    get_logger(logger.name)
    for rank in range(3):
        with fake_world(rank=rank, world_size=3):
            log_dist("hello", ranks, logger=logger)
    assert caplog.messages == [f"[rank {rank}] hello" for rank in expected]


def test_log_dist_before_the_world_is_rank_0(caplog: pytest.LogCaptureFixture, logger: logging.Logger) -> None:
    log_dist("start", logger=logger, level=logging.WARNING)
    log_dist("not here", [1], logger=logger)
    assert [(record.levelno, record.message, record.funcName) for record in caplog.records] == [
        (logging.WARNING, "start", "test_log_dist_before_the_world_is_rank_0")
    ]


def log_on_real_ranks() -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = get_logger("test.real")
    logger.addHandler(handler)
    try:
        log_dist("one", level=logging.ERROR, logger=logger)
        log_dist("all", (-1,), level=logging.ERROR, logger=logger)
    finally:
        logger.removeHandler(handler)
    return stream.getvalue()


def test_on_real_ranks() -> None:
    assert run_ranks(log_on_real_ranks, 2) == ["[rank 0] one\n[rank 0] all\n", "[rank 1] all\n"]


PROGRAM = """
import logging, sys
import ds_comm.log
assert logging.getLogger().handlers == [] and logging.getLogger("ds_comm").handlers == []
ds_comm.log.log_dist("hidden")
first = ds_comm.log.configure("ds_comm")
second = ds_comm.log.configure("ds_comm", "ERROR")
assert first is second and len(first.handlers) == 1
ds_comm.log.log_dist("shown")
ds_comm.log.get_logger("ds_comm.part").info("shown below")
"""


def test_configure_in_a_fresh_program() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, env={"PYTHONPATH": _path()}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = [line.split(" ", 2)[2] for line in done.stderr.splitlines() if "shown" in line]
    assert lines == ["INFO ds_comm: shown", "INFO ds_comm.part: shown below"]
    assert "hidden" not in done.stderr


def _path() -> str:
    return ":".join(entry for entry in sys.path if entry)


def test_configure_leaves_an_applications_handlers_alone(logger: logging.Logger) -> None:
    mine = logging.NullHandler()
    logger.addHandler(mine)
    configure(logger.name + ".child", "ERROR")
    assert logger.handlers == [mine]
    assert logging.getLogger(logger.name + ".child").handlers == []
    assert configure(logger.name).level == logging.DEBUG  # was set already
