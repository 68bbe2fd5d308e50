"""transformers' Trainer with `tensor_parallel.autotp_size` in its DeepSpeed config: the losses of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_cases
import pytest
import torch
from client_scripts import require
from safetensors.torch import load_file

from ds_comm.testing import run_ranks

require("transformers", "accelerate")

ROWS = [torch.arange(start, start + 12) % 64 for start in range(16)]
SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip


def train(out: Path, resume: bool) -> list[tuple[float, float]]:
    """Four steps over all ranks as tensor ranks, saved; `resume` goes on from the checkpoint of step 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hf_cases.fresh()
    ranks = hf_cases.world_size()
    tensor: dict[str, Any] = {"tensor_parallel": {"autotp_size": ranks}} if ranks > 1 else {}
    config = hf_cases.ds_config(1, **hf_cases.AUTO_OPTIMIZER, **tensor)
    # Every tensor rank sees every sample: the batch is that of one rank.
    settings = hf_cases.arguments(out, config, accumulation=2, batch=4 * ranks)
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    trainer = hf_cases.make_trainer(model, settings, [{"input_ids": row, "labels": row} for row in ROWS])
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    trainer.save_model(str(out / "final"))
    return hf_cases.shown(trainer)


def test_the_trainer_over_two_tensor_ranks_trains_saves_and_resumes(tmp_path: Path) -> None:
    (expected,) = run_ranks(train, 1, tmp_path / "one", False, timeout=150)
    found, _ = run_ranks(train, 2, tmp_path / "two", False, timeout=150)
    assert len(found) == 4
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    whole = load_file(str(tmp_path / "one" / "final" / "model.safetensors"))
    joined = load_file(str(tmp_path / "two" / "final" / "model.safetensors"))
    assert whole.keys() - joined.keys() <= {"lm_head.weight"}  # tied; accelerate unties it on one rank
    for name, value in joined.items():
        assert (whole[name] - value).abs().max() < 1e-5, name
    assert run_ranks(train, 2, tmp_path / "two", True, timeout=150)[0][-2:] == found[-2:]
