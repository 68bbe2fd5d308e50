"""What a user's script with a Hugging Face trainer holds, as functions: run by ranks with DeepSpeed, and without it.

Importing transformers costs seconds, so cases run one after another in the same processes (`run_ranks`' pool), each
as a script of its own would begin: `fresh` forgets what accelerate and transformers keep for the life of a process.
Two lines are there for a CPU: the process group is named (transformers asks torch for a GPU backend otherwise), and
the trainer is told to use it. Clients are imported where they are used: without them this module still imports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROWS = [[(i + j) % 64 for j in range(12)] for i in range(32)]
SAMPLES = [{"input_ids": row, "labels": row} for row in ROWS]
BATCH = 8
"""Samples of an optimizer step, however many ranks share them."""
AUTO_OPTIMIZER = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
}


def forget() -> None:
    """Drop what accelerate and transformers keep for the life of a process, such as that ZeRO-3 is on."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    if "transformers" in sys.modules:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def fresh(deepspeed: bool = True) -> None:
    """Make this process what it is when a script begins; with DeepSpeed also join the process group by gloo."""
    from accelerate.state import PartialState

    forget()
    if deepspeed:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    torch.manual_seed(5)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def ds_config(stage: int, **more: Any) -> dict[str, Any]:
    """A configuration that leaves to the trainer what it can."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        **more,
    }


def arguments(
    out: Path,
    config: Any,
    kind: type[Any] | None = None,
    *,
    accumulation: int = 1,
    batch: int = BATCH,
    bf16: bool = False,
    **more: Any,
) -> Any:
    """A trainer's arguments, `batch` samples a step; without DeepSpeed where `config` is None."""
    from transformers import TrainingArguments

    ranks = world_size() if config is not None else 1
    if config is not None:
        more |= {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}
    if config is None or bf16:
        more |= {"use_cpu": True}  # which transformers asks for with bf16; the process group is there already
    usual = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "warmup_steps": 1, "seed": 5}
    return (kind or TrainingArguments)(
        output_dir=str(out),
        per_device_train_batch_size=batch // ranks // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        report_to=[],
        bf16=bf16,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **{**usual, **more},
    )


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_trainer(model: Any, args: Any, samples: Any = SAMPLES, **more: Any) -> Any:
    from transformers import Trainer

    return Trainer(model=model, args=args, train_dataset=samples, **more)


def full(folder: Path, out: Path, config: Any, **options: Any) -> Any:
    args = arguments(out, config, **options)
    return make_trainer(load(folder), args)


def kernels(folder: Path, out: Path, config: Any, **options: Any) -> Any:
    """One key more: fused norms, MLPs, attention and loss, also where the model lies in shards."""
    if config is not None:
        config = {**config, "kernels": {"enabled": True}}
    return make_trainer(load(folder), arguments(out, config, **options))


def resize(folder: Path, out: Path, config: Any, **options: Any) -> Any:
    """The embedding grows and shrinks again while it lies in shards."""
    args = arguments(out, config, **options)
    model = load(folder)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.resize_token_embeddings(64)
    return make_trainer(model, args)


def lora(folder: Path, out: Path, config: Any, **options: Any) -> Any:
    """An adapter from disk, with recomputed activations."""
    from peft import PeftModel

    args = arguments(out, config, gradient_checkpointing=True, **options)
    model = load(folder)
    model.enable_input_require_grads()
    model = PeftModel.from_pretrained(model, folder / "lora", is_trainable=True)
    return make_trainer(model, args)


def sft(folder: Path, out: Path, config: Any, **options: Any) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    args = arguments(out, config, SFTConfig, max_length=12, gradient_checkpointing=False, **options)
    data = Dataset.from_list([{"input_ids": row} for row in ROWS])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SFTTrainer(model=load(folder), args=args, train_dataset=data, processing_class=tokenizer)


def dpo(folder: Path, out: Path, config: Any, **options: Any) -> Any:
    """Two models: the one that trains, and the reference that only answers, in an engine of its own."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = arguments(out, config, DPOConfig, max_length=12, gradient_checkpointing=False, **options)
    words = [[f"t{token}" for token in row] for row in ROWS]
    data = Dataset.from_list(
        [
            {"prompt": " ".join(row[:4]), "chosen": " " + " ".join(row[4:8]), "rejected": " " + " ".join(row[:3])}
            for row in words
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, reference = load(folder), load(folder)
    return DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)


def smollm2(folder: Path, out: Path, config: Any, **options: Any) -> Any:
    """A real model; its samples are the first bytes of the Python manual, which any vocabulary has as tokens."""
    from pydoc_data import topics

    args = arguments(out, config, **options)
    text = "\n\n".join(topics.topics[key] for key in sorted(topics.topics)).encode()[: 8 * 64]
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(8, 64)
    return make_trainer(load(folder), args, [{"input_ids": row, "labels": row} for row in rows])


TRAINERS: dict[str, Callable[..., Any]] = {
    "full": full,
    "kernels": kernels,
    "resize": resize,
    "lora": lora,
    "sft": sft,
    "dpo": dpo,
    "smollm2": smollm2,
}


def shown(trainer: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    return [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]


def engine_of(trainer: Any) -> str:
    return type(trainer.model_wrapped).__name__


def train(
    kind: str, folder: Path, out: Path, config: Any, again: bool = True, export: bool = True, **options: Any
) -> dict[str, Any]:
    """Train four steps, save the model (`export`), and (`again`) go on from step 2's checkpoint with all made anew."""
    fresh(config is not None)
    trainer = TRAINERS[kind](folder, out, config, **options)
    resident = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.train()
    found = {"world": trainer.args.world_size, "engine": engine_of(trainer), "losses": shown(trainer)}
    found["resident"] = resident
    if export:
        trainer.save_model(str(out / "final"))
    if again:
        found["again"] = resume(kind, folder, out, config, **options)
    return found


def resume(kind: str, folder: Path, out: Path, config: Any, **options: Any) -> list[tuple[float, float]]:
    """Go on from the checkpoint of step 2; the history of all four steps."""
    fresh(config is not None)
    trainer = TRAINERS[kind](folder, out, config, **options)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    return shown(trainer)


def evaluate(folder: Path, out: Path, config: Any) -> dict[str, Any]:
    """Evaluate every second step, load the best checkpoint at the end, evaluate it and predict."""
    fresh(config is not None)
    more = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "per_device_eval_batch_size": 2}
    args = arguments(out, config, **more)
    trainer = make_trainer(load(folder), args, eval_dataset=SAMPLES[:12])
    trainer.train()
    seen = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = Path(trainer.state.best_model_checkpoint).name
    last = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(SAMPLES[:6])
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return {"seen": seen, "best": best, "last": last, "logits": torch.from_numpy(logits), "engine": engine_of(trainer)}
