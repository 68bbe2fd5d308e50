"""transformers drives the engine: the Trainer with a DeepSpeed config, and `from_pretrained` into ZeRO-3 shards.

Needs transformers and accelerate, and deepspeed as an installed distribution (which is how they find it).
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from client_scripts import require

import deepspeed
from ds_comm.testing import run_ranks

require("transformers", "accelerate")

TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    return folder


def ds_config(stage: int, **changes: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        **changes,
    }


def load_under_zero3(folder: Path, out: Path) -> tuple[float, float, list[int], int]:
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = ds_config(3)
    keep = HfDeepSpeedConfig(config)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    resident = sum(p.numel() for p in model.parameters())
    tokens = torch.arange(12).reshape(1, 12)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    first = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(first)
    engine.step()
    second = engine(input_ids=tokens, labels=tokens).loss
    engine.eval()
    made = engine.generate(tokens[:, :3], max_new_tokens=4, do_sample=False, synced_gpus=True)
    state = engine._zero3_consolidated_16bit_state_dict()
    if state is not None:
        model.save_pretrained(out, state_dict=state)
    del keep
    return first.item(), second.item(), made[0].tolist(), resident


def test_from_pretrained_into_shards(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    results = run_ranks(load_under_zero3, 2, tiny_llama, tmp_path / "out", timeout=120)
    plain = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokens = torch.arange(12).reshape(1, 12)
    expected = plain(input_ids=tokens, labels=tokens).loss.item()
    total = sum(p.numel() for p in plain.parameters())
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    after = trained(input_ids=tokens, labels=tokens).loss.item()
    for first, second, made, resident in results:
        assert first == pytest.approx(expected, rel=1e-5) and second == pytest.approx(after, rel=1e-5)
        assert second < first and resident < total
        assert made == trained.generate(tokens[:, :3], max_new_tokens=4, do_sample=False)[0].tolist()


TRAINER = """
    import sys, torch
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments
    import deepspeed

    folder, out, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
    data = [{"input_ids": torch.arange(i, i + 12) % 64, "labels": torch.arange(i, i + 12) % 64} for i in range(16)]
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "train_batch_size": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": %STAGE%, "stage3_gather_16bit_weights_on_model_save": True,
                              "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto",
                                                           "warmup_num_steps": "auto", "total_num_steps": "auto"}},
    }
    args = TrainingArguments(
        output_dir=out, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, save_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], deepspeed=config, warmup_steps=1, seed=5,
        save_strategy="steps", dataloader_pin_memory=False,
    )
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=out + "/checkpoint-2" if resume else None)
    assert type(trainer.model_wrapped) is deepspeed.DeepSpeedEngine
    assert trainer.model_wrapped.global_steps == 4
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert len(norms) == len(losses) == 4, (losses, norms)
    trainer.save_model(out + "/final")
    print("LOSSES", losses)
"""


def run_trainer(stage: int, model: Path, out: Path, mode: str) -> str:
    script = textwrap.dedent(TRAINER).replace("%STAGE%", str(stage))
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(out), mode], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return next(line for line in done.stdout.splitlines() if line.startswith("LOSSES"))


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_trains_saves_and_resumes(stage: int, tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    whole = run_trainer(stage, tiny_llama, tmp_path, "fresh")
    assert (tmp_path / "checkpoint-2" / "global_step2").is_dir()
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    again = run_trainer(stage, tiny_llama, tmp_path, "resume")
    assert again == whole
    for name, value in LlamaForCausalLM.from_pretrained(tmp_path / "final").state_dict().items():
        assert torch.equal(value, expected[name])
