"""Trains a tiny causal language model through a Hugging Face trainer; test_trainers.py runs it, with and without us.

What a user's script would hold, but for two lines that a CPU needs: the process group is made before the arguments
(transformers asks torch for a GPU backend otherwise), and the trainer is told to use it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("kind", choices=["full", "lora", "sft", "resize"])
parser.add_argument("model", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--stage", type=int)
parser.add_argument("--bf16", action="store_true")
parser.add_argument("--accumulation", type=int, default=1)
options = parser.parse_args()
if options.stage is not None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
RANKS = int(os.environ.get("WORLD_SIZE", "1"))


def ds_config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": options.stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }


def arguments(kind: type[Any], **more: Any) -> Any:
    """Eight samples a step, however many ranks share them."""
    if options.stage is not None:
        more |= {"deepspeed": ds_config(), "accelerator_config": {"use_configured_state": True}}
    if options.stage is None or options.bf16:
        more |= {"use_cpu": True}  # which transformers asks for with bf16; the process group is there already
    return kind(
        output_dir=str(options.out),
        per_device_train_batch_size=8 // RANKS // options.accumulation,
        gradient_accumulation_steps=options.accumulation,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        seed=5,
        bf16=options.bf16,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **more,
    )


def make_trainer() -> Any:
    rows = [[(i + j) % 64 for j in range(12)] for i in range(32)]
    if options.kind == "sft":
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        args = arguments(SFTConfig, max_length=12, gradient_checkpointing=False)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        data = Dataset.from_list([{"input_ids": row} for row in rows])
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    args = arguments(TrainingArguments, gradient_checkpointing=options.kind == "lora")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if options.kind == "resize":
        model.resize_token_embeddings(70, mean_resizing=False)
        model.resize_token_embeddings(64)
    if options.kind == "lora":
        from peft import PeftModel

        model.enable_input_require_grads()
        model = PeftModel.from_pretrained(model, options.model / "lora", is_trainable=True)
    return Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def shown(trainer: Any) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


trainer = make_trainer()
trainer.train()
first = shown(trainer)
trainer.save_model(str(options.out / "final"))
AcceleratorState._reset_state()  # accelerate takes one DeepSpeed plugin a process; this stands for a second one
trainer = make_trainer()
trainer.train(resume_from_checkpoint=str(options.out / "checkpoint-2"))
if trainer.is_world_process_zero():
    found = {"world": trainer.args.world_size, "engine": type(trainer.model_wrapped).__name__}
    (options.out / "found.json").write_text(json.dumps({**found, "losses": first, "again": shown(trainer)}))
