"""Helpers of the launcher's tests: real launches of tiny scripts, and what is left of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DEADLINE = 60.0


def environment(**extra: str) -> dict[str, str]:
    """The test's environment without what a surrounding launch would set; no device is looked for."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "OMP_", "MASTER_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        clean.pop(name, None)
    return {**clean, "DS_ACCELERATOR": "cpu", **extra}


def command(*args: str) -> list[str]:
    """The command line of `deepspeed` with this interpreter."""
    return [sys.executable, "-m", "deepspeed.cli", *args]


def launch(cwd: Path, *args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs `deepspeed` with `args` in `cwd` to its end."""
    return subprocess.run(
        command(*args), cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def start(cwd: Path, *args: str, **extra: str) -> subprocess.Popen[str]:
    """Starts `deepspeed` and returns at once."""
    return subprocess.Popen(
        command(*args), cwd=cwd, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Polls until `condition` holds; fails the test, saying `what`, when it does not within the deadline."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody reaped does not)."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"


def written(path: Path, count: int) -> list[int]:
    """The process ids in the files `path`.0, `path`.1, ..., each written by one rank; [] until all are there."""
    files = [path.with_name(f"{path.name}.{rank}") for rank in range(count)]
    if not all(file.exists() and file.read_text().endswith("\n") for file in files):
        return []
    return [int(pid) for file in files for pid in file.read_text().split()]
