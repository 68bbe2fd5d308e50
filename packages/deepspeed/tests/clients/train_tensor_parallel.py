"""Trains a tiny Llama through transformers' Trainer; test_trainer_tensor_parallel.py runs it on one rank and on two.

Arguments: tensor-parallel ranks, ZeRO stage, output folder, and "resume" to go on from the checkpoint of step 2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

RANKS, STAGE, OUT, RESUME = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), len(sys.argv) > 4
more: dict[str, Any] = {}
if RANKS > 1:  # lines that a CPU needs: transformers asks torch for a GPU backend otherwise
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    more = {"accelerator_config": {"use_configured_state": True}}

config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": STAGE, "stage3_gather_16bit_weights_on_model_save": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
    **({"tensor_parallel": {"autotp_size": RANKS}} if RANKS > 1 else {}),
}
settings = TrainingArguments(
    output_dir=str(OUT),
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    max_steps=4,
    save_steps=2,
    learning_rate=1e-2,
    logging_steps=1,
    report_to=[],
    deepspeed=config,
    seed=5,
    dataloader_pin_memory=False,
    disable_tqdm=True,
    **more,
)
torch.manual_seed(3)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=32, tie_word_embeddings=True, **sizes)
)
rows = [torch.arange(i, i + 12) % 64 for i in range(16)]
trainer = Trainer(model=model, args=settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
trainer.train(resume_from_checkpoint=str(OUT / "checkpoint-2") if RESUME else None)
trainer.save_model(str(OUT / "final"))
if trainer.is_world_process_zero():
    losses = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    (OUT / "found.json").write_text(json.dumps(losses))
