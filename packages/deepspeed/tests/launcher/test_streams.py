"""What ranks write: passed on at once, tracebacks held, the first failure told from its victims."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepspeed.launcher import streams as module
from deepspeed.launcher.processes import Outcome
from deepspeed.launcher.report import failure_report, first_failure, one_line
from deepspeed.launcher.spec import RankPlan
from deepspeed.launcher.streams import HOLD_SECONDS, TAIL_NBYTES, Stream

TRACEBACK = b'Traceback (most recent call last):\n  File "t.py", line 1, in <module>\n    f()\nValueError: boom\n'
CHAIN = b"\nDuring handling of the above exception, another exception occurred:\n\n"


class Shown:
    """A stream whose output lands in a pipe that the test reads."""

    def __init__(self) -> None:
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self.stream = Stream(0, read_fd=os.open(os.devnull, os.O_RDONLY), sink_fd=write)

    def text(self) -> bytes:
        try:
            return os.read(self._read, 1 << 20)
        except BlockingIOError:
            return b""


@pytest.fixture
def shown() -> Shown:
    return Shown()


def test_partial_lines_and_progress_bars_pass_at_once(shown):
    for piece in (b"10%|#   ", b"\r20%|##  ", b"no newline"):
        shown.stream.feed(piece, now=0.0)
        assert shown.text() == piece


def test_a_traceback_is_held_until_the_end(shown):
    shown.stream.feed(b"before\nWARN " + TRACEBACK, now=1.0)
    shown.stream.feed(b"after\n", now=1.5)
    shown.stream.release_if_due(1.0 + HOLD_SECONDS - 0.1)
    assert shown.text() == b"before\n"
    shown.stream.end(now=2.0)
    assert shown.stream.sign == 1.0
    assert bytes(shown.stream.held) == b"WARN " + TRACEBACK + b"after\n"


def test_a_handled_traceback_is_shown_when_its_rank_lives_on(shown):
    shown.stream.feed(TRACEBACK, now=1.0)
    shown.stream.release_if_due(1.0 + HOLD_SECONDS)
    assert shown.text() == TRACEBACK
    shown.stream.feed(b"more\n", now=9.0)
    assert shown.text() == b"more\n"
    shown.stream.end(now=10.0)
    assert shown.stream.sign == 10.0  # the handled one was no sign of failure


def test_a_second_traceback_shows_the_first_but_a_chain_stays_together(shown):
    shown.stream.feed(TRACEBACK + b"log\n", now=1.0)
    shown.stream.feed(TRACEBACK + CHAIN, now=2.0)
    assert shown.text() == TRACEBACK + b"log\n"
    shown.stream.feed(TRACEBACK, now=2.1)
    assert shown.text() == b""
    assert bytes(shown.stream.held) == TRACEBACK + CHAIN + TRACEBACK
    shown.stream.end(3.0)
    assert shown.stream.sign == 2.1


def test_the_tail_is_bounded_and_complete(shown):
    for number in range(5):
        shown.stream.feed(bytes([65 + number]) * 30000, now=0.0)
        shown.text()
    assert (
        bytes(shown.stream.tail)
        == (b"A" * 30000 + b"B" * 30000 + b"C" * 30000 + b"D" * 30000 + b"E" * 30000)[-TAIL_NBYTES:]
    )


def test_a_reader_that_went_away_stops_nothing(shown):
    os.close(shown._read)
    shown.stream.feed(b"x", now=0.0)
    assert bytes(shown.stream.tail) == b"x"


def test_a_log_file_gets_everything_in_order(tmp_path: Path):
    pump = module.StreamPump()
    write = pump.open(3, tmp_path / "log")
    pump.start()
    os.write(write, b"one\n" + TRACEBACK)
    os.write(write, b"two\n")
    os.close(write)
    pump.close()
    assert (tmp_path / "log").read_bytes() == b"one\n" + TRACEBACK + b"two\n"
    assert pump.streams[3].closed


def outcome(rank: int, returncode: int, sign: float, tail: str = "", own: bool = True) -> Outcome:
    plan = RankPlan(rank, rank, "here", rank, ("prog",), {})
    return Outcome(plan, pid=100 + rank, returncode=returncode, own=own, sign=sign, tail=tail)


def test_the_earliest_sign_wins_not_the_lowest_rank():
    outcomes = [
        outcome(0, 1, sign=5.2, tail="Traceback (most recent call last):\n  x\nConnectionError: peer is gone\n"),
        outcome(1, 1, sign=5.0, tail="noise\n" + TRACEBACK.decode() + "[W1122 10:00:00 store.cpp] noise\n"),
        outcome(2, -15, sign=1.0, own=False),
        outcome(3, 0, sign=4.0),
    ]
    first = first_failure(outcomes)
    assert first is outcomes[1]
    report = failure_report(outcomes, first, "train.py")
    head, others = report.split("-" * 20, 1)
    assert "rank 1 failed first: exit code 1" in head
    assert TRACEBACK.decode() in head
    assert "noise" not in head
    assert "rank 0: exit code 1: ConnectionError: peer is gone (0.2 s later)" in others
    assert "rank 2: stopped by the launcher" in others
    assert "rank 3: finished" in others


def test_no_failure():
    assert first_failure([outcome(0, 0, 1.0), outcome(1, 0, 2.0)]) is None


def test_a_killed_rank_and_a_silent_one():
    killed = outcome(0, -9, 1.0, tail="10%\r20%\rlast words\n")
    assert killed.exit_code == 137
    text = failure_report([killed], killed, "t.py")
    assert "killed by SIGKILL (exit code 137)" in text
    assert "last words" in text
    assert "10%" not in text
    assert "memory" in text
    silent = outcome(0, 7, 1.0)
    assert "wrote nothing to stderr" in failure_report([silent], silent, "t.py")
    assert one_line(silent) == "exit code 7"


def test_chains_and_long_messages_are_shown_whole():
    chain = (
        TRACEBACK + CHAIN + b"Traceback (most recent call last):\n  File b\npkg.Error: two\nlines of text\n"
    ).decode()
    failed = outcome(0, 1, 1.0, tail="x\n" + chain + "\nIgnored\n")
    text = failure_report([failed], failed, "t.py")
    assert chain in text
    assert "Ignored" not in text
    handled = outcome(
        0, 1, 1.0, tail=TRACEBACK.decode() + "log line\nTraceback (most recent call last):\n  y\nKeyError: 'k'\n"
    )
    assert "boom" not in failure_report([handled], handled, "t.py")


def test_torchs_rank_prefix_is_understood():
    tail = "[rank1]: Traceback (most recent call last):\n[rank1]:   File x\n[rank1]: ValueError: boom\n\nother\n"
    assert one_line(outcome(1, 1, 1.0, tail=tail)) == "exit code 1: [rank1]: ValueError: boom"
