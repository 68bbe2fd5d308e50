"""transformers' Trainer with `tensor_parallel.autotp_size` in its DeepSpeed config: the losses of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_scripts import require, run_script
from safetensors.torch import load_file

require("transformers", "accelerate")


def train(ranks: int, stage: int, out: Path, *more: str) -> list[tuple[float, float]]:
    found = run_script("train_tensor_parallel.py", out, ranks, stage, out, *more, ranks=ranks)
    return [tuple(row) for row in found]


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
