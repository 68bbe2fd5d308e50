"""transformers' Trainer with `tensor_parallel.autotp_size` in its DeepSpeed config: the losses of one rank."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
try:
    importlib.metadata.version("deepspeed")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("deepspeed is importable but not installed; transformers would not see it", allow_module_level=True)

from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("train_tensor_parallel.py")


def train(ranks: int, stage: int, out: Path, *more: str) -> list[tuple[float, float]]:
    launcher = ["-m", "deepspeed.cli", "--num_gpus", str(ranks)] if ranks > 1 else []
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), str(ranks), str(stage), str(out), *more],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [tuple(row) for row in json.loads((out / "found.json").read_text())]


def test_the_trainer_over_two_tensor_ranks_trains_saves_and_resumes(tmp_path: Path) -> None:
    expected = train(1, 1, tmp_path / "one")
    found = train(2, 1, tmp_path / "two")
    assert len(found) == 4
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    whole = load_file(str(tmp_path / "one" / "final" / "model.safetensors"))
    joined = load_file(str(tmp_path / "two" / "final" / "model.safetensors"))
    assert whole.keys() - joined.keys() <= {"lm_head.weight"}  # tied; accelerate unties it on one rank
    for name, value in joined.items():
        assert (whole[name] - value).abs().max() < 1e-5, name
    assert train(2, 1, tmp_path / "two", "resume")[-2:] == found[-2:]
