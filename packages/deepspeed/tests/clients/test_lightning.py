"""lightning's Fabric and Trainer over two CPU ranks: the losses of one process without DeepSpeed, saving, loading.

lightning itself runs its DeepSpeed strategies on CUDA only; train_lightning.py says which two checks are left out.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")
try:
    importlib.metadata.version("deepspeed")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("deepspeed is importable but not installed; lightning would not see it", allow_module_level=True)

SCRIPT = Path(__file__).with_name("train_lightning.py")


def train(launcher: list[str], kind: str, out: Path, *options: str) -> dict[str, Any]:
    out.mkdir()
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *launcher, str(SCRIPT), kind, str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["fabric", "trainer"])
def test_two_ranks_train_as_one_process_does(kind: str, stage: int, tmp_path: Path) -> None:
    launcher = ["-m", "deepspeed.cli", "--num_gpus", "2"]
    found = train(launcher, kind, tmp_path / "ranks", "--stage", str(stage))
    alone = train([], kind, tmp_path / "alone")
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    if kind == "fabric":
        assert found["again"] == found["losses"][2:] and (tmp_path / "ranks" / "half" / "checkpoint").is_dir()
    else:
        assert found["engine"] == "DeepSpeedEngine" and (tmp_path / "ranks" / "last.ckpt").is_dir()
