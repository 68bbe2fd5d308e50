"""One rank of transformers' Trainer, a user's script, that stops between steps to wait for its parent.

Obeys `_ranks.RankGroup` as `worker.py` does, but from inside of `Trainer.train`: a callback at the beginning of each
step answers and waits. A step's seconds are those from one beginning to the next: data, forward, backward, clipping,
update, scheduler, logging, all that the loop does. Which deepspeed it is depends on interpreter and `PYTHONPATH` alone.
Commands: `{"do": "steps", "count": n}`, `{"do": "exit"}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import models
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import deepspeed

REPLY = os.fdopen(int(os.environ["DS_BENCH_REPLY_FD"]), "w")
SPEC: dict[str, Any] = json.loads(os.environ["DS_BENCH_SPEC"])


class Finished(Exception):
    """The parent wants no more steps."""


def answer(value: dict[str, Any]) -> None:
    """One line to the parent."""
    REPLY.write(json.dumps(value) + "\n")
    REPLY.flush()


class Turns(TrainerCallback):
    """Counts and times the steps that the parent asked for."""

    def __init__(self, ready: dict[str, Any]) -> None:
        self.ready: dict[str, Any] | None = ready
        self.begun = (0.0, 0.0)
        self.count = 0
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.losses: list[float] = []

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the loss of the step that has just ended."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The end of the step before; at the end of a turn the place to wait."""
        if self.ready is not None:
            answer(self.ready)
            self.ready = None
        else:
            self.seconds.append(time.perf_counter() - self.begun[0])
            self.cpu_seconds.append(time.process_time() - self.begun[1])
            if len(self.seconds) < self.count:
                self.begun = time.perf_counter(), time.process_time()
                return
            answer({"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "losses": self.losses})
        line = sys.stdin.readline()
        command = json.loads(line) if line else {"do": "exit"}
        if command["do"] == "exit":
            raise Finished
        self.count, self.seconds, self.cpu_seconds, self.losses = command["count"], [], [], []
        torch.distributed.barrier()
        self.begun = time.perf_counter(), time.process_time()


def ds_config() -> dict[str, Any]:
    """A configuration as transformers' documentation shows it: what the Trainer knows is "auto"."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": SPEC["stage"]},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        **({"kernels": {"enabled": True}} if SPEC.get("kernels") else {}),
    }


def train() -> None:
    """The script: arguments, model, Trainer, train."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")  # transformers would ask torch for a GPU backend
    folder, shape = Path(SPEC["folder"]), models.SHAPES["smollm2"]
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        deepspeed=ds_config(),
        accelerator_config={"use_configured_state": True},
        use_cpu=True,
        bf16=SPEC["dtype"] == "bf16",
        per_device_train_batch_size=shape.batch,
        learning_rate=1e-4,
        weight_decay=0.01,
        max_steps=10_000,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder / "smollm2", dtype=models.DTYPES[SPEC["dtype"]])
    tokens = torch.load(folder / "smollm2.tokens.pt", weights_only=True)
    rows = tokens[: len(tokens) // shape.length * shape.length].view(-1, shape.length)
    ready = {
        "build_s": time.perf_counter() - begun,
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    samples = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=args, train_dataset=samples, callbacks=[Turns(ready)])
    trainer.train()


def main() -> None:
    """Train until the parent has seen enough; errors go to it."""
    torch.set_num_threads(1)
    try:
        train()
    except Finished:
        REPLY.close()
        os._exit(0)  # in the middle of a loop there is nothing to tear down in order
    except BaseException:
        answer({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
