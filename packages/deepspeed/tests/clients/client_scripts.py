"""What the tests of clients share: what has to be installed, and running a client's script in processes of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def require(*clients: str) -> None:
    """Skip the whole module without these clients, or without deepspeed as an installed distribution.

    The latter is how clients find it: importing it from a source folder is not enough.
    """
    for client in clients:
        pytest.importorskip(client)
    try:
        importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("deepspeed is importable but not installed; clients would not see it", allow_module_level=True)


def run_script(name: str, out: Path, *arguments: object, ranks: int = 1, launcher: list[str] | None = None) -> Any:
    """Run the script `name` of this folder, by our launcher where there are several ranks, or by `launcher`.

    Returns what it wrote to out/found.json.
    """
    if launcher is None:
        launcher = ["-m", "deepspeed.cli", "--num_gpus", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(Path(__file__).with_name(name)), *map(str, arguments)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "found.json").read_text())
