"""Who failed first, told in one block at the end of stderr: its traceback, then one line per other rank."""

from __future__ import annotations

import re
from collections.abc import Sequence

from deepspeed.launcher.processes import Outcome

_TRACEBACK = "Traceback (most recent call last):"
_MAX_LINES = 120
_WIDTH = 88


def first_failure(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The rank that failed first: of those that failed by themselves the one with the earliest sign; None where none
    failed.
    """
    failed = [outcome for outcome in outcomes if outcome.returncode != 0]
    return min(failed, key=lambda outcome: (not outcome.own, outcome.sign), default=None)


def failure_report(outcomes: Sequence[Outcome], first: Outcome, program: str) -> str:
    """The block to show: which rank failed first, how, its traceback or last lines, and one line for each of the
    others.
    """
    title = f" rank {first.plan.rank} failed first: {first.cause} "
    lines = [
        "",
        title.center(_WIDTH, "="),
        f"{program} on {first.plan.host}, local rank {first.plan.local_rank}, process {first.pid}",
        "",
        *_evidence(first),
    ]
    others = [outcome for outcome in outcomes if outcome is not first]
    if others:
        lines.append("-" * _WIDTH)
        lines.extend(_summary(other, first) for other in others)
    lines.append("=" * _WIDTH)
    return "\n".join(lines) + "\n"


def one_line(outcome: Outcome) -> str:
    """What a rank died of in one line: the message of its exception, else its exit code."""
    traceback = _traceback(outcome.tail)
    return f"{outcome.cause}: {traceback[-1].strip()}" if traceback else outcome.cause


def _summary(outcome: Outcome, first: Outcome) -> str:
    name = f"rank {outcome.plan.rank}"
    if outcome.returncode == 0:
        return f"{name}: finished"
    if not outcome.own:
        return f"{name}: stopped by the launcher"
    return f"{name}: {one_line(outcome)[:160]} ({max(0.0, outcome.sign - first.sign):.1f} s later)"


def _evidence(outcome: Outcome) -> list[str]:
    traceback = _traceback(outcome.tail)
    if traceback:
        return _shorten(traceback)
    lines = [line for line in _text_lines(outcome.tail) if line.strip()][-20:]
    shown = (
        ["no traceback; the last lines of its stderr:", *lines]
        if lines
        else ["no traceback, and it wrote nothing to stderr"]
    )
    if outcome.returncode == -9:
        shown.append(
            "SIGKILL comes from outside: often the kernel when memory runs out (see `dmesg`), a batch system, or a user"
        )
    return shown


def _text_lines(text: str) -> list[str]:
    """Lines as a terminal leaves them: of a line rewritten with carriage returns only the last state."""
    return [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]


def _traceback(tail: str) -> list[str]:
    """The last traceback of a stream with the exceptions that led to it; [] where there is none."""
    lines = _text_lines(tail)
    starts = [number for number, line in enumerate(lines) if _TRACEBACK in line]
    if not starts:
        return []
    start = starts[-1]
    for previous in reversed(starts[:-1]):  # chained: "During handling of ..." or "... direct cause ..." stands between
        between = "\n".join(lines[previous:start])
        if "During handling of the above exception" not in between and "was the direct cause of" not in between:
            break
        start = previous
    end = next((number for number in range(starts[-1] + 1, len(lines)) if _is_last_line(lines[number])), len(lines) - 1)
    while end + 1 < len(lines) and lines[end + 1].strip() and not _is_noise(lines[end + 1]):
        end += 1  # an exception text of several lines
    return lines[start : end + 1]


def _is_last_line(line: str) -> bool:
    """`SomeError: text` at the start of a line, after an optional prefix such as torch's `[rank0]: `."""
    return re.match(r"^(\[[\w: ]+\]:? ?)?[A-Za-z_][\w.]*(:|$)", line) is not None


def _is_noise(line: str) -> bool:
    return re.match(r"^\[?[A-Z]?\d{2,4}[-/ \d]", line) is not None


def _shorten(lines: list[str]) -> list[str]:
    if len(lines) <= _MAX_LINES:
        return lines
    half = _MAX_LINES // 2
    return [*lines[:half], f"... {len(lines) - 2 * half} lines left out ...", *lines[-half:]]
