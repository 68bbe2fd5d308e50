"""transformers drives the engine: the Trainer with a DeepSpeed config, and `from_pretrained` into ZeRO-3 shards.

Needs transformers and accelerate, and deepspeed as an installed distribution (which is how they find it).
"""

from __future__ import annotations

from pathlib import Path

import hf_cases
import pytest
import torch
from client_scripts import require

import deepspeed
from ds_comm.testing import run_ranks

require("transformers", "accelerate")


def load_under_zero3(folder: Path, out: Path) -> tuple[float, float, list[int], int]:
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    config = hf_cases.ds_config(3, optimizer={"type": "AdamW", "params": {"lr": 1e-2}})
    config |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": hf_cases.world_size()}
    config |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "bf16": {"enabled": False}}
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


def test_from_pretrained_into_shards(folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    results = run_ranks(load_under_zero3, 2, folder, tmp_path / "out", timeout=120)
    plain = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(12).reshape(1, 12)
    expected = plain(input_ids=tokens, labels=tokens).loss.item()
    total = sum(p.numel() for p in plain.parameters())
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    after = trained(input_ids=tokens, labels=tokens).loss.item()
    for first, second, made, resident in results:
        assert first == pytest.approx(expected, rel=1e-5) and second == pytest.approx(after, rel=1e-5)
        assert second < first and resident < total
        assert made == trained.generate(tokens[:, :3], max_new_tokens=4, do_sample=False)[0].tolist()


SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
    },
}


def run_trainer(stage: int, model: Path, out: Path, resume: bool) -> list[tuple[float, float]]:
    """Optimizer and scheduler are the config's, every value "auto"."""
    zero = {"reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    config = hf_cases.ds_config(stage, **hf_cases.AUTO_OPTIMIZER, scheduler=SCHEDULER)
    config["zero_optimization"] |= zero
    hf_cases.fresh()
    args = hf_cases.arguments(out, config, accumulation=2, batch=4)
    trainer = hf_cases.make_trainer(hf_cases.load(model), args)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    assert type(trainer.model_wrapped) is deepspeed.DeepSpeedEngine
    assert trainer.model_wrapped.global_steps == 4
    assert type(trainer.model_wrapped.lr_scheduler).__name__ == "WarmupDecayLR"
    trainer.save_model(str(out / "final"))
    return hf_cases.shown(trainer)


@pytest.mark.parametrize("stage", [2, 3])
def test_one_rank_trains_saves_and_resumes(stage: int, folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    (whole,) = run_ranks(run_trainer, 1, stage, folder, tmp_path, False, timeout=150)
    assert len(whole) == 4 and (tmp_path / "checkpoint-2" / "global_step2").is_dir()
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    assert run_ranks(run_trainer, 1, stage, folder, tmp_path, True, timeout=150) == [whole]
    for name, value in LlamaForCausalLM.from_pretrained(tmp_path / "final").state_dict().items():
        assert torch.equal(value, expected[name])
